"""Files that are copied up lazily: metacopies that already have some of their data (cowfs.layers.partial).

Until data is written to it, every overlayfs reads a metacopy correctly. Before the first write, the file
gets notes that cowfs understands, and that make the kernel's overlayfs refuse the file: otherwise, it would
show old data in place of new. An interruption at any point leaves a valid metacopy.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from contextlib import suppress

from cowfs.errors import os_error
from cowfs.layers.base import File, Key, LowerLayer
from cowfs.layers.partial import Part, PartialFile
from cowfs.layers.reopened import Reopens
from cowfs.overlay import redirect as redirects
from cowfs.overlay.fs import OverlayFs, Pending
from cowfs.overlay.node import Node
from cowfs.overlay.xattr_format import (
    METACOPY,
    PARTIAL_METACOPY,
    PARTIAL_REDIRECT,
    Partial,
    make_partial,
    parse_partial,
)
from cowfs.types import Attr

log = logging.getLogger(__name__)

_CAPABILITY = b"security.capability"
_LARGEST = (1 << 32) - 1
"""The largest number of an inode in an image."""
MOST = 64
"""How many files may be incomplete; the next one is copied up at once."""


# --- making one


def begin(fs: OverlayFs, node: Node) -> bool:
    """Make a metacopy a partial file if it is large and its lower is local; return whether it is one now."""
    if node.partial is not None:
        return bool(fs.fill_unit)
    if not node.metacopy or fs.notebook is None or len(fs.pending) >= MOST:
        return False
    attr = fs.stat(node)
    layer, low = node.lowers[-1]
    data = fs.lowers[layer].stat(low)
    if not may_be(fs, node, attr) or data.st_size != attr.st_size or _has_data(fs, node, attr):
        return False
    note = Partial(data.st_size, data.st_mtime_ns, redirects.of(node, same_directory=False))
    part = Part(note.end, fs.fill_unit)
    try:
        _list(fs, attr.st_ino)
        fs.note(node.upper, fs.format.partial, make_partial(note))
        fs.note(node.upper, fs.format.redirect, PARTIAL_REDIRECT)
        fs.note(node.upper, fs.format.metacopy, PARTIAL_METACOPY)
    except OSError:
        _undo(fs, node)
        return False
    fs.pending[attr.st_ino] = Pending(node.upper, part, note.path, node)
    node.partial, node.redirect = part, note.path
    fs.host.rest_soon()
    return True


def may_be(fs: OverlayFs, node: Node, attr: Attr) -> bool:
    """Whether a file may be copied up lazily. It is not in the upper, or there without its data."""
    return (
        bool(fs.fill_unit)
        and stat.S_ISREG(attr.st_mode)
        and attr.st_size >= fs.options.lazy_from
        and attr.st_nlink == 1
        and node.indexed is None
        and not fs.data_waits(node)
        and not fs.in_module(node)
    )


def _has_data(fs: OverlayFs, node: Node, attr: Attr) -> bool:
    """Whether a metacopy contains data: a copy-up was killed, and the data may be incomplete."""
    file = fs.upper.open(node.upper, os.O_RDONLY)
    try:
        return next(file.segments(attr.st_size), None) is not None
    finally:
        file.close()


def _undo(fs: OverlayFs, node: Node) -> None:
    """Make it a plain metacopy again; nothing was written to it."""
    with suppress(OSError):
        fs.note(node.upper, fs.format.metacopy, METACOPY)
        if node.redirect is None:
            _remove(fs, node.upper, fs.format.redirect)
        else:
            fs.note(node.upper, fs.format.redirect, node.redirect)
        _remove(fs, node.upper, fs.format.partial)


def _remove(fs: OverlayFs, key: Key, name: bytes) -> None:
    try:
        fs.upper.removexattr(key, name)
    except OSError as failure:
        if failure.errno != errno.ENODATA:
            raise


# --- finding one


def note_in(fs: OverlayFs, notes: dict[bytes, bytes]) -> Partial | None:
    """Return the partial note of a metacopy, None if it is not partial. EIO if the store's holes are not
    exact."""
    value = notes.get(fs.format.partial)
    if value is None:
        return None
    if not fs.options.has_exact_holes:
        log.error("a file is only partly in the store, and its record is gone: it cannot be read")
        raise os_error(errno.EIO)
    return parse_partial(value)


def must_be_the_same(note: Partial, attr: Attr) -> None:
    """EIO if the lower file changed since the copy-up began: the data of two files would be mixed."""
    if not note.is_of(attr):
        if note.path not in _told:
            _told.add(note.path)
            log.error("%r changed in its lower before it was fully copied up: it cannot be read", note.path)
        raise os_error(errno.EIO, note.path)


_told: set[bytes] = set()


def enter(fs: OverlayFs, node: Node, note: Partial, attr: Attr) -> None:
    """Make a node that was found the partial file that *note* describes. *attr* is that of the upper."""
    pending = fs.pending.get(attr.st_ino)
    if pending is None:
        pending = fs.pending[attr.st_ino] = Pending(
            node.upper, part_of(fs, node.upper, note, attr), note.path
        )
    pending.node = node
    node.partial = pending.part


def part_of(fs: OverlayFs, key: Key, note: Partial, attr: Attr) -> Part:
    """Return which part of the file comes from where. Completes a truncation that a crash interrupted."""
    end = min(note.end, attr.st_size)
    if end < note.end and fs.fill_unit:
        fs.note(key, fs.format.partial, make_partial(note._replace(end=end)))
    return Part(end, fs.fill_unit or 1)


def open_partial(fs: OverlayFs, node: Node, flags: int) -> PartialFile:
    """Open a partial file. *flags* are those of :meth:`UpperLayer.open`."""
    assert node.partial is not None
    layer, key = node.lowers[-1]
    source = fs.lowers[layer].open(key, os.O_RDONLY)
    try:
        return PartialFile(node.partial, fs.upper.open(node.upper, flags), source)
    except BaseException:
        source.close()
        raise


def open_data(fs: OverlayFs, node: Node, flags: int, *, frugal: bool = False) -> File:
    """Open a file that has its data, or a part of it, in the upper."""
    if node.partial is None:
        return open_in(fs.upper, node.upper, flags, frugal=frugal)
    if frugal and fs.upper.has_descriptors:
        raise os_error(errno.EMFILE, node.name)
    return open_partial(fs, node, flags)


def open_in(layer: LowerLayer, key: Key, flags: int, *, frugal: bool) -> File:
    """Open a file of a layer. With *frugal*, EMFILE if the open file needs a descriptor."""
    if not frugal or not layer.has_descriptors:
        return layer.open(key, flags)
    if not isinstance(layer, Reopens):
        raise os_error(errno.EMFILE)
    return layer.reopened(key, flags)


# --- its end


class Before:
    """Attributes of an upper file that writing removes or changes."""

    def __init__(self, fs: OverlayFs, key: Key) -> None:
        self._upper = fs.upper
        self._key = key
        self.attr = fs.upper.stat(key)
        self._capability: bytes | None = None
        with suppress(OSError):
            self._capability = fs.upper.getxattr(key, _CAPABILITY)

    def restore(self) -> None:
        """Restore them."""
        upper, key, before = self._upper, self._key, self.attr
        if self._capability is not None:
            upper.setxattr(key, _CAPABILITY, self._capability)
        if before.st_mode & (stat.S_ISUID | stat.S_ISGID):
            upper.chmod(key, before.st_mode)
        upper.utimens(key, before.st_atime_ns, before.st_mtime_ns)


class Rest:
    """Copies up the missing data of a partial file: see :class:`cowfs.overlay.copyup.CopyUp`.

    Meanwhile, others may read and write the file, but not change its size.
    """

    def __init__(self, fs: OverlayFs, node: Node, size: int | None) -> None:
        """*size* is the size that the file gets next, if it is smaller."""
        self._fs = fs
        self._node = node
        self._part = node.partial
        self._before = Before(fs, node.upper)
        now = self._before.attr.st_size
        self.size = now if size is None else min(size, now)
        self._is_cut = self.size < now
        self._file = open_partial(fs, node, os.O_RDWR)

    def run(self) -> None:
        """Copy the data. Blocks; any thread may call it."""
        for _ in self._file.copy_steps(self.size):
            pass
        if self._is_cut:
            self._file.cut(self.size)

    def commit(self) -> None:
        """Make the node an ordinary upper file."""
        self._file.close()
        if self._node.partial is self._part and self._part is not None:
            if not self._fs.fill_unit:
                self._before.restore()
            finish(self._fs, self._node.upper, self._part, self._node)

    def abort(self) -> None:
        """Keep the data that was copied."""
        self._file.close()


def finish(fs: OverlayFs, key: Key, part: Part, node: Node | None) -> None:
    """Make a file whose data is all copied up an ordinary file."""
    try:
        fs.upper.removexattr(key, fs.format.metacopy)  # without it, the other notes mean nothing
    except OSError:
        part.is_wrong = True
        raise
    part.is_whole = True
    if node is not None and node.partial is part:
        node.metacopy, node.partial, node.redirect = False, None, None
    drop(fs, key, fs.upper.stat(key).st_ino)


def drop(fs: OverlayFs, key: Key, ino: int) -> None:
    """Forget an inode that is no longer partial, and remove its notes."""
    with suppress(OSError):
        if fs.notes(fs.upper, key) and fs.upper.getxattr(key, fs.format.partial):
            for name in (
                fs.format.redirect,
                fs.format.partial,
            ):  # in this order: the first gives the second its meaning
                _remove(fs, key, name)
    _unlist(fs, ino)


def name_removed(fs: OverlayFs, node: Node) -> None:
    """Note that a node has lost its last name: only those who have it open still need its data."""
    if node.partial is not None:
        _unlist(fs, fs.upper.stat(node.upper).st_ino)


# --- the list of partial files, with which the next mount continues


def listed(upper: LowerLayer, notebook: Key, name: bytes) -> list[int]:
    """Return the inode numbers of the partial files of a store; some may be complete or reused by now."""
    try:
        value = upper.getxattr(notebook, name)
    except OSError:
        return []
    numbers = [
        int(word) for word in value.split() if word.isdigit() and len(word) < len(b"%d" % _LARGEST) + 1
    ]
    return [ino for ino in numbers if ino <= _LARGEST]


def _list(fs: OverlayFs, ino: int) -> None:
    known = listed(fs.upper, fs.notebook, fs.format.partial)
    if ino not in known:
        _write_list(fs, [*known, ino])


def _unlist(fs: OverlayFs, ino: int) -> None:
    """Remove a file from the list. An entry that stays does no harm."""
    fs.pending.pop(ino, None)
    if fs.notebook is None or not fs.fill_unit:
        return
    with suppress(OSError):
        known = listed(fs.upper, fs.notebook, fs.format.partial)
        if ino in known:
            known.remove(ino)
            _write_list(fs, known)


def _write_list(fs: OverlayFs, known: list[int]) -> None:
    if known:
        fs.note(fs.notebook, fs.format.partial, b" ".join(b"%d" % ino for ino in known))
    else:
        _remove(fs, fs.notebook, fs.format.partial)
