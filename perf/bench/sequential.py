"""One large file, written and read back."""

from __future__ import annotations

from dataclasses import dataclass

from perf.bench import Workload
from perf.box import Box, WrongResult

FILE = "large"


@dataclass(frozen=True, slots=True)
class Write:
    """``dd`` from tmpfs, without fsync: what is left to do then is the settle time."""

    name: str = "write"
    title: str = "dd write of 400 MiB"
    cold: bool = False
    main: bool = False
    writes: bool = True

    def setup(self, box: Box) -> None:
        pass

    def run(self, box: Box) -> float:
        return write(box)

    def verify(self, box: Box) -> None:
        box.output(["cmp", str(box.corpus.data), FILE], box.merged)


@dataclass(frozen=True, slots=True)
class ReadBack:
    """``dd`` to tmpfs of a file that an earlier mount wrote."""

    name: str = "read-back"
    title: str = "dd read of these 400 MiB, cold"
    cold: bool = True
    main: bool = False
    writes: bool = False

    def setup(self, box: Box) -> None:
        write(box)

    def run(self, box: Box) -> float:
        return box.run(["dd", f"if={FILE}", "bs=1M", "status=none", f"of={box.scratch}/copy"])

    def verify(self, box: Box) -> None:
        copy = box.scratch / "copy"
        try:
            box.output(["cmp", str(box.corpus.data), str(copy)], box.scratch)
        finally:
            copy.unlink(missing_ok=True)


def write(box: Box) -> float:
    """Write the data file to FILE; return the seconds it took."""
    if not box.corpus.data.stat().st_size:
        raise WrongResult("there is no data to write")
    return box.run(["dd", f"if={box.corpus.data}", f"of={FILE}", "bs=1M", "status=none"])


WORKLOADS: list[Workload] = [Write(), ReadBack()]
