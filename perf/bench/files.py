"""Many small files: walked, read, unpacked, made, changed and removed, one after the other in one mount.

All that changes the merged tree is done by clients, so that a mount of another user can be measured too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from perf.bench import Workload
from perf.bench.find import Find
from perf.bench.read import ReadSmall
from perf.bench.remove import verify_removed
from perf.bench.untar import Untar
from perf.box import Box, WrongResult

SETS = ("append", "chmod", "rename")
"""Whose files are different ones, so that each finds them as they are in the lower."""


def of_lower(box: Box, job: str, count: int) -> list[str]:
    """Up to *count* small files of the lower, for *job* alone."""
    known = box.corpus.regular(1, 1 << 16, count * len(SETS))
    return [entry.path for entry in known[SETS.index(job) :: len(SETS)]]


@dataclass(frozen=True, slots=True)
class Walk(Find):
    """``find`` over what the lower has, and not over what other workloads make beside it."""

    def run(self, box: Box) -> float:
        tops = sorted(e.path for e in box.corpus.entries if "/" not in e.path)
        script = 'echo "d 0"; exec find "$@" -printf "%y %s\\n"'  # the root comes first in a whole listing
        return box.run(["sh", "-c", script, "sh", *tops], stdout=box.scratch / "found")


@dataclass(frozen=True, slots=True)
class OfLower:
    """A job of the client on small files of the lower: what is done copies them up."""

    name: str
    title: str
    job: str
    count: int
    cold: bool = True
    main: bool = False
    writes: bool = True

    def setup(self, box: Box) -> None:
        box.state["names"] = of_lower(box, self.job, self.count)

    def run(self, box: Box) -> float:
        return box.client(self.job, box.names_file(box.state["names"]))[0]

    def verify(self, box: Box) -> None:
        for number, name in enumerate(box.state["names"]):
            old, moved = box.merged / name, f"{name}-renamed"
            if self.job == "rename" and old.exists():
                raise WrongResult(f"{name} has its old name still")
            now = box.merged / moved if self.job == "rename" else old
            before = box.corpus.reference / name
            added = b"+" if self.job == "append" else b""
            try:
                info, was = now.stat(), before.stat()
            except OSError as error:
                raise WrongResult(f"{name}: {error.strerror}") from None
            wanted = 0o400 if self.job == "chmod" else was.st_mode & 0o7777
            if info.st_mode & 0o7777 != wanted or info.st_size != was.st_size + len(added):
                raise WrongResult(
                    f"{name} has mode {info.st_mode:o} and {info.st_size} bytes, which is wrong"
                )
            if number % 4 == 0 and now.read_bytes() != before.read_bytes() + added:
                raise WrongResult(f"{name} has other bytes than it should have")


@dataclass(frozen=True, slots=True)
class Create:
    """Make small files in directories of 50."""

    name: str
    title: str
    count: int
    top: str = "created"
    cold: bool = True
    main: bool = False
    writes: bool = True

    def setup(self, box: Box) -> None:
        pass

    def run(self, box: Box) -> float:
        return box.client("create", box.names_file([self.top, str(self.count)]))[0]

    def verify(self, box: Box) -> None:
        for number in range(self.count):
            path = box.merged / self.top / str(number // 50) / str(number)
            try:
                size, found = path.stat().st_size, path.read_bytes() if number % 4 == 0 else None
            except OSError as error:
                raise WrongResult(f"{self.top}/{number}: {error.strerror}") from None
            if size != 1024 or (found is not None and found != (b"%d " % number).ljust(1024, b".")):
                raise WrongResult(f"{self.top}/{number} has other bytes than were written")


@dataclass(frozen=True, slots=True)
class Remove:
    """``rm -rf`` of such files, made by the mount before."""

    name: str
    title: str
    count: int
    cold: bool = True
    main: bool = False
    writes: bool = True

    def setup(self, box: Box) -> None:
        box.client("create", box.names_file(["removed", str(self.count)]))

    def run(self, box: Box) -> float:
        return box.run(["rm", "-rf", "removed"])

    def verify(self, box: Box) -> None:
        verify_removed(box, "removed")


@dataclass(frozen=True, slots=True)
class Unpack(Untar):
    """``tar xf`` of what lies on tmpfs, into a directory that a client has made."""

    def setup(self, box: Box) -> None:
        box.client("mkdir", box.names_file(["unpacked"]))


def of(prefix: str, share: int = 1) -> list[Workload]:
    """The workloads, their names begun with *prefix*, on one in *share* of the files."""
    few, many = 2000 // share, 6000 // share
    known: list[Workload] = [
        Walk("walk", "find -printf of the whole lower", cold=True, main=False),
        ReadSmall("cat", f"read {many:,} small files of the lower", many),
        Unpack("unpack", "tar xf of small files", cold=True, main=False),
        Create("create", f"make {many:,} files of 1 KiB", many),
        OfLower("append-lower", f"append a byte to {few:,} small files of the lower", "append", few),
        OfLower("chmod", f"chmod of {few:,} small files of the lower", "chmod", few),
        OfLower("rename", f"rename {few:,} small files of the lower", "rename", few),
        Remove("rm", f"rm -rf of {many:,} files of the store", many),
    ]
    return [replace(each, name=f"{prefix}{each.name}") for each in known]  # type: ignore[type-var]


WORKLOADS = of("")
