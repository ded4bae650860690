"""Remove trees: one that is in the store, and one that is in the lower."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from perf.bench import Workload
from perf.bench.untar import TREE, untar
from perf.box import Box, WrongResult


@dataclass(frozen=True, slots=True)
class RemoveUpper(Workload):
    """Run ``rm -rf`` on a tree that was unpacked just before."""

    name: str = "rm-upper"
    title: str = "rm -rf of the 8,000 files just unpacked"
    writes: bool = True
    no_lower: bool = False
    """Whether there is no lower, and so no names beside the tree to check."""

    def setup(self, box: Box) -> None:
        (box.merged / TREE).mkdir()
        untar(box)

    def run(self, box: Box) -> float:
        return box.run(["rm", "-rf", TREE])

    def verify(self, box: Box) -> None:
        if self.no_lower:
            verify_removed(box, TREE)
        else:
            verify_only_removed(box, TREE)


@dataclass(frozen=True, slots=True)
class RemoveLower(Workload):
    """Run ``rm -rf`` on a directory of the lower, which makes whiteouts."""

    name: str = "rm-lower"
    title: str = "rm -rf of a lower directory of some 2,000 files, cold"
    cold: bool = True
    writes: bool = True

    def setup(self, box: Box) -> None:
        box.state["directory"] = box.corpus.largest_directory(2_500, 1 << 30)

    def run(self, box: Box) -> float:
        return box.run(["rm", "-rf", box.state["directory"]])

    def verify(self, box: Box) -> None:
        verify_only_removed(box, box.state["directory"])


def verify_removed(box: Box, name: str) -> Path:
    """Check that *name* is neither listed nor found; return the path it had."""
    path = box.merged / name
    if path.exists() or path.name in {p.name for p in path.parent.iterdir()}:
        raise WrongResult(f"{name} is still there")
    return path


def verify_only_removed(box: Box, name: str) -> None:
    """Check that *name* is neither listed nor found, and that its directory has all its other names."""
    path = verify_removed(box, name)
    prefix = "" if "/" not in name else name.rpartition("/")[0] + "/"
    siblings = {
        e.path for e in box.corpus.entries if e.path.startswith(prefix) and "/" not in e.path[len(prefix) :]
    }
    expected = {sibling[len(prefix) :] for sibling in siblings - {name}}
    different = {p.name for p in path.parent.iterdir()} ^ expected
    if different - {"lost+found"}:
        raise WrongResult(f"beside {name}, these names appeared or disappeared: {sorted(different)[:5]}")


WORKLOADS: list[Workload] = [RemoveUpper(), RemoveLower()]
