"""What the writable filesystem itself is measured by: names, data in place, one large file."""

from __future__ import annotations

from dataclasses import dataclass

from perf.bench import Workload
from perf.bench.change import Fsync
from perf.bench.remove import RemoveUpper
from perf.bench.untar import Untar
from perf.box import Box, WrongResult

NAMES = 50_000
FILE = "written"
GIB = 1 << 30
REWRITES = 5_000
REWRITTEN = 128 << 20


@dataclass(frozen=True, slots=True)
class Rewrite:
    """Write 4 KiB at scattered places of a file that has all its blocks."""

    name: str = "store-rewrite"
    title: str = "5,000 x 4 KiB rewritten in place, and fsync"
    cold: bool = False
    main: bool = False
    writes: bool = True

    def setup(self, box: Box) -> None:
        box.client("fill", box.names_file([FILE, str(REWRITTEN)]))

    def run(self, box: Box) -> float:
        # A stride that visits every page of the file once before it comes back.
        places = [str(number * 7919 * 4096 % REWRITTEN) for number in range(REWRITES)]
        return box.client("rewrite", box.names_file([FILE, *places]))[0]

    def verify(self, box: Box) -> None:
        with (box.merged / FILE).open("rb") as file:
            for number in range(REWRITES):
                place = number * 7919 * 4096 % REWRITTEN
                file.seek(place)
                if file.read(4096) != str(place).encode().ljust(4096, b"#"):
                    raise WrongResult(f"{FILE} has other bytes at {place} than were written")


@dataclass(frozen=True, slots=True)
class Write:
    """One large file, written from memory."""

    name: str = "store-write"
    title: str = "1 GiB written by 1 MiB, and fsync"
    cold: bool = False
    main: bool = False
    writes: bool = True

    def setup(self, box: Box) -> None:
        pass

    def run(self, box: Box) -> float:
        return box.client("fill", box.names_file([FILE, str(GIB)]))[0]

    def verify(self, box: Box) -> None:
        verify_filled(box)


@dataclass(frozen=True, slots=True)
class Read:
    """The same file, read at the next mount."""

    name: str = "store-read"
    title: str = "this 1 GiB read, cold"
    cold: bool = True
    main: bool = False
    writes: bool = False

    def setup(self, box: Box) -> None:
        box.client("fill", box.names_file([FILE, str(GIB)]))

    def run(self, box: Box) -> float:
        seconds, box.state["seen"] = box.client("skim", box.names_file([FILE]))
        return seconds

    def verify(self, box: Box) -> None:
        if box.state["seen"] != str(GIB):
            raise WrongResult(f"{box.state['seen'] or 'nothing'} was read instead of {GIB} bytes")
        verify_filled(box)


@dataclass(frozen=True, slots=True)
class Names:
    """A directory with very many names."""

    name: str = "store-names"
    title: str = "50,000 empty files made in one directory, listed with stat, half of them removed"
    cold: bool = False
    main: bool = False
    writes: bool = True

    def setup(self, box: Box) -> None:
        (box.merged / "many").mkdir()

    def run(self, box: Box) -> float:
        return box.client("names", box.names_file(["many", str(NAMES)]))[0]

    def verify(self, box: Box) -> None:
        left = {path.name for path in (box.merged / "many").iterdir()}
        if left != {f"name {number}" for number in range(1, NAMES, 2)}:
            raise WrongResult(f"{len(left)} names are left, or wrong ones")


def verify_filled(box: Box) -> None:
    """Check the size of FILE and a page of every 16 MiB."""
    path = box.merged / FILE
    if path.stat().st_size != GIB:
        raise WrongResult(f"{FILE} has {path.stat().st_size} bytes")
    with path.open("rb") as file:
        for place in range(0, GIB, 16 << 20):
            file.seek(place)
            if file.read(4096) != (b"%016d" % (place >> 20)) * 256:
                raise WrongResult(f"{FILE} has other bytes at {place} than were written")


WORKLOADS: list[Workload] = [
    Untar("store-untar", main=False),
    RemoveUpper("store-rm", alone=True),
    Fsync("store-fsync"),
    Rewrite(),
    Names(),
    Write(),
    Read(),
]
