"""List the whole tree with the size of each file: readdir, and stat of every name."""

from __future__ import annotations

import stat
from dataclasses import dataclass

from perf.bench import Workload
from perf.box import Box, WrongResult


@dataclass(frozen=True, slots=True)
class Find(Workload):
    """Run ``find . -printf`` of type and size."""

    def setup(self, box: Box) -> None:
        if not self.cold:
            self.run(box)

    def run(self, box: Box) -> float:
        return box.run(["find", ".", "-printf", "%y %s\\n"], stdout=box.scratch / "listing")

    def verify(self, box: Box) -> None:
        lines = (box.scratch / "listing").read_text().split("\n")[:-1]
        entries = box.corpus.entries
        if len(lines) != len(entries) + 1:
            raise WrongResult(f"find listed {len(lines)} names instead of {len(entries) + 1}")
        # The sizes of directories depend on the filesystem.
        total = sum(int(line[2:]) for line in lines if line[0] == "f")
        expected = sum(e.size for e in entries if stat.S_ISREG(e.mode))
        if total != expected:
            raise WrongResult(f"the files' sizes add up to {total} instead of {expected}")


WORKLOADS: list[Workload] = [
    Find("find-cold", "find -printf %s over the whole lower, cold", cold=True, main=True),
    Find("find-warm", "the same again, warm"),
]


def image_workloads(compressor: str) -> list[Workload]:
    """Return the workloads of this module for the image packed by *compressor*."""
    title = f"find -printf %s over the whole image, {compressor}, cold"
    return [Find(f"{compressor}-find", title, cold=True)]
