"""Data: written and read, in order and at random places, one after the other in one mount."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from perf.bench import Workload
from perf.bench.large import expect
from perf.box import Box, WrongResult

MIB = 1 << 20
SIZE = 4096


def places(size: int, count: int) -> list[int]:
    """Where to read or write: strides that come to no page twice before they have been at all."""
    return [number * 7919 * SIZE % size for number in range(count)]


@dataclass(frozen=True, slots=True)
class WriteInOrder:
    """``dd`` from tmpfs, without fsync."""

    name: str
    title: str
    mib: int
    cold: bool = True
    main: bool = False
    writes: bool = True

    def setup(self, box: Box) -> None:
        pass

    def run(self, box: Box) -> float:
        return copied(box, "written", self.mib)

    def verify(self, box: Box) -> None:
        verify_copied(box, "written", self.mib)


@dataclass(frozen=True, slots=True)
class ReadInOrder:
    """The same, written by the mount before, read whole."""

    name: str
    title: str
    mib: int
    cold: bool = True
    main: bool = False
    writes: bool = False

    def setup(self, box: Box) -> None:
        copied(box, "to-read", self.mib)

    def run(self, box: Box) -> float:
        seconds, box.state["found"] = box.client("skim", box.names_file(["to-read"]))
        return seconds

    def verify(self, box: Box) -> None:
        expect(box.state["found"], str(size_of(box, self.mib)))
        verify_copied(box, "to-read", self.mib)


@dataclass(frozen=True, slots=True)
class ReadAnywhere:
    """4 KiB at each of many places of a file that the mount before has written."""

    name: str
    title: str
    mib: int
    count: int
    cold: bool = True
    main: bool = False
    writes: bool = False

    def setup(self, box: Box) -> None:
        copied(box, "to-read-anywhere", self.mib)

    def run(self, box: Box) -> float:
        names = ["to-read-anywhere", *(str(place) for place in places(size_of(box, self.mib), self.count))]
        seconds, box.state["found"] = box.client("random", box.names_file(names))
        return seconds

    def verify(self, box: Box) -> None:
        digest = hashlib.blake2b(digest_size=16)
        with box.corpus.data.open("rb") as file:
            for place in places(size_of(box, self.mib), self.count):
                file.seek(place)
                digest.update(file.read(SIZE))
        expect(box.state["found"], f"{self.count} {digest.hexdigest()}")


@dataclass(frozen=True, slots=True)
class WriteAnywhere:
    """4 KiB at each of many places of a file that the mount before has written, and fsync."""

    name: str
    title: str
    mib: int
    count: int
    cold: bool = True
    main: bool = False
    writes: bool = True

    def setup(self, box: Box) -> None:
        copied(box, "to-rewrite", self.mib)

    def run(self, box: Box) -> float:
        names = ["to-rewrite", *(str(place) for place in places(size_of(box, self.mib), self.count))]
        return box.client("rewrite", box.names_file(names))[0]

    def verify(self, box: Box) -> None:
        with (box.merged / "to-rewrite").open("rb") as file:
            for place in places(size_of(box, self.mib), self.count):
                file.seek(place)
                if file.read(SIZE) != str(place).encode().ljust(SIZE, b"#"):
                    raise WrongResult(f"there are other bytes at {place} than were written")


def copied(box: Box, name: str, mib: int) -> float:
    """Write so much of the data file to *name*; return the seconds it took."""
    if not box.corpus.data.stat().st_size:
        raise WrongResult("there is no data to write")
    return box.run(["dd", f"if={box.corpus.data}", f"of={name}", "bs=1M", f"count={mib}", "status=none"])


def size_of(box: Box, mib: int) -> int:
    """How many bytes that are."""
    return min(mib * MIB, box.corpus.data.stat().st_size)


def verify_copied(box: Box, name: str, mib: int) -> None:
    """Compare *name* with what was written to it."""
    size = size_of(box, mib)
    box.output(["cmp", "-n", str(size), str(box.corpus.data), name], box.merged)
    if (box.merged / name).stat().st_size != size:
        raise WrongResult(f"{name} is longer than what was written")


def of(prefix: str, share: int = 1) -> list[Workload]:
    """The workloads, their names begun with *prefix*, of one in *share* of the bytes."""
    mib, count = 200 // share, 10_000 // share
    known: list[Workload] = [
        ReadInOrder("seq-read", f"read {mib} MiB of the store in order", mib),
        ReadAnywhere(
            "random-read", f"read 4 KiB at {count:,} places of {mib // 2} MiB of the store", mib // 2, count
        ),
        WriteInOrder("seq-write", f"write {mib} MiB in order", mib),
        WriteAnywhere(
            "random-write", f"write 4 KiB at {count:,} places of {mib // 2} MiB, and fsync", mib // 2, count
        ),
    ]
    return [replace(each, name=f"{prefix}{each.name}") for each in known]  # type: ignore[type-var]


WORKLOADS = of("")
