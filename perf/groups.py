"""The groups of a run: workloads, the systems that can run them, and their lower."""

from __future__ import annotations

from dataclasses import dataclass, replace

from perf import debian, images
from perf.bench import Workload, image_workloads, store_workloads, target_workloads, union_workloads
from perf.images import COMPRESSORS
from perf.peers import System, image_readers, stores, target_systems, unions, user_systems


@dataclass(frozen=True, slots=True)
class Group:
    """Workloads and the systems that run them, all on the same image."""

    name: str
    image: str
    """The name of the lower in :mod:`perf.images` or :mod:`perf.debian`; "" for that of perf.corpus."""
    workloads: dict[str, Workload]
    systems: dict[str, System]
    together: bool = False
    """Whether all workloads run in the same mount, one after the other."""

    def matching(self, words: set[str]) -> dict[str, Workload]:
        """Return the workloads that *words* select: by name, by the group's name, or by the group's kind."""
        if words & {self.name, self.name.partition("-")[0]} or (self.together and "targets" in words):
            return self.workloads
        return {name: workload for name, workload in self.workloads.items() if name in words}


def groups() -> dict[str, Group]:
    """Return every group by name."""
    known = [Group("union", "", union_workloads(), unions()), Group("store", "", store_workloads(), stores())]
    known += [
        Group(f"squash-{compressor}", compressor, image_workloads(compressor), image_readers())
        for compressor in COMPRESSORS
    ]
    for name, workloads in target_workloads().items():
        systems = user_systems() if name == "user" else target_systems()
        if name in ("files", "programs"):
            systems.pop("cowfs-kernel")  # it differs from cowfs in how it moves data
        image = {"programs": debian.NAME, "user": images.USER}.get(name, "")
        known.append(Group(name, image, workloads, systems, together=True))
    return {group.name: group for group in known}


def select(workloads: str | None, systems: str | None) -> list[Group]:
    """Return the groups, reduced to the workloads and systems in two comma-separated lists.

    In the list of workloads, the name of a group (``union``, ``store``, ``squash-zstd``, ``files``...) stands
    for all its workloads, ``squash`` for those of all squashfs groups, and ``targets`` for ``files``,
    ``data``, ``programs`` and ``user``. Without a list it is ``union``; without a list of systems, all
    systems. KeyError if a name is unknown.
    """
    known = list(groups().values())
    words = set((workloads or "union").split(","))
    all_systems = {name for group in known for name in group.systems}
    peers = set(systems.split(",")) if systems else all_systems
    for peer in sorted(peers - all_systems):
        raise KeyError(f"unknown system {peer!r}: choose from {', '.join(sorted(all_systems))}")
    for word in sorted(words):
        if not any(group.matching({word}) for group in known):
            names = [name for group in known for name in (group.name, *group.workloads)]
            raise KeyError(f"unknown workload {word!r}: choose from {', '.join(names)}")
    selected = [
        replace(g, workloads=g.matching(words), systems={n: s for n, s in g.systems.items() if n in peers})
        for g in known
    ]
    return [group for group in selected if group.workloads and group.systems]
