"""Change files of the lower, which makes a union copy them up; and create files durably."""

from __future__ import annotations

from dataclasses import dataclass

from perf.bench import Workload
from perf.box import Box, WrongResult
from perf.corpus import Entry


@dataclass(frozen=True, slots=True)
class Append(Workload):
    """Append a byte to each of many small files."""

    name: str = "append"
    title: str = "append a byte to each of 2,000 lower files, cold"
    cold: bool = True
    main: bool = True
    writes: bool = True

    def setup(self, box: Box) -> None:
        box.state["selected"] = box.corpus.regular_files(1, 1 << 16, 2000)

    def run(self, box: Box) -> float:
        return box.client("append", box.names_file([e.path for e in selected(box)]))[0]

    def verify(self, box: Box) -> None:
        for entry in selected(box):
            path = box.merged / entry.path
            if path.read_bytes() != (box.corpus.reference / entry.path).read_bytes() + b"+":
                raise WrongResult(f"{entry.path} differs from its lower with one byte appended")
            if path.stat().st_mode != entry.mode:
                raise WrongResult(f"{entry.path} has another mode than its lower")


@dataclass(frozen=True, slots=True)
class Chown(Workload):
    """Change the owner of many files, including large ones."""

    name: str = "chown"
    title: str = "chown of 2,000 lower files of up to 64 MB, cold"
    cold: bool = True
    writes: bool = True

    def setup(self, box: Box) -> None:
        # The store must be able to hold a full copy of each, because most systems copy whole files.
        large = box.corpus.regular_files(1 << 20, 16 << 20, 20)
        box.state["selected"] = large + box.corpus.regular_files(1, 1 << 16, 2000 - len(large))

    def run(self, box: Box) -> float:
        return box.client("chown", box.names_file([e.path for e in selected(box)]))[0]

    def verify(self, box: Box) -> None:
        for number, entry in enumerate(selected(box)):
            path = box.merged / entry.path
            info = path.stat()
            if (info.st_uid, info.st_gid, info.st_size) != (1234, 1234, entry.size):
                raise WrongResult(f"{entry.path}: owner {info.st_uid}:{info.st_gid}, {info.st_size} bytes")
            if number % 16 == 0 and path.read_bytes() != (box.corpus.reference / entry.path).read_bytes():
                raise WrongResult(f"{entry.path} has other data than its lower")


@dataclass(frozen=True, slots=True)
class Fsync(Workload):
    """Create small files one by one, and sync each to disk before the next."""

    name: str = "fsync"
    title: str = "create, write 4 KiB, fsync: 300 files"
    writes: bool = True

    def setup(self, box: Box) -> None:
        (box.merged / "durable").mkdir()
        box.state["names"] = [f"durable/{number:03}" for number in range(300)]

    def run(self, box: Box) -> float:
        return box.client("fsync", box.names_file(box.state["names"]))[0]

    def verify(self, box: Box) -> None:
        for name in box.state["names"]:
            if (box.merged / name).read_bytes() != name.encode().ljust(4096, b"."):
                raise WrongResult(f"{name} has other data than was written")


def selected(box: Box) -> list[Entry]:
    """Return the files that the set-up selected."""
    entries: list[Entry] = box.state["selected"]
    return entries


WORKLOADS: list[Workload] = [Append(), Chown(), Fsync()]
