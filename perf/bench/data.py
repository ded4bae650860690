"""Write and read data, in order and at random offsets, one workload after the other in one mount."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from perf.bench import Workload
from perf.bench.large import expect
from perf.box import Box, WrongResult

MIB = 1 << 20
SIZE = 4096


def scattered_offsets(size: int, count: int) -> list[int]:
    """Return *count* offsets of pages in *size* bytes, which visit every page before any repeats."""
    return [number * 7919 * SIZE % size for number in range(count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteInOrder(Workload):
    """Copy the data file with ``dd`` from tmpfs, without fsync."""

    mib: int
    file: str = "written"
    writes: bool = True

    def run(self, box: Box) -> float:
        return copy_data(box, self.file, self.mib)

    def verify(self, box: Box) -> None:
        verify_copy(box, self.file, self.mib)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadInOrder(Workload):
    """Read all of a file that the previous mount has written."""

    mib: int
    cold: bool = True

    def setup(self, box: Box) -> None:
        copy_data(box, "to-read", self.mib)

    def run(self, box: Box) -> float:
        seconds, box.state["result"] = box.client("skim", box.names_file(["to-read"]))
        return seconds

    def verify(self, box: Box) -> None:
        expect(box.state["result"], str(copied_size(box, self.mib)))
        verify_copy(box, "to-read", self.mib)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadScattered(Workload):
    """Read 4 KiB at each of many offsets of a file that the previous mount has written."""

    mib: int
    count: int
    cold: bool = True

    def setup(self, box: Box) -> None:
        copy_data(box, "to-read-anywhere", self.mib)

    def run(self, box: Box) -> float:
        offsets = scattered_offsets(copied_size(box, self.mib), self.count)
        names = ["to-read-anywhere", *map(str, offsets)]
        seconds, box.state["result"] = box.client("random", box.names_file(names))
        return seconds

    def verify(self, box: Box) -> None:
        digest = hashlib.blake2b(digest_size=16)
        with box.corpus.data.open("rb") as file:
            for offset in scattered_offsets(copied_size(box, self.mib), self.count):
                file.seek(offset)
                digest.update(file.read(SIZE))
        expect(box.state["result"], f"{self.count} {digest.hexdigest()}")


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteScattered(Workload):
    """Write 4 KiB at each of many offsets of a file that the previous mount has written, and fsync."""

    mib: int
    count: int
    cold: bool = True
    writes: bool = True

    def setup(self, box: Box) -> None:
        copy_data(box, "to-rewrite", self.mib)

    def run(self, box: Box) -> float:
        return rewrite(box, "to-rewrite", copied_size(box, self.mib), self.count)

    def verify(self, box: Box) -> None:
        verify_rewritten(box, "to-rewrite", copied_size(box, self.mib), self.count)


def copy_data(box: Box, name: str, mib: int) -> float:
    """Copy up to *mib* MiB of the data file to *name*; return the seconds it took."""
    if not box.corpus.data.stat().st_size:
        raise WrongResult("the data file is empty")
    return box.run(["dd", f"if={box.corpus.data}", f"of={name}", "bs=1M", f"count={mib}", "status=none"])


def copied_size(box: Box, mib: int) -> int:
    """Return how many bytes copy_data() copies."""
    return min(mib * MIB, box.corpus.data.stat().st_size)


def verify_copy(box: Box, name: str, mib: int) -> None:
    """Compare *name* with what copy_data() wrote to it."""
    size = copied_size(box, mib)
    box.output(["cmp", "-n", str(size), str(box.corpus.data), name], box.merged)
    if (box.merged / name).stat().st_size != size:
        raise WrongResult(f"{name} is longer than what was written")


def rewrite(box: Box, name: str, size: int, count: int) -> float:
    """Write 4 KiB at *count* scattered offsets of *name*, of *size* bytes; return the seconds it took."""
    return box.client("rewrite", box.names_file([name, *map(str, scattered_offsets(size, count))]))[0]


def verify_rewritten(box: Box, name: str, size: int, count: int) -> None:
    """Check each of the pages that rewrite() wrote."""
    with (box.merged / name).open("rb") as file:
        for offset in scattered_offsets(size, count):
            file.seek(offset)
            if file.read(SIZE) != str(offset).encode().ljust(SIZE, b"#"):
                raise WrongResult(f"{name} has other data at {offset} than was written")


def make_workloads(prefix: str, divisor: int = 1) -> list[Workload]:
    """Return the workloads with *prefix* before their names, on the usual sizes divided by *divisor*."""
    mib, count = 200 // divisor, 10_000 // divisor
    scattered = f"4 KiB at {count:,} offsets of {mib // 2} MiB"
    workloads: list[Workload] = [
        ReadInOrder("seq-read", f"read {mib} MiB of the store in order", mib=mib),
        ReadScattered("random-read", f"read {scattered} of the store", mib=mib // 2, count=count),
        WriteInOrder("seq-write", f"write {mib} MiB in order", cold=True, mib=mib),
        WriteScattered("random-write", f"write {scattered}, and fsync", mib=mib // 2, count=count),
    ]
    return [replace(workload, name=f"{prefix}{workload.name}") for workload in workloads]


WORKLOADS = make_workloads("")
