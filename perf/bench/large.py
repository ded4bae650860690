"""Read the large file of a squashfs image, in order and at random offsets."""

from __future__ import annotations

import hashlib
import os
import random
from dataclasses import dataclass

from perf.bench import Workload
from perf.box import Box, WrongResult
from perf.corpus import Large
from perf.images import LARGE

OFFSETS = 3000
SIZE = 4096


@dataclass(frozen=True, slots=True)
class ReadLarge(Workload):
    """Read the file in order, and ignore the data."""

    cold: bool = True

    def run(self, box: Box) -> float:
        seconds, box.state["result"] = box.client("skim", box.names_file([LARGE]))
        return seconds

    def verify(self, box: Box) -> None:
        expect(box.state["result"], str(large(box).size))
        # This finds the data in the page cache: it checks what the timed part has read.
        expect(box.client("read", box.names_file([LARGE]))[1], large(box).digest)


@dataclass(frozen=True, slots=True)
class ReadRandom(Workload):
    """Read 4 KiB at each of many random offsets, the same ones in each run."""

    cold: bool = True

    def setup(self, box: Box) -> None:
        pages = random.Random(SIZE).choices(range(large(box).size // SIZE), k=OFFSETS)
        box.state["offsets"] = [page * SIZE for page in pages]

    def run(self, box: Box) -> float:
        names = [LARGE, *map(str, box.state["offsets"])]
        seconds, box.state["result"] = box.client("random", box.names_file(names))
        return seconds

    def verify(self, box: Box) -> None:
        digest = hashlib.blake2b(digest_size=16)
        with large(box).path.open("rb") as file:
            for offset in box.state["offsets"]:
                digest.update(os.pread(file.fileno(), SIZE, offset))
        expect(box.state["result"], f"{OFFSETS} {digest.hexdigest()}")


def expect(result: str, expected: str) -> None:
    """Raise WrongResult unless the client's *result* is the *expected* one."""
    if result != expected:
        raise WrongResult(f"read {result} instead of {expected}")


def large(box: Box) -> Large:
    """Return the large file as it was before it was packed; WrongResult if the image has none."""
    if box.corpus.large is None:
        raise WrongResult("this image has no large file")
    return box.corpus.large


def image_workloads(compressor: str) -> list[Workload]:
    """Return the workloads of this module for the image packed by *compressor*."""
    return [
        ReadLarge(f"{compressor}-large", f"read 1 GB in order, {compressor}, cold"),
        ReadRandom(f"{compressor}-random", f"read 4 KiB at {OFFSETS:,} random offsets, {compressor}, cold"),
    ]
