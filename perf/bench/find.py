"""List the whole tree with the size of everything: readdir and stat of every name."""

from __future__ import annotations

import stat
from dataclasses import dataclass

from perf.bench import Workload
from perf.box import Box, WrongResult


@dataclass(frozen=True, slots=True)
class Find:
    """``find . -printf`` of type and size."""

    name: str
    title: str
    cold: bool
    main: bool
    writes: bool = False

    def setup(self, box: Box) -> None:
        if not self.cold:
            self.run(box)

    def run(self, box: Box) -> float:
        return box.run(["find", ".", "-printf", "%y %s\\n"], stdout=box.scratch / "found")

    def verify(self, box: Box) -> None:
        found = (box.scratch / "found").read_text().split("\n")[:-1]
        entries = box.corpus.entries
        if len(found) != len(entries) + 1:
            raise WrongResult(f"find listed {len(found)} names instead of {len(entries) + 1}")
        # The sizes of directories are each filesystem's own business.
        listed = sum(int(line[2:]) for line in found if line[0] == "f")
        wanted = sum(e.size for e in entries if stat.S_ISREG(e.mode))
        if listed != wanted:
            raise WrongResult(f"the files' sizes add up to {listed} instead of {wanted}")


WORKLOADS: list[Workload] = [
    Find("find-cold", "find -printf %s over the whole lower, cold", cold=True, main=True),
    Find("find-warm", "the same again, warm", cold=False, main=False),
]


def of_image(compressor: str) -> list[Workload]:
    """The workloads of this module, for the image packed by *compressor*."""
    title = f"find -printf %s over the whole image, {compressor}, cold"
    return [Find(f"{compressor}-find", title, cold=True, main=False)]
