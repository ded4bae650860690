"""What the engine returns about inodes and the image, as plain data."""

from __future__ import annotations

import struct
from typing import NamedTuple

INODE = struct.Struct("=8I2Q3q")
"""struct x3_attr of engine.h."""


FIRST = -(1 << 31) * 10**9
"""The earliest time that an inode can have, in ns …"""
_LAST = ((1 << 31) + (3 << 32) - 1) * 10**9
"""… and the latest, which the year 2446 has."""


def time_of(number: int) -> int:
    """Return the time that a number in struct x3_attr stands for."""
    return number if number >= FIRST else number + (1 << 64)


def number_of(time: int) -> int:
    """Return the number in struct x3_attr for a time, or for the nearest time that an inode can have."""
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
    """What is known of the whole image. Sizes are counted in blocks."""

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
    """Transactions that were in the journal when it was opened."""
    redone: int
    """Records that were in the redo log then."""
    aborted: int
    """The errno for which the engine aborted the image; 0 while all is well."""
    stalled: int
    """The errno of what the disk lacks: changes are refused until it has that; 0 while all is well."""
    unsaved: int
    """Blocks with changes that are only in memory."""
    saved_ns: int
    """When everything was on disk last."""
    missing: int
    """Bytes of its blocks that the image's file lacks: it is sparse."""
    disk_free: int
    """Bytes that its disk has free for them."""
    cache_hits: int
    """Since it was opened: metadata blocks that were in memory when needed …"""
    cache_misses: int
    """… and those that had to be read."""
