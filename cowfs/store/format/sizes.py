"""Parse and format sizes, and check whether a filesystem has space."""

from __future__ import annotations

import os
import re

from cowfs.errors import StoreError, UsageError
from cowfs.linux import files, filesystems

MIB = 1 << 20
SMALLEST = 16 * MIB
"""The smallest store: in a smaller one, the ext3 journal would take most of the space."""
LARGEST = 16 << 40
"""The largest ext3 filesystem, with blocks of 4 KiB and 32-bit block numbers."""
FAT_LARGEST = (1 << 32) - 1
"""The largest file on FAT, whose sizes have 32 bits."""

_MOST = (1 << 63) - 1
_UNITS = {"": MIB, "k": 1 << 10, "m": MIB, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,6})?)([kmgt]?)(?:i?b)?", re.IGNORECASE)


def is_size(text: str) -> bool:
    """Whether *text* has the form of a size."""
    return _SIZE.fullmatch(text.strip()) is not None


def parse_size(text: str) -> int:
    """Return a size in bytes: ``256``, ``256M`` and ``256MiB`` are MiB; also ``64K``, ``1.5G``, ``1T``.

    It is rounded down to whole blocks of 4 KiB, but not to 0. UsageError if *text* is not a size of a file.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match and _SIZE.fullmatch(text.strip().removeprefix("-")):
        raise UsageError(f"{text!r} is negative", "write 256 or 256M for MiB, 2G for GiB")
    if not match:
        raise UsageError(f"{text!r} is not a size", "write 256 or 256M for MiB, 2G for GiB")
    unit = _UNITS[match[2].lower()]
    whole, _, part = match[1].partition(".")
    size = int(whole) * unit + int(part or 0) * unit // int("1" + "0" * len(part))
    if size > _MOST:
        raise UsageError(f"{text!r} is too large for a file", "write 256 or 256M for MiB, 2G for GiB")
    return size & ~4095 or (4096 if size else 0)


def format_size(size: int) -> str:
    """Return a size for people: ``64 MiB``, ``2 GiB``, ``1.5 GiB``, ``512 KiB``, ``12 bytes``."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (MIB, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.0f} {name}" if size % unit == 0 else f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def check_room(path: str, place: str, size: int, allocated: int = 0) -> None:
    """StoreError unless a file of *size* bytes at *path* fits on the filesystem of *place*. Blocks.

    *allocated* bytes of it are on disk already. Checks the free space and FAT's limit.
    """
    fd = os.open(place, os.O_PATH | os.O_CLOEXEC)
    try:
        room = os.fstatvfs(fd)
        magic = files.fs_magic(fd)
    finally:
        os.close(fd)
    if magic == filesystems.FAT and size > FAT_LARGEST:
        raise StoreError(
            f"{path}: a FAT filesystem cannot hold a {format_size(size)} file",
            "give at most 4095 MiB, or use another filesystem",
        )
    free = (room.f_bfree if os.geteuid() == 0 else room.f_bavail) * room.f_frsize
    if size - allocated > free:
        raise StoreError(
            f"{path}: needs {format_size(size - allocated)} more, but only {format_size(free)} are free",
            "free some space, or choose a smaller size",
        )
