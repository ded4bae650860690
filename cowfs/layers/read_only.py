"""What the layers that nobody can write to have in common."""

from __future__ import annotations

import errno
import struct

from cowfs.errors import os_error
from cowfs.types import NO_UUID, Attr, FileHandle

_FILEID_INO32_GEN = 1
"""The kernel's type of a handle that is an inode number and a generation (linux/exportfs.h)."""
_HANDLE = struct.Struct("<II")


class ReadOnlyFile:
    """Most of a :class:`cowfs.layers.base.File` that has no descriptor, and that nobody can write to."""

    __slots__ = ("_attr",)

    def __init__(self, attr: Attr) -> None:
        self._attr = attr

    def pwrite(self, data: bytes, offset: int) -> int:
        raise os_error(errno.EBADF)

    def truncate(self, size: int) -> None:
        raise os_error(errno.EBADF)

    def fsync(self, datasync: bool) -> None:
        """Do nothing: the layer is read-only."""

    def stat(self) -> Attr:
        """Return the attributes at the time of opening."""
        return self._attr

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        """Do nothing: the layer stays open."""


def make_handle(number: int, uuid: bytes, hint: bytes = b"", lower: int = 0) -> FileHandle:
    """Return a handle as the kernel's squashfs makes it, with the number of an inode."""
    return FileHandle(_FILEID_INO32_GEN, _HANDLE.pack(number, 0), uuid, hint, lower)


def number_in(handle: FileHandle, uuid: bytes, last: int) -> int | None:
    """Return the number of the inode, at most *last*; None if the handle is not of the layer with *uuid*."""
    if handle.type != _FILEID_INO32_GEN or len(handle.data) != _HANDLE.size:
        return None
    if handle.uuid not in {uuid, NO_UUID}:
        return None
    number, generation = _HANDLE.unpack(handle.data)
    return number if not generation and 0 < number <= last else None
