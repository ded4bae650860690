"""Open files: open, read position, write and release."""

from __future__ import annotations

import errno
import os
import stat
import time

from cowfs.errors import os_error
from cowfs.layers.base import File
from cowfs.layers.partial import PartialFile
from cowfs.overlay import partial, protect
from cowfs.overlay.copyup import begin_lazily, copy_up
from cowfs.overlay.fs import OverlayFs
from cowfs.overlay.handle import Handle, Handles, Reader, Writer
from cowfs.overlay.node import Node

_SYNCHRONOUS = os.O_SYNC | os.O_DSYNC
_PASSED_ON = os.O_ACCMODE | _SYNCHRONOUS
_SEEK_SECONDS = 0.005
"""How many seconds to search for data or a hole, because others wait."""
SET_ID = stat.S_ISUID | stat.S_ISGID


def open_file(
    fs: OverlayFs, node: Node, flags: int, *, opener: Writer = Writer.PRIVILEGED, frugal: bool = False
) -> Handle:
    """Open a regular file. To write, first copy up its data, unless the file is large or *flags* have
    O_TRUNC.

    With *frugal*, the file must not keep a descriptor: EMFILE if it needs one.
    """
    if node.is_dir:
        raise os_error(errno.EISDIR, node.name)
    writable = flags & os.O_ACCMODE != os.O_RDONLY
    truncates = bool(flags & os.O_TRUNC)
    if truncates or (writable and not begin_lazily(fs, node)):
        copy_up(fs, node, 0 if truncates else None)
    if not writable and not truncates:
        return _enter(Handle(node, _reader(fs, node, frugal=frugal), writable=False, opener=opener))
    file = partial.open_data(fs, node, flags & _PASSED_ON, frugal=frugal)
    handle = Handle(node, file, writable=writable, opener=opener)
    handle.is_synchronous = bool(flags & _SYNCHRONOUS)
    if truncates:
        try:
            drop_set_id(fs, node, opener)
            fs.upper.truncate(node.upper, 0)
        except BaseException:
            file.close()
            raise
    return _enter(handle)


_CUT_FROM = 16 << 20
"""Freeing this many bytes is long work."""


def is_long_to_cut(fs: OverlayFs, node: Node, size: int) -> bool:
    """Whether setting the size of an upper file frees so much that other requests should not wait for it.

    If so, call ``File.truncate`` in a thread first, then setattr_ or open_file, which set the size.
    """
    if node.upper is None or node.metacopy or not stat.S_ISREG(node.mode):
        return False
    attr = fs.upper.stat(node.upper)
    return min(attr.st_blocks * 512, attr.st_size - size) >= _CUT_FROM


def _reader(fs: OverlayFs, node: Node, *, frugal: bool) -> Reader:
    reader = node.handles.reader if node.handles is not None else None
    if reader is not None and reader.users:
        return reader
    if node.upper is not None and (not node.metacopy or node.partial is not None):
        return Reader(partial.open_data(fs, node, os.O_RDONLY, frugal=frugal))
    layer, key = node.lowers[-1]
    return Reader(partial.open_in(fs.lowers[layer], key, os.O_RDONLY, frugal=frugal))


def attach(fs: OverlayFs, node: Node, file: File, *, opener: Writer = Writer.PRIVILEGED) -> Handle:
    """Return a handle for *file*, which the creation of *node* opened."""
    return _enter(Handle(node, file, writable=True, opener=opener))


def _enter(handle: Handle) -> Handle:
    if handle.node.handles is None:
        handle.node.handles = Handles()
    handle.node.handles[handle] = None
    if handle.reader is not None:
        handle.node.handles.reader = handle.reader
    return handle


def write(fs: OverlayFs, handle: Handle, data: bytes, offset: int, *, writer: Writer | None = None) -> int:
    """Write all of *data*; return its length. ENOSPC at once when the store is full."""
    if handle.is_frozen:
        copy_up(fs, handle.node)
    if handle.node.mode & SET_ID:
        will_be_written(fs, handle, writer)
    return handle.file.pwrite(data, offset)


def is_long_to_write(handle: Handle, size: int, offset: int) -> bool:
    """Whether a write must first read from a lower. Other requests need not wait for that."""
    return isinstance(handle.file, PartialFile) and handle.file.needs_the_lower(size, offset)


def will_be_written(fs: OverlayFs, handle: Handle, writer: Writer | None) -> None:
    """Do what must be done before the file itself is written, for example by a thread."""
    if handle.node.mode & SET_ID:
        drop_set_id(fs, handle.node, writer or handle.opener)


def seek(fs: OverlayFs, handle: Handle, offset: int, whence: int) -> int:
    """Return where the next data or hole begins, at *offset* or after: lseek(2)'s SEEK_DATA, SEEK_HOLE.

    ENXIO when *offset* is at the end or beyond, or when no data follows; EINVAL for another *whence*.
    """
    if whence not in {os.SEEK_DATA, os.SEEK_HOLE}:
        raise os_error(errno.EINVAL, handle.node.name)
    if handle.file.fileno() >= 0:
        return os.lseek(handle.file.fileno(), offset, whence)
    size = handle.file.stat().st_size
    if not 0 <= offset < size:
        raise os_error(errno.ENXIO, handle.node.name)
    hole, deadline = offset, time.monotonic() + _SEEK_SECONDS
    for start, stop in handle.file.segments(size, offset):
        if stop > offset:
            if whence == os.SEEK_DATA:
                return max(start, offset)
            if start > hole:
                return hole
            hole = stop
        if time.monotonic() > deadline:  # too many pieces: lseek(2) may call all of it data
            return offset if whence == os.SEEK_DATA else size
    if whence == os.SEEK_DATA:
        raise os_error(errno.ENXIO, handle.node.name)
    return hole


def clears_set_id(mode: int, writer: Writer) -> bool:
    """Whether a write by *writer* clears set-ID bits of a regular file with *mode*."""
    return _without_set_id(mode, writer) != mode


def _without_set_id(mode: int, writer: Writer) -> int:
    if writer is Writer.PRIVILEGED:
        return mode
    clears_group = mode & stat.S_IXGRP or writer is Writer.STRANGER
    return mode & ~(SET_ID if clears_group else stat.S_ISUID)


def drop_set_id(fs: OverlayFs, node: Node, writer: Writer) -> None:
    """Clear the set-ID bits that a write or truncate by *writer* clears (setattr_should_drop_suidgid()).

    EPERM if it clears one of an append-only file (ext4_setattr() in the kernel).
    """
    if writer is Writer.PRIVILEGED or node.is_dir or not node.mode & SET_ID:
        return
    mode = fs.upper.stat(node.upper).st_mode
    kept = _without_set_id(mode, writer)
    if kept != mode:
        protect.must_change(fs, node)
        fs.upper.chmod(node.upper, stat.S_IMODE(kept))
        node.mode = kept


def release(fs: OverlayFs, handle: Handle) -> None:
    """Close an open file. Closing the last handle of an unlinked file frees its data."""
    node = handle.node
    if node.dead and handle.file.fileno() >= 0 and handle.file.stat().st_blocks * 512 > _CUT_FROM:
        fs.upper.later(handle.close)
    else:
        handle.close()
    if node.handles is not None:
        del node.handles[handle]
        if not node.handles:
            node.handles = None
            fs.release(node)
