"""Compare two inodes in what users can see."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass

from cowfs.layers.base import File, Key, LowerLayer
from cowfs.layers.partial import Part, PartialFile, either
from cowfs.overlay.xattr_format import Notes, XattrFormat
from cowfs.types import Attr

_QUIETLY = os.O_RDONLY | os.O_NOATIME
_CHUNK = 1 << 20
_SECOND = 1_000_000_000
_NO_XATTRS = {errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES}


@dataclass(slots=True)
class Inode:
    """An inode of one layer, and where its data is if the layer does not have it."""

    layer: LowerLayer
    key: Key
    attr: Attr
    data: tuple[LowerLayer, Key] | None = None
    """For a metacopy: the layer and the inode with its data."""
    end: int | None = None
    """For a partial file: how many bytes come from *data* where the file itself has holes. None: all."""

    def open(self) -> File:
        """Open the data for reading. Blocks as the layers do; OSError."""
        layer, key = self.data or (self.layer, self.key)
        if self.end is None:
            return layer.open(key, _QUIETLY)
        source = layer.open(key, _QUIETLY)
        try:
            return PartialFile(Part(self.end, 1), self.layer.open(self.key, _QUIETLY), source)
        except BaseException:
            source.close()
            raise


def set_data(inode: Inode, notes: Notes, data: tuple[LowerLayer, Key], xattrs: XattrFormat) -> None:
    """Let a metacopy take its data, or the part that it lacks, from *data*. Blocks; OSError.

    Do nothing if *data* is no longer what a partial file was copied from: nobody can read that file.
    """
    note = xattrs.partial_of(notes)
    if note is None or note.is_of(data[0].stat(data[1])):
        inode.data = data
        inode.end = None if note is None else min(note.end, inode.attr.st_size)


def compare(
    new: Inode, old: Inode, xattrs: XattrFormat, *, directory_times: bool = False
) -> Generator[None, None, tuple[str, ...]]:
    """Return which of ``type content mode owner times xattrs target device`` differ.

    If the types differ, the result is only ``type``. Of the times, only the mtime is compared, and a
    directory's only with *directory_times*, because every new entry changes it. Inode numbers and link counts
    are not compared. Blocks, but yields before each MiB of content that it reads; OSError.
    """
    if stat.S_IFMT(new.attr.st_mode) != stat.S_IFMT(old.attr.st_mode):
        return ("type",)
    mode = new.attr.st_mode
    what = []
    if stat.S_ISREG(mode) and not (yield from _same_content(new, old)):
        what.append("content")
    if new.attr.st_mode != old.attr.st_mode and not stat.S_ISLNK(mode):
        what.append("mode")
    if (new.attr.st_uid, new.attr.st_gid) != (old.attr.st_uid, old.attr.st_gid):
        what.append("owner")
    if (directory_times or not stat.S_ISDIR(mode)) and not _same_time(
        new.attr.st_mtime_ns, old.attr.st_mtime_ns
    ):
        what.append("times")
    if shown_xattrs(new, xattrs) != shown_xattrs(old, xattrs):
        what.append("xattrs")
    if stat.S_ISLNK(mode) and new.layer.readlink(new.key) != old.layer.readlink(old.key):
        what.append("target")
    if (stat.S_ISCHR(mode) or stat.S_ISBLK(mode)) and new.attr.st_rdev != old.attr.st_rdev:
        what.append("device")
    return tuple(what)


def differing(new: Inode, old: Inode, xattrs: XattrFormat) -> tuple[bytes, ...]:
    """Return the names, as users see them, of the xattrs that differ or that only one inode has."""
    one, other = shown_xattrs(new, xattrs), shown_xattrs(old, xattrs)
    return tuple(sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name)))


def shown_xattrs(inode: Inode, xattrs: XattrFormat) -> dict[bytes, bytes]:
    """Return the xattrs under the names that users see; empty if the filesystem has none. Blocks; OSError."""
    values = {}
    for name in _names(inode):
        shown = xattrs.shown(name)
        try:
            if shown is not None:
                values[shown] = inode.layer.getxattr(inode.key, name)
        except OSError as error:
            if error.errno not in _NO_XATTRS:
                raise
    return values


def _names(inode: Inode) -> list[bytes]:
    try:
        return inode.layer.listxattr(inode.key)
    except OSError as error:
        if error.errno in _NO_XATTRS:
            return []
        raise


def _same_time(new: int, old: int) -> bool:
    """Compare two times. If one has whole seconds, ignore fractions: ext3 with small inodes stores none."""
    if new % _SECOND == 0 or old % _SECOND == 0:
        return new // _SECOND == old // _SECOND
    return new == old


def _same_content(new: Inode, old: Inode) -> Generator[None, None, bool]:
    if new.attr.st_size != old.attr.st_size:
        return False
    if not new.attr.st_size:
        return True
    new_layer, new_key = new.data or (new.layer, new.key)
    old_layer, old_key = old.data or (old.layer, old.key)
    is_same = False
    if new_layer.stat == old_layer.stat:  # the same layer, or two roots in one (FrozenLayer)
        one, two = new_layer.stat(new_key), old_layer.stat(old_key)
        if (one.st_dev, one.st_ino) == (two.st_dev, two.st_ino):
            if new.end is None:
                return True
            is_same = new.end >= new.attr.st_size
    try:
        old_file = old.open()
    except PermissionError:  # the user could write to the file, but cannot read the old one
        return False
    with closing(old_file), closing(new.open()) as new_file:
        size = new.attr.st_size
        written = new.layer.open(new.key, _QUIETLY) if is_same else None
        if written is not None:
            with closing(written):  # the rest is shared, so it need not be read
                return (yield from _same_bytes(new_file, old_file, written.segments(size)))
        runs = either(new_file.segments(size), old_file.segments(size))
        return (yield from _same_bytes(new_file, old_file, runs))


def _same_bytes(new: File, old: File, runs: Iterable[tuple[int, int]]) -> Generator[None, None, bool]:
    """Compare two files in the given runs of data. Outside them, both have holes."""
    for start, stop in runs:
        for position in range(start, stop, _CHUNK):
            yield
            length = min(_CHUNK, stop - position)
            if new.pread(length, position) != old.pread(length, position):
                return False
    return True
