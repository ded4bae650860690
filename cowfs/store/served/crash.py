"""Simulate crashes: whenever the daemon dies, the image contains only what was synced.

The engine works on a copy in memory. Each sync makes the copy clean and writes its changes to the image.
Like a journal, an fsync(2) also writes everything that was done before it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from cowfs.errors import UsageError
from cowfs.linux import files
from cowfs.store.format.sniff import looks_like_image
from cowfs.store.served.store import Store

_PIECE = 1 << 20


class Scratch:
    """A copy of an image, in memory."""

    def __init__(self, fd: int) -> None:
        self._image = fd
        self.fd = os.memfd_create("cowfs-crash", os.MFD_CLOEXEC)
        _copy(self._image, self.fd)

    def keep(self) -> None:
        """Write the copy's contents to the image. Blocks."""
        _copy(self.fd, self._image)

    def close(self) -> None:
        """Write the copy to the image, and free it."""
        try:
            self.keep()
        finally:
            os.close(self.fd)


def must_be_possible(store: str) -> None:
    """UsageError for a store that cannot discard unsynced changes."""
    is_new = not os.path.lexists(store) and not looks_like_image(store)  # it will be a directory
    if store != "memory" and (os.path.isdir(store) or is_new):
        raise UsageError(
            f"{store}: a directory keeps what was not synced, so it cannot simulate a crash",
            f"use a store in an image: cowfs create {store}.bs 256M",
        )


def rehearse(store: Store) -> None:
    """Write the current store to the image. Blocks; only for the thread of the store's layer."""
    if store.scratch is None:
        return
    layer: Any = store.layer
    layer.suspend(store.work)
    try:
        store.scratch.keep()
    finally:
        layer.resume(store.work)


def _copy(source: int, target: int) -> None:
    """Make one file equal to another, with its holes; write only where they differ."""
    size = files.size_of(source)
    if files.size_of(target) != size:
        os.ftruncate(target, size)
    for start, stop in files.segments(source, size):
        for at in range(start, stop, _PIECE):
            data = os.pread(source, min(_PIECE, stop - at), at)
            if os.pread(target, len(data), at) != data:
                os.pwrite(target, data, at)
    for start, stop in files.holes(source, 0, size):
        for first, last in files.segments(target, stop, start):
            _clear(target, max(first, start), min(last, stop))


def _clear(fd: int, start: int, stop: int) -> None:
    with suppress(OSError):
        files.fallocate(fd, start, stop - start, files.PUNCH_HOLE)
        return
    for at in range(start, stop, _PIECE):
        os.pwrite(fd, bytes(min(_PIECE, stop - at)), at)
