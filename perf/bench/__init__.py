"""The workloads: one module per kind, each a :class:`Workload`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from perf.box import Box
from perf.images import COMPRESSORS


@dataclass(frozen=True, slots=True)
class Workload(ABC):
    """Something people do in a merged tree, small enough to be repeated many times."""

    name: str
    """The name on the command line and in the results."""
    title: str
    """What is timed, in words."""
    cold: bool = False
    """Whether the system is mounted again and the caches are dropped before the timed part."""
    main: bool = False
    """Whether ``--quick`` runs it."""
    writes: bool = False
    """Whether the result is verified after an unmount and a new mount."""

    def setup(self, box: Box) -> None:  # noqa: B027 - most workloads need no preparation
        """Prepare the timed part. Not timed."""

    @abstractmethod
    def run(self, box: Box) -> float:
        """Do the work; return the seconds it took."""

    @abstractmethod
    def verify(self, box: Box) -> None:
        """Raise WrongResult unless the work was done correctly."""


def union_workloads() -> dict[str, Workload]:
    """Return the workloads for a merged tree by name, in the order of the tables."""
    from perf.bench import change, clone, find, read, remove, sequential, untar

    modules = (find, untar, change, read, remove, sequential, clone)
    return by_name([workload for module in modules for workload in module.WORKLOADS])


def image_workloads(compressor: str) -> dict[str, Workload]:
    """Return the workloads for a reader of squashfs images by name, in the order of the tables."""
    from perf.bench import find, large, read

    modules = (find, read, large)
    return by_name([workload for module in modules for workload in module.image_workloads(compressor)])


def store_workloads() -> dict[str, Workload]:
    """Return the workloads for the writable filesystem by name, in the order of the tables."""
    from perf.bench import store

    return by_name(store.WORKLOADS)


def target_workloads() -> dict[str, dict[str, Workload]]:
    """Return the workloads of the targets in docs/benchmarks.md, by group and name."""
    from perf.bench import data, files, programs

    user = [*files.make_workloads("user-", 4), *data.make_workloads("user-", 4)]
    groups = {
        "files": files.WORKLOADS, "data": data.WORKLOADS, "programs": programs.WORKLOADS, "user": user
    }  # fmt: skip
    return {group: by_name(workloads) for group, workloads in groups.items()}


def workloads() -> dict[str, Workload]:
    """Return every workload by name, except the programs, which need their own root filesystem."""
    found = union_workloads() | store_workloads()
    for group, members in target_workloads().items():
        if group != "programs":
            found |= members
    for compressor in COMPRESSORS:
        found |= image_workloads(compressor)
    return found


def by_name(workloads: list[Workload]) -> dict[str, Workload]:
    """Return *workloads* by name, in the same order."""
    return {workload.name: workload for workload in workloads}
