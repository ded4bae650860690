"""Read files of the lower: many small ones spread over the tree, and a part of it by grep."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from perf.bench import Workload
from perf.box import Box, WrongResult

PATTERN = "return the"


@dataclass(frozen=True, slots=True)
class ReadSmall:
    """Open, read and close small files."""

    name: str = "read-small"
    title: str = "read 3,000 small files, cold"
    count: int = 3000
    cold: bool = True
    main: bool = False
    writes: bool = False

    def setup(self, box: Box) -> None:
        box.state["names"] = [e.path for e in box.corpus.regular(1, 1 << 14, self.count)]

    def run(self, box: Box) -> float:
        seconds, box.state["found"] = box.client("read", box.names_file(box.state["names"]))
        return seconds

    def verify(self, box: Box) -> None:
        digest = hashlib.blake2b(digest_size=16)
        total = 0
        for name in box.state["names"]:
            data = (box.corpus.reference / name).read_bytes()
            digest.update(data)
            total += len(data)
        if box.state["found"] != f"{total} {digest.hexdigest()}":
            raise WrongResult(f"read {box.state['found']} instead of {total} {digest.hexdigest()}")


@dataclass(frozen=True, slots=True)
class Grep:
    """``grep -r`` over one large directory."""

    name: str = "grep"
    title: str = "grep -r over a directory of some 10,000 files, cold"
    cold: bool = True
    main: bool = False
    writes: bool = False

    def setup(self, box: Box) -> None:
        box.state["directory"] = box.corpus.directory(12_000, 200 << 20)

    def run(self, box: Box) -> float:
        # 1: nothing matched, which is right when the reference says so too.
        return box.run(self._command(box), stdout=box.scratch / "matches", codes=(0, 1))

    def verify(self, box: Box) -> None:
        found = sorted((box.scratch / "matches").read_bytes().split(b"\n"))
        wanted = sorted(box.output(self._command(box), box.corpus.reference, (0, 1)).split(b"\n"))
        if found != wanted:
            raise WrongResult(f"grep found {len(found)} files instead of {len(wanted)}")

    def _command(self, box: Box) -> list[str]:
        return ["grep", "-r", "-c", "-a", "-F", PATTERN, box.state["directory"]]


WORKLOADS: list[Workload] = [ReadSmall(), Grep()]


def of_image(compressor: str) -> list[Workload]:
    """The workloads of this module, for the image packed by *compressor*."""
    return [ReadSmall(f"{compressor}-small", f"read 15,000 small files, {compressor}, cold", 15_000)]
