"""Remove trees: one that was made in the store, and one that the lower holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from perf.bench import Workload
from perf.bench.untar import TREE, untar
from perf.box import Box, WrongResult


@dataclass(frozen=True, slots=True)
class RemoveUpper:
    """``rm -rf`` of what was unpacked just before."""

    name: str = "rm-upper"
    title: str = "rm -rf of the 8,000 files just unpacked"
    cold: bool = False
    main: bool = False
    writes: bool = True
    alone: bool = False
    """Whether there may be no lower, and so no neighbours to look at."""

    def setup(self, box: Box) -> None:
        (box.merged / TREE).mkdir()
        untar(box)

    def run(self, box: Box) -> float:
        return box.run(["rm", "-rf", TREE])

    def verify(self, box: Box) -> None:
        if self.alone:
            verify_removed(box, TREE)
        else:
            verify_gone(box, TREE)


@dataclass(frozen=True, slots=True)
class RemoveLower:
    """``rm -rf`` of a directory of the lower: whiteouts for all its names, or for itself."""

    name: str = "rm-lower"
    title: str = "rm -rf of a lower directory of some 2,000 files, cold"
    cold: bool = True
    main: bool = False
    writes: bool = True

    def setup(self, box: Box) -> None:
        box.state["directory"] = box.corpus.directory(2_500, 1 << 30)

    def run(self, box: Box) -> float:
        return box.run(["rm", "-rf", box.state["directory"]])

    def verify(self, box: Box) -> None:
        verify_gone(box, box.state["directory"])


def verify_removed(box: Box, name: str) -> Path:
    """Check that *name* is neither listed nor found; return where it was."""
    path = box.merged / name
    if path.exists() or path.name in {p.name for p in path.parent.iterdir()}:
        raise WrongResult(f"{name} is still there")
    return path


def verify_gone(box: Box, name: str) -> None:
    """Check that *name* is neither listed nor found, and that its neighbours still are."""
    path = verify_removed(box, name)
    above = "" if "/" not in name else name.rpartition("/")[0] + "/"
    wanted = {
        e.path for e in box.corpus.entries if e.path.startswith(above) and "/" not in e.path[len(above) :]
    }
    missing = {p.name for p in path.parent.iterdir()} ^ {w[len(above) :] for w in wanted - {name}}
    if missing - {"lost+found"}:
        raise WrongResult(f"beside {name}, these names came or went: {sorted(missing)[:5]}")


WORKLOADS: list[Workload] = [RemoveUpper(), RemoveLower()]
