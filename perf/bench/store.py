"""Workloads for the writable filesystem alone: names, rewritten data, one large file."""

from __future__ import annotations

from dataclasses import dataclass

from perf.bench import Workload
from perf.bench.change import Fsync
from perf.bench.data import rewrite, verify_rewritten
from perf.bench.large import expect
from perf.bench.remove import RemoveUpper
from perf.bench.untar import Untar
from perf.box import Box, WrongResult

NAMES = 50_000
FILE = "written"
GIB = 1 << 30
REWRITES = 5_000
REWRITTEN = 128 << 20


@dataclass(frozen=True, slots=True)
class Rewrite(Workload):
    """Write 4 KiB at scattered offsets of a file whose blocks are all allocated."""

    name: str = "store-rewrite"
    title: str = "5,000 x 4 KiB rewritten in place, and fsync"
    writes: bool = True

    def setup(self, box: Box) -> None:
        box.client("fill", box.names_file([FILE, str(REWRITTEN)]))

    def run(self, box: Box) -> float:
        return rewrite(box, FILE, REWRITTEN, REWRITES)

    def verify(self, box: Box) -> None:
        verify_rewritten(box, FILE, REWRITTEN, REWRITES)


@dataclass(frozen=True, slots=True)
class Write(Workload):
    """Write one large file from memory."""

    name: str = "store-write"
    title: str = "1 GiB written by 1 MiB, and fsync"
    writes: bool = True

    def run(self, box: Box) -> float:
        return box.client("fill", box.names_file([FILE, str(GIB)]))[0]

    def verify(self, box: Box) -> None:
        verify_filled(box)


@dataclass(frozen=True, slots=True)
class Read(Workload):
    """Read the same file at the next mount."""

    name: str = "store-read"
    title: str = "this 1 GiB read, cold"
    cold: bool = True

    def setup(self, box: Box) -> None:
        box.client("fill", box.names_file([FILE, str(GIB)]))

    def run(self, box: Box) -> float:
        seconds, box.state["result"] = box.client("skim", box.names_file([FILE]))
        return seconds

    def verify(self, box: Box) -> None:
        expect(box.state["result"], str(GIB))
        verify_filled(box)


@dataclass(frozen=True, slots=True)
class Names(Workload):
    """Create very many names in a directory, list it, and remove half of them."""

    name: str = "store-names"
    title: str = "50,000 empty files created in one directory, listed with stat, half of them removed"
    writes: bool = True

    def setup(self, box: Box) -> None:
        (box.merged / "many").mkdir()

    def run(self, box: Box) -> float:
        return box.client("names", box.names_file(["many", str(NAMES)]))[0]

    def verify(self, box: Box) -> None:
        remaining = {path.name for path in (box.merged / "many").iterdir()}
        if remaining != {f"name {number}" for number in range(1, NAMES, 2)}:
            raise WrongResult(f"wrong names remain, or not {NAMES // 2}: {len(remaining)}")


def verify_filled(box: Box) -> None:
    """Check the size of FILE, and one page of every 16 MiB."""
    path = box.merged / FILE
    if path.stat().st_size != GIB:
        raise WrongResult(f"{FILE} has {path.stat().st_size} bytes")
    with path.open("rb") as file:
        for offset in range(0, GIB, 16 << 20):
            file.seek(offset)
            if file.read(4096) != (b"%016d" % (offset >> 20)) * 256:
                raise WrongResult(f"{FILE} has other data at {offset} than was written")


WORKLOADS: list[Workload] = [
    Untar("store-untar", main=False),
    RemoveUpper("store-rm", no_lower=True),
    Fsync("store-fsync"),
    Rewrite(),
    Names(),
    Write(),
    Read(),
]
