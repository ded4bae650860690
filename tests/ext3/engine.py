"""The engine on an image: the layer, and functions of the engine for tests only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cowfs.formats.ext3._engine import lib
from cowfs.formats.ext3.image import Image
from cowfs.layers.base import Key, UpperLayer
from cowfs.layers.ext3 import Ext3Layer

PWRITE, FDATASYNC, PREAD, FALLOCATE = 1, 2, 3, 4
"""The kinds of calls that can be made to fail."""


@dataclass
class Engine:
    """An open image."""

    image: Image
    layer: Ext3Layer

    def mark(self, kind: int, number: int) -> None:
        """Write a mark to the trace."""
        assert lib.x3_mark(self.image.handle, kind << 56 | number) == 0

    def inject(self, kind: int, nth: int, error: int, *, sticky: bool = False) -> None:
        """Let the *nth* call of a kind fail; 0 stops it."""
        assert lib.x3_inject(self.image.handle, kind, nth, error, sticky) == 0


@contextmanager
def opened(
    path: Path, *, trace_fd: int = -1, debug: int = 0, read_only: bool = False, cache_bytes: int = 64 << 20
) -> Iterator[Engine]:
    """Open an image that commits only on request; close it at the end, or abandon it after an exception."""
    fd = os.open(path, os.O_RDONLY if read_only else os.O_RDWR)
    try:
        image = Image(
            fd, path.name, read_only=read_only, cache_bytes=cache_bytes, commit_seconds=0,
            trace_fd=trace_fd, debug=debug,
        )  # fmt: skip
    finally:
        os.close(fd)
    try:
        yield Engine(image, Ext3Layer(image))
    except BaseException:
        image.abandon()
        raise
    image.close()  # a test may have abandoned it already, which is allowed


def make_file(layer: UpperLayer, name: bytes, directory: Key = None, mode: int = 0o600) -> Key:
    """Create an empty file."""
    key, file = layer.create(layer.root if directory is None else directory, name, mode, 0, 0)
    file.close()
    return key
