"""Partial files: find them at the next mount, and copy up their missing data in the background."""

from __future__ import annotations

import errno
import logging
import os
import stat
from contextlib import suppress

from cowfs.errors import os_error
from cowfs.layers.partial import PartialFile
from cowfs.overlay import lookup, partial
from cowfs.overlay.fs import OverlayFs, Pending
from cowfs.overlay.xattr_format import names_of_redirect, parse_partial

log = logging.getLogger(__name__)

_SPARE = 64 << 20
"""This many bytes, but at most a sixteenth, stay free: background work never takes the last."""
_NO_MORE = {errno.ENODATA, errno.ESTALE, errno.ENOENT, errno.EINVAL, errno.EOPNOTSUPP}


def resume(fs: OverlayFs) -> None:
    """Find the partial files that an earlier mount left."""
    if fs.notebook is None or not fs.fill_unit:
        return
    for ino in partial.listed(fs.upper, fs.notebook, fs.format.partial):
        key = fs.upper.numbered(ino)
        try:
            fs.upper.getxattr(key, fs.format.metacopy)
            note = parse_partial(fs.upper.getxattr(key, fs.format.partial))
            attr = fs.upper.stat(key)
            if not stat.S_ISREG(attr.st_mode):
                raise os_error(errno.EINVAL)
            fs.pending[ino] = Pending(key, partial.part_of(fs, key, note, attr), note.path)
        except OSError as failure:
            if failure.errno in _NO_MORE:
                partial.drop(fs, key, ino)
            else:
                log.warning("inode %d of the store: %s", ino, failure.strerror)


def missing(fs: OverlayFs) -> tuple[int, int]:
    """Return how many files are partial, and about how many of their bytes are only in the lower."""
    size = 0
    for pending in fs.pending.values():
        with suppress(OSError):
            size += max(pending.part.end - fs.upper.stat(pending.key).st_blocks * 512, 0)
    return len(fs.pending), size


def has_room(fs: OverlayFs, file: PartialFile) -> bool:
    """Whether the rest of a file can be copied up and leave some space for others."""
    room = fs.upper.statfs()
    need = file.missing()
    spare = min(_SPARE, room.blocks * room.frsize // 16)
    return room.bavail * room.frsize >= need + need // 512 + spare


def open_rest(fs: OverlayFs, pending: Pending) -> PartialFile:
    """Open a partial file to copy the rest. EIO if its lower has changed; EAGAIN to try again later."""
    found = lookup.find_below(fs, names_of_redirect(pending.path))
    if found is None:
        raise os_error(errno.EIO, pending.path)
    layer, low, attr = found
    if fs.lowers[layer].waits:
        raise os_error(errno.EAGAIN, pending.path)
    note = parse_partial(fs.upper.getxattr(pending.key, fs.format.partial))
    partial.must_be_the_same(note, attr)
    source = fs.lowers[layer].open(low, os.O_RDONLY)
    fs.lowers[layer].forget(low)
    try:
        return PartialFile(pending.part, fs.upper.open(pending.key, os.O_RDWR), source)
    except BaseException:
        source.close()
        raise


def complete(fs: OverlayFs, pending: Pending) -> None:
    """Make a partial file an ordinary file, now that all its data is in the upper."""
    partial.finish(fs, pending.key, pending.part, pending.node)
    log.info("%r is now fully copied up", pending.path)
