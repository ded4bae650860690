"""The workloads: one module per kind, all behind :class:`Workload`."""

from __future__ import annotations

from typing import Protocol

from perf.box import Box
from perf.images import COMPRESSORS


class Workload(Protocol):
    """Something people do to a merged tree, small enough to be done again and again."""

    @property
    def name(self) -> str:
        """How the command line and the results call it."""
        ...

    @property
    def title(self) -> str:
        """What is timed, in words."""
        ...

    @property
    def cold(self) -> bool:
        """Whether the system is mounted afresh and the caches are dropped before the timed part."""
        ...

    @property
    def writes(self) -> bool:
        """Whether the result is verified after an unmount and a fresh mount."""
        ...

    @property
    def main(self) -> bool:
        """Whether ``--quick`` runs it."""
        ...

    def setup(self, box: Box) -> None:
        """Make what the timed part needs. Not timed."""
        ...

    def run(self, box: Box) -> float:
        """Do it; return the seconds it took."""
        ...

    def verify(self, box: Box) -> None:
        """Raise WrongResult unless what came out is what had to come out."""
        ...


def bench_of_union() -> dict[str, Workload]:
    """What a merged tree is measured by, by name, in the order of the tables."""
    from perf.bench import change, clone, find, read, remove, sequential, untar

    modules = (find, untar, change, read, remove, sequential, clone)
    known: list[Workload] = [workload for module in modules for workload in module.WORKLOADS]
    return {workload.name: workload for workload in known}


def bench_of_image(compressor: str) -> dict[str, Workload]:
    """What the reader of an image is measured by, by name, in the order of the tables."""
    from perf.bench import find, large, read

    modules = (find, read, large)
    known: list[Workload] = [workload for module in modules for workload in module.of_image(compressor)]
    return {workload.name: workload for workload in known}


def bench_of_store() -> dict[str, Workload]:
    """What the writable filesystem is measured by, by name, in the order of the tables."""
    from perf.bench import store

    return {workload.name: workload for workload in store.WORKLOADS}


def bench_of_targets() -> dict[str, dict[str, Workload]]:
    """What the targets of docs/benchmarks.md are about, by group and name."""
    from perf.bench import data, files, programs

    user = [*files.of("user-", 4), *data.of("user-", 4)]
    known = {
        "files": files.WORKLOADS, "data": data.WORKLOADS, "programs": programs.WORKLOADS, "user": user
    }  # fmt: skip
    return {group: {workload.name: workload for workload in of} for group, of in known.items()}


def workloads() -> dict[str, Workload]:
    """Every workload by name, but for the programs, which want a root of their own."""
    known = bench_of_union() | bench_of_store()
    for name, each in bench_of_targets().items():
        known |= {} if name == "programs" else each
    for compressor in COMPRESSORS:
        known |= bench_of_image(compressor)
    return known
