"""Open files."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from enum import Enum

from cowfs.layers.base import File
from cowfs.overlay.copyup import copy_up
from cowfs.overlay.node import Node
from cowfs.overlay.state import State, error
from cowfs.types import Attr

_PASSED_ON = os.O_ACCMODE | os.O_SYNC | os.O_DSYNC
_SEEK_SECONDS = 0.05
"""How long is searched for data or a hole: others wait."""
SET_ID = stat.S_ISUID | stat.S_ISGID


class Writer(Enum):
    """Who writes to a file, as far as set-ID bits are concerned (write(2))."""

    PRIVILEGED = 1
    """Has CAP_FSETID: the bits stay."""
    MEMBER = 2
    """Of the file's group: set-group-ID stays if the group may not execute the file."""
    STRANGER = 3


class Handle:
    """An open file of the merged tree."""

    __slots__ = ("_retired", "file", "node", "on_replace", "opener", "writable")

    def __init__(self, node: Node, file: File, *, writable: bool, opener: Writer = Writer.PRIVILEGED) -> None:
        self.node = node
        self.file = file
        self.writable = writable
        self.opener = opener
        """Who is taken to write if nothing is known of that."""
        self.on_replace: Callable[[File], None] | None = None
        """Told of the file that takes the place of the one before."""
        self._retired: list[File] = []

    def replace(self, file: File) -> None:
        """Go on with another file; the one before stays open for reads that are under way."""
        self._retired.append(self.file)
        self.file = file
        if self.on_replace is not None:
            self.on_replace(file)

    def close(self) -> None:
        """Close all files."""
        self.file.close()
        for file in self._retired:
            file.close()


def open_file(fs: State, node: Node, flags: int, *, opener: Writer = Writer.PRIVILEGED) -> Handle:
    """Open a regular file; for writing its whole data is copied up first (or none with O_TRUNC)."""
    if node.is_dir:
        raise error(errno.EISDIR, node.name)
    writable = flags & os.O_ACCMODE != os.O_RDONLY
    truncates = bool(flags & os.O_TRUNC)
    if writable or truncates:
        copy_up(fs, node, 0 if truncates else None)
    if node.upper is not None and not node.metacopy:
        file = fs.upper.open(node.upper, flags & _PASSED_ON)
    else:
        layer, key = node.lowers[-1]
        file = fs.lowers[layer].open(key, os.O_RDONLY)
    handle = Handle(node, file, writable=writable, opener=opener)
    if truncates:
        try:
            drop_set_id(fs, node, opener)
            fs.upper.truncate(node.upper, 0)
        except BaseException:
            file.close()
            raise
    _enter(handle)
    return handle


def attach(fs: State, node: Node, file: File, *, opener: Writer = Writer.PRIVILEGED) -> Handle:
    """Return the handle of a file that its creation has opened."""
    handle = Handle(node, file, writable=True, opener=opener)
    _enter(handle)
    return handle


def _enter(handle: Handle) -> None:
    if handle.node.handles is None:
        handle.node.handles = []
    handle.node.handles.append(handle)


def write(fs: State, handle: Handle, data: bytes, offset: int, *, writer: Writer | None = None) -> int:
    """Write all of *data*; return its length. ENOSPC at once when the store is full."""
    if handle.node.mode & SET_ID:
        drop_set_id(fs, handle.node, writer or handle.opener)
    return handle.file.pwrite(data, offset)


def seek(fs: State, handle: Handle, offset: int, whence: int) -> int:
    """Return where the next data or hole begins, at *offset* or after: lseek(2)'s SEEK_DATA, SEEK_HOLE.

    ENXIO when *offset* is at the end or beyond, or when no data follows; EINVAL for another *whence*.
    """
    if whence not in {os.SEEK_DATA, os.SEEK_HOLE}:
        raise error(errno.EINVAL, handle.node.name)
    if handle.file.fileno() >= 0:
        return os.lseek(handle.file.fileno(), offset, whence)
    size = fs.stat(handle.node).st_size
    if not 0 <= offset < size:
        raise error(errno.ENXIO, handle.node.name)
    hole, deadline = offset, time.monotonic() + _SEEK_SECONDS
    for start, stop in handle.file.segments(size):
        if stop > offset:
            if whence == os.SEEK_DATA:
                return max(start, offset)
            if start > hole:
                return hole
            hole = stop
        if time.monotonic() > deadline:  # in millions of pieces: all of it may be called data (lseek(2))
            return offset if whence == os.SEEK_DATA else size
    if whence == os.SEEK_DATA:
        raise error(errno.ENXIO, handle.node.name)
    return hole


def drop_set_id(fs: State, node: Node, writer: Writer) -> None:
    """Take the set-ID bits that a write or truncate by *writer* takes (setattr_should_drop_suidgid)."""
    if writer is Writer.PRIVILEGED or node.is_dir or not node.mode & SET_ID:
        return
    mode = fs.upper.stat(node.upper).st_mode
    kept = mode & ~stat.S_ISUID
    if mode & stat.S_IXGRP or writer is Writer.STRANGER:
        kept &= ~stat.S_ISGID
    if kept != mode:
        fs.upper.chmod(node.upper, stat.S_IMODE(kept))
        node.mode = kept


def file_stat(fs: State, handle: Handle) -> Attr:
    """Return the attributes of an open file."""
    return fs.stat(handle.node)


def release(fs: State, handle: Handle) -> None:
    """Close an open file; the last handle of an unlinked file lets its data go."""
    handle.close()
    node = handle.node
    if node.handles is not None:
        node.handles.remove(handle)
        if not node.handles:
            node.handles = None
            fs.release(node)
