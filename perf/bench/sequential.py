"""Write one large file, and read it back."""

from __future__ import annotations

from dataclasses import dataclass

from perf.bench import Workload
from perf.bench.data import WriteInOrder, copy_data
from perf.box import Box
from perf.corpus import DATA_MIB

FILE = "large"


@dataclass(frozen=True, slots=True)
class ReadBack(Workload):
    """Copy a file that the previous mount has written to tmpfs, with ``dd``."""

    name: str = "read-back"
    title: str = "dd read of these 400 MiB, cold"
    cold: bool = True

    def setup(self, box: Box) -> None:
        copy_data(box, FILE, DATA_MIB)

    def run(self, box: Box) -> float:
        return box.run(["dd", f"if={FILE}", "bs=1M", "status=none", f"of={box.scratch}/copy"])

    def verify(self, box: Box) -> None:
        copy = box.scratch / "copy"
        try:
            box.output(["cmp", str(box.corpus.data), str(copy)], box.scratch)
        finally:
            copy.unlink(missing_ok=True)


WORKLOADS: list[Workload] = [
    WriteInOrder("write", "dd write of 400 MiB", mib=DATA_MIB, file=FILE),  # fsync is in the settle time
    ReadBack(),
]
