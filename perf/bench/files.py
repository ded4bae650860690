"""Many small files: list, read, unpack, create, change and remove them, one after the other in one mount.

Only clients change the merged tree, so that a mount of another user can be measured too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from perf.bench import Workload
from perf.bench.find import Find
from perf.bench.read import ReadSmall
from perf.bench.remove import verify_removed
from perf.bench.untar import TREE, Untar
from perf.box import Box, WrongResult

LOWER_JOBS = ("append", "chmod", "rename")
"""Jobs on files of the lower. Each has its own files, which the other jobs have not changed."""


def lower_files(box: Box, job: str, count: int) -> list[str]:
    """Return up to *count* small files of the lower that only *job* changes."""
    files = box.corpus.regular_files(1, 1 << 16, count * len(LOWER_JOBS))
    return [entry.path for entry in files[LOWER_JOBS.index(job) :: len(LOWER_JOBS)]]


@dataclass(frozen=True, slots=True)
class Walk(Find):
    """Run ``find`` over the content of the lower, without what other workloads create beside it."""

    def run(self, box: Box) -> float:
        tops = sorted(e.path for e in box.corpus.entries if "/" not in e.path)
        script = 'echo "d 0"; exec find "$@" -printf "%y %s\\n"'  # Find lists the root first
        return box.run(["sh", "-c", script, "sh", *tops], stdout=box.scratch / "listing")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeLower(Workload):
    """Run a job of the client on small files of the lower, which copies them up."""

    job: str
    count: int
    cold: bool = True
    writes: bool = True

    def setup(self, box: Box) -> None:
        box.state["names"] = lower_files(box, self.job, self.count)

    def run(self, box: Box) -> float:
        return box.client(self.job, box.names_file(box.state["names"]))[0]

    def verify(self, box: Box) -> None:
        for number, name in enumerate(box.state["names"]):
            path, original = box.merged / name, box.corpus.reference / name
            if self.job == "rename":
                if path.exists():
                    raise WrongResult(f"{name} still has its old name")
                path = box.merged / f"{name}-renamed"
            added = b"+" if self.job == "append" else b""
            try:
                info, old = path.stat(), original.stat()
            except OSError as error:
                raise WrongResult(f"{name}: {error.strerror}") from None
            mode = 0o400 if self.job == "chmod" else old.st_mode & 0o7777
            if info.st_mode & 0o7777 != mode or info.st_size != old.st_size + len(added):
                raise WrongResult(f"{name} has wrong attributes: mode {info.st_mode:o}, {info.st_size} bytes")
            if number % 4 == 0 and path.read_bytes() != original.read_bytes() + added:
                raise WrongResult(f"{name} has other data than expected")


@dataclass(frozen=True, slots=True, kw_only=True)
class Create(Workload):
    """Create small files, 50 in each directory."""

    count: int
    top: str = "created"
    cold: bool = True
    writes: bool = True

    def run(self, box: Box) -> float:
        return box.client("create", box.names_file([self.top, str(self.count)]))[0]

    def verify(self, box: Box) -> None:
        for number in range(self.count):
            path = box.merged / self.top / str(number // 50) / str(number)
            try:
                size, content = path.stat().st_size, path.read_bytes() if number % 4 == 0 else None
            except OSError as error:
                raise WrongResult(f"{self.top}/{number}: {error.strerror}") from None
            if size != 1024 or (content is not None and content != (b"%d " % number).ljust(1024, b".")):
                raise WrongResult(f"{self.top}/{number} has other data than was written")


@dataclass(frozen=True, slots=True, kw_only=True)
class Remove(Workload):
    """Run ``rm -rf`` on small files that the previous mount has created."""

    count: int
    cold: bool = True
    writes: bool = True

    def setup(self, box: Box) -> None:
        box.client("create", box.names_file(["removed", str(self.count)]))

    def run(self, box: Box) -> float:
        return box.run(["rm", "-rf", "removed"])

    def verify(self, box: Box) -> None:
        verify_removed(box, "removed")


@dataclass(frozen=True, slots=True)
class Unpack(Untar):
    """Run ``tar xf`` of an archive on tmpfs, into a directory that a client has created."""

    def setup(self, box: Box) -> None:
        box.client("mkdir", box.names_file([TREE]))


def make_workloads(prefix: str, divisor: int = 1) -> list[Workload]:
    """Return the workloads with *prefix* before their names, on the usual numbers divided by *divisor*."""
    few, many = 2000 // divisor, 6000 // divisor
    workloads: list[Workload] = [
        Walk("walk", "find -printf of the whole lower", cold=True),
        ReadSmall("cat", f"read {many:,} small files of the lower", count=many),
        Unpack("unpack", "tar xf of small files", cold=True, main=False),
        Create("create", f"create {many:,} files of 1 KiB", count=many),
        ChangeLower(
            "append-lower", f"append a byte to {few:,} small files of the lower", job="append", count=few
        ),
        ChangeLower("chmod", f"chmod of {few:,} small files of the lower", job="chmod", count=few),
        ChangeLower("rename", f"rename {few:,} small files of the lower", job="rename", count=few),
        Remove("rm", f"rm -rf of {many:,} files of the store", count=many),
    ]
    return [replace(workload, name=f"{prefix}{workload.name}") for workload in workloads]


WORKLOADS = make_workloads("")
