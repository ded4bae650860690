"""Allocate the blocks of a store's file."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress

from cowfs.errors import StoreError
from cowfs.linux import files
from cowfs.store.format.sizes import format_size


def allocate(
    fd: int,
    path: str,
    start: int,
    end: int,
    length: int | None = None,
    tick: Callable[[int], object] = lambda _: None,
) -> None:
    """Allocate all blocks of a file from *start* to *end*, which may be beyond its end.

    Blocks until they are on disk. If there is not enough space, cut the file to its former *length* (by
    default *start*), and raise StoreError. *tick* gets the number of bytes written, on a filesystem
    on which they must be.
    """
    length = start if length is None else length
    try:
        files.make_room(fd, start, end, alone=True, tick=tick)
        os.fsync(fd)
    except OSError as error:
        os.ftruncate(fd, length)
        hint = "free some space, or choose a smaller size"
        if error.errno == errno.EFBIG:
            hint = "the filesystem, or a limit (ulimit -f), does not allow a file of this size"
        raise StoreError(
            f"{path}: cannot allocate {format_size(end - start)}: {error.strerror}", hint
        ) from None
    except BaseException:
        os.ftruncate(fd, length)
        raise


def fill_holes(fd: int, start: int, end: int, *, alone: bool = True) -> None:
    """Allocate the blocks that e2fsprogs freed: it punches holes if a filesystem cannot zero ranges.

    Not *alone*: others write to the file meanwhile.
    """
    state = os.fstat(fd)
    if stat.S_ISREG(state.st_mode) and state.st_blocks * 512 < end:
        with suppress(OSError):
            files.make_room(fd, start, end, alone=alone)


def take_room(fd: int, path: str) -> str:
    """Allocate the holes in an unused store's file: a copy may have some.

    Return a warning if the disk has no space for them. Blocks.
    """
    state = os.fstat(fd)
    missing = state.st_size - state.st_blocks * 512
    if missing <= 0:
        return ""
    room = os.fstatvfs(fd)
    free = room.f_bfree * room.f_frsize
    told = (
        f"{path}: the file still needs {format_size(missing)}, but its disk has only "
        f"{format_size(free)} free: free space there"
    )
    if missing > free:
        return told
    try:
        files.make_room(fd, 0, state.st_size, alone=True)
        os.fsync(fd)
    except OSError:
        return told
    return ""
