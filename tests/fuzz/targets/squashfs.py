"""The squashfs reader: images, used in every way."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fuzz import bytes as plain
from tests.fuzz import mutate as structure
from tests.fuzz.driver import Run, Target
from tests.fuzz.exercise import exercise
from tests.support.old_squashfs import KINDS, old_image
from tests.support.squashfs import small_images


@contextmanager
def _run() -> Iterator[Run]:
    yield lambda data: exercise((b"sqsh" if data[:4] == b"sqsh" else b"hsqs") + data[4:])


def _seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as place:
        seeds = [path.read_bytes() for path in small_images(Path(place))]
    return seeds + [old_image(kind) for kind in KINDS]


def _mutate(data: bytes, choose: random.Random) -> bytes:
    if choose.randrange(8) == 0 or len(data) < 200:
        return plain.mutate(data, choose)
    return structure.mutate(data, choose.getrandbits(64))


TARGET = Target(_run, _seeds, ("cowfs.formats.squashfs", "cowfs.layers.squashfs"), _mutate)
