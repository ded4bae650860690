"""Read the large file of a squashfs image: from one end to the other, and at random places."""

from __future__ import annotations

import hashlib
import os
import random
from dataclasses import dataclass

from perf.bench import Workload
from perf.box import Box, WrongResult
from perf.corpus import Large
from perf.images import LARGE

PLACES = 3000
SIZE = 4096


@dataclass(frozen=True, slots=True)
class ReadLarge:
    """Read it in order, and look at nothing."""

    name: str
    title: str
    cold: bool = True
    main: bool = False
    writes: bool = False

    def setup(self, box: Box) -> None:
        pass

    def run(self, box: Box) -> float:
        seconds, box.state["found"] = box.client("skim", box.names_file([LARGE]))
        return seconds

    def verify(self, box: Box) -> None:
        expect(box.state["found"], str(large(box).size))
        # It is in the page cache still: what was read above is looked at, and not read again.
        expect(box.client("read", box.names_file([LARGE]))[1], large(box).digest)


@dataclass(frozen=True, slots=True)
class ReadRandom:
    """Read 4 KiB at each of many places, always the same ones."""

    name: str
    title: str
    cold: bool = True
    main: bool = False
    writes: bool = False

    def setup(self, box: Box) -> None:
        places = random.Random(SIZE).choices(range(large(box).size // SIZE), k=PLACES)
        box.state["places"] = [place * SIZE for place in places]

    def run(self, box: Box) -> float:
        names = [LARGE, *(str(place) for place in box.state["places"])]
        seconds, box.state["found"] = box.client("random", box.names_file(names))
        return seconds

    def verify(self, box: Box) -> None:
        digest = hashlib.blake2b(digest_size=16)
        with large(box).path.open("rb") as file:
            for place in box.state["places"]:
                digest.update(os.pread(file.fileno(), SIZE, place))
        expect(box.state["found"], f"{PLACES} {digest.hexdigest()}")


def expect(found: str, wanted: str) -> None:
    """Raise WrongResult unless both are equal."""
    if found != wanted:
        raise WrongResult(f"read {found} instead of {wanted}")


def large(box: Box) -> Large:
    """The file before it was packed."""
    if box.corpus.large is None:
        raise WrongResult("this image has no large file")
    return box.corpus.large


def of_image(compressor: str) -> list[Workload]:
    """The workloads of this module, for the image packed by *compressor*."""
    return [
        ReadLarge(f"{compressor}-large", f"read 1 GB in order, {compressor}, cold"),
        ReadRandom(f"{compressor}-random", f"read 4 KiB at {PLACES:,} random places, {compressor}, cold"),
    ]
