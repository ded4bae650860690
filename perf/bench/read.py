"""Read files of the lower: many small ones all over the tree, and one directory with grep."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from perf.bench import Workload
from perf.bench.large import expect
from perf.box import Box, WrongResult

PATTERN = "return the"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadSmall(Workload):
    """Open, read and close small files."""

    count: int
    cold: bool = True

    def setup(self, box: Box) -> None:
        box.state["names"] = [e.path for e in box.corpus.regular_files(1, 1 << 14, self.count)]

    def run(self, box: Box) -> float:
        seconds, box.state["result"] = box.client("read", box.names_file(box.state["names"]))
        return seconds

    def verify(self, box: Box) -> None:
        digest = hashlib.blake2b(digest_size=16)
        total = 0
        for name in box.state["names"]:
            data = (box.corpus.reference / name).read_bytes()
            digest.update(data)
            total += len(data)
        expect(box.state["result"], f"{total} {digest.hexdigest()}")


@dataclass(frozen=True, slots=True)
class Grep(Workload):
    """Run ``grep -r`` over one large directory."""

    name: str = "grep"
    title: str = "grep -r over a directory of some 10,000 files, cold"
    cold: bool = True

    def setup(self, box: Box) -> None:
        box.state["directory"] = box.corpus.largest_directory(12_000, 200 << 20)

    def run(self, box: Box) -> float:
        # Exit status 1 means that nothing matched; verify() checks it against the reference.
        return box.run(self._command(box), stdout=box.scratch / "matches", codes=(0, 1))

    def verify(self, box: Box) -> None:
        found = sorted((box.scratch / "matches").read_bytes().split(b"\n"))
        expected = sorted(box.output(self._command(box), box.corpus.reference, (0, 1)).split(b"\n"))
        if found != expected:
            raise WrongResult(f"grep found {len(found)} files instead of {len(expected)}")

    def _command(self, box: Box) -> list[str]:
        return ["grep", "-r", "-c", "-a", "-F", PATTERN, box.state["directory"]]


WORKLOADS: list[Workload] = [
    ReadSmall("read-small", "read 3,000 small files, cold", count=3000),
    Grep(),
]


def image_workloads(compressor: str) -> list[Workload]:
    """Return the workloads of this module for the image packed by *compressor*."""
    return [ReadSmall(f"{compressor}-small", f"read 15,000 small files, {compressor}, cold", count=15_000)]
