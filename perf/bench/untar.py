"""Unpack an archive of small files from tmpfs."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from perf.bench import Workload
from perf.box import Box, WrongResult

TREE = "unpacked"


@dataclass(frozen=True, slots=True)
class Untar(Workload):
    """Run ``tar xf`` into a new directory."""

    name: str = "untar"
    title: str = "tar xf of 8,000 files"
    main: bool = True
    writes: bool = True

    def setup(self, box: Box) -> None:
        (box.merged / TREE).mkdir()

    def run(self, box: Box) -> float:
        return untar(box)

    def verify(self, box: Box) -> None:
        verify_unpacked(box)


def untar(box: Box) -> float:
    """Unpack the archive into TREE; return the seconds it took."""
    return box.run(["tar", "-xpf", str(box.corpus.archive), "-C", TREE])


def verify_unpacked(box: Box) -> None:
    """Compare every name, mode and size under TREE with the reference, and the data of every 16th file."""
    for number, entry in enumerate(box.corpus.archived):
        path = box.merged / TREE / entry.path
        try:
            info = path.lstat()
        except OSError as error:
            raise WrongResult(f"{TREE}/{entry.path}: {error.strerror}") from None
        if info.st_mode != entry.mode:
            raise WrongResult(f"{TREE}/{entry.path} has mode {info.st_mode:o} instead of {entry.mode:o}")
        if not stat.S_ISREG(entry.mode):
            continue
        if info.st_size != entry.size:
            raise WrongResult(f"{TREE}/{entry.path} has {info.st_size} bytes instead of {entry.size}")
        if number % 16 == 0 and path.read_bytes() != (box.corpus.reference / entry.path).read_bytes():
            raise WrongResult(f"{TREE}/{entry.path} has other data than the archive")
    count = sum(len(files) for _, _, files in os.walk(Path(box.merged / TREE)))
    expected = sum(stat.S_ISREG(e.mode) for e in box.corpus.archived)
    if count != expected:
        raise WrongResult(f"{TREE} contains {count} files instead of {expected}")


WORKLOADS: list[Workload] = [Untar()]
