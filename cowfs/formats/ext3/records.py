"""The engine's records of inodes and of the image, as plain data."""

from __future__ import annotations

import struct
from typing import NamedTuple

INODE = struct.Struct("=8I2Q3q")
"""struct x3_attr of engine.h."""


FIRST = -(1 << 31) * 10**9
"""The earliest time of an inode in ns since the epoch."""
_LAST = ((1 << 31) + (3 << 32) - 1) * 10**9
"""The latest time of an inode in ns, in the year 2446."""


def time_of(number: int) -> int:
    """Return the time in ns since the epoch for a number in struct x3_attr."""
    return number if number >= FIRST else number + (1 << 64)


def number_of(time: int) -> int:
    """Return the number in struct x3_attr for a time in ns, or for the nearest possible time."""
    time = min(max(time, FIRST), _LAST)
    return time if time < 1 << 63 else time - (1 << 64)


class Inode(NamedTuple):
    """The attributes of an inode as the engine returns them; see struct x3_attr."""

    mode: int
    nlink: int
    uid: int
    gid: int
    major: int
    minor: int
    generation: int
    flags: int
    size: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


class Facts(NamedTuple):
    """The state of the image. Sizes are in blocks unless stated otherwise."""

    block_size: int
    inode_size: int
    blocks: int
    free_blocks: int
    reserved: int
    overhead: int
    inodes: int
    free_inodes: int
    uuid: bytes
    replayed: int
    """Transactions that were replayed from the journal when the image was opened."""
    redone: int
    """Records that were replayed from the redo log then."""
    aborted: int
    """The errno for which the engine aborted the image; 0 if it did not."""
    stalled: int
    """The errno for which changes are refused for now, for example because the disk is full; 0 if none."""
    unsaved: int
    """Blocks with changes that are only in memory."""
    saved_ns: int
    """The last time when everything was on disk, in ns."""
    missing: int
    """Bytes of the image that its file, being sparse, has not allocated."""
    disk_free: int
    """Free bytes of its disk."""
    cache_hits: int
    """Metadata blocks, since the image was opened, that were in memory when needed."""
    cache_misses: int
    """Metadata blocks that had to be read."""
