"""The groups of a run: each has workloads, the systems that can run them, and their lower."""

from __future__ import annotations

from dataclasses import dataclass, replace

from perf import debian, images
from perf.bench import Workload, bench_of_image, bench_of_store, bench_of_targets, bench_of_union
from perf.images import COMPRESSORS
from perf.peers import System, of_a_user, readers, stores, targets, unions


@dataclass(frozen=True, slots=True)
class Group:
    """Workloads and the systems that run them, all on one image."""

    name: str
    image: str
    """What is the lower: an image of :mod:`perf.images`, that of :mod:`perf.debian`, "" for perf.corpus's."""
    workloads: dict[str, Workload]
    systems: dict[str, System]
    together: bool = False
    """Whether all of them are done in one mount, one after the other: each is then another part of it."""

    def named(self, words: set[str]) -> dict[str, Workload]:
        """The workloads that are called by one of *words*: by name, or by that of the group or its kind."""
        if words & {self.name, self.name.partition("-")[0]} or (self.together and "targets" in words):
            return self.workloads
        return {name: workload for name, workload in self.workloads.items() if name in words}


def groups() -> dict[str, Group]:
    """Every group by name: the unions, their stores, and one of readers for each compressor."""
    known = [Group("union", "", bench_of_union(), unions()), Group("store", "", bench_of_store(), stores())]
    known += [Group(f"squash-{each}", each, bench_of_image(each), readers()) for each in COMPRESSORS]
    for name, workloads in bench_of_targets().items():
        systems = of_a_user() if name == "user" else targets()
        if name in ("files", "programs"):
            systems.pop("cowfs-kernel")  # whose point is how data goes
        image = {"programs": debian.NAME, "user": images.USER}.get(name, "")
        known.append(Group(name, image, workloads, systems, together=True))
    return {group.name: group for group in known}


def select(workloads: str | None, systems: str | None) -> list[Group]:
    """The groups, with what the two lists name and nothing else; KeyError for a name that there is not.

    The lists have commas between names. Among workloads, ``union`` (what no list means), ``store``,
    ``squash``, ``squash-zstd``, ``files``, ``data``, ``programs`` and ``user`` stand for all of theirs, and
    ``targets`` for the last four; without a list of systems it is all that can do them.
    """
    known = list(groups().values())
    words = set((workloads or "union").split(","))
    able = {name for group in known for name in group.systems}
    peers = set(systems.split(",")) if systems else able
    for word in sorted(words | peers):
        if word in peers and word not in able:
            raise KeyError(f"there is no {word!r}: choose from {', '.join(sorted(able))}")
        if word in words and not any(group.named({word}) for group in known):
            names = [name for group in known for name in (group.name, *group.workloads)]
            raise KeyError(f"there is no {word!r}: choose from {', '.join(names)}")
    chosen = [
        replace(g, workloads=g.named(words), systems={n: s for n, s in g.systems.items() if n in peers})
        for g in known
    ]
    return [group for group in chosen if group.workloads and group.systems]
