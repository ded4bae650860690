"""Show several stacked uppers as one layer: the changes since a checkpoint that is not the last.

The result looks like an ordinary upper, with whiteouts, opaque directories, redirects and metacopies. These
describe how all the layers together change the layers below.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple, cast

from cowfs.changes.compare import Inode
from cowfs.changes.scan import GONE
from cowfs.errors import os_error
from cowfs.layers.base import File, Key, LowerLayer, NamesJob, UpperLayer
from cowfs.overlay.index import Index, open_index
from cowfs.overlay.stack import Found, Hit, Place, Stack, is_whiteout, notes_of
from cowfs.overlay.xattr_format import OPAQUE, XattrFormat, make_partial
from cowfs.types import Attr, AttrData, DirEntry, FileHandle, FsStats


@dataclass(slots=True, eq=False)
class _Composed:
    """An inode: where the layers have it, and its overlay attributes for all of them together."""

    places: tuple[Place, ...]
    attr: Attr
    notes: dict[bytes, bytes] = field(default_factory=dict)
    ends: bool = False
    """Whether the layers below have nothing for a directory: it or one above it is opaque."""


class Composite:
    """Layers that are merged, as one :class:`cowfs.layers.base.LowerLayer`. Blocks as they do."""

    generation: int | None = None
    waits = False
    has_descriptors = True
    data_only = False

    def __init__(
        self,
        layers: Sequence[LowerLayer],
        xattrs: XattrFormat,
        upper: Key | None = None,
        index: Key | None = None,
    ) -> None:
        """*layers* are topmost first. *upper* is the root of the first layer if it is an upper in use, and
        *index* its directory of hard links.
        """
        self._stack = stack = Stack(layers, xattrs, upper, is_part=True)
        self._format = xattrs
        self._index: Index | None = None if index is None else open_index(layers[0], index, xattrs)
        self.name = layers[0].name
        self.dev = layers[0].dev
        number, key = stack.roots[0]
        self.root = _Composed(stack.roots, stack.layers[number].stat(key))
        self.index = None if index is None else _Composed(((0, index),), layers[0].stat(index))
        self._own = {xattrs.opaque, xattrs.redirect, xattrs.metacopy, xattrs.partial}

    # --- names

    def lookup(self, directory: _Composed, name: bytes) -> tuple[_Composed, Attr] | None:
        if directory is self.index:
            return self._in_index(name)
        found = self._stack.look(directory.places, (name,))
        if not found.hits:
            return self._whiteout(directory, name) if found.further is None else None
        number, key, attr = found.hits[0]
        if stat.S_ISDIR(attr.st_mode):
            return self._directory(directory, found, name)
        if number > 0 and attr.st_nlink > 1 and self._index is not None:
            hit = self._index.find(self._stack.layers[number].handle(key))
            if hit is not None:
                return self._file([(0, *hit), *found.hits[-1:]], found, name, directory is self.root)
        return self._file(found.hits, found, name, directory is self.root)

    def _in_index(self, name: bytes) -> tuple[_Composed, Attr] | None:
        assert self.index is not None
        found = self._stack.layers[0].lookup(self.index.places[0][1], name)
        if found is None:
            return None
        return self._file([(0, *found)], Found([(0, *found)], is_complete=False), name, False)

    def _whiteout(self, directory: _Composed, name: bytes) -> tuple[_Composed, Attr] | None:
        for number, key in directory.places:
            layer = self._stack.layers[number]
            hit = layer.lookup(key, name)
            if hit is not None and is_whiteout(layer, *hit, self._format):
                device = AttrData(stat.S_IFCHR, hit[1].st_ino, st_dev=hit[1].st_dev)
                return _Composed(((number, hit[0]),), device), device
        return None

    def _directory(self, directory: _Composed, found: Found, name: bytes) -> tuple[_Composed, Attr]:
        notes = {}
        if found.further is None:
            ends = True
            notes[self._format.opaque] = OPAQUE
        else:
            redirect = self._redirect(found, name, directory is self.root)
            ends = directory.ends and not found.further[1]  # a redirect led to another of these layers
            if redirect is not None and not ends:
                notes[self._format.redirect] = redirect
        attr = found.hits[0][2]
        return _Composed(tuple((number, key) for number, key, _ in found.hits), attr, notes, ends), attr

    def _file(self, hits: list[Hit], found: Found, name: bytes, is_root: bool) -> tuple[_Composed, Attr]:
        number, key, attr = hits[0]
        layer = self._stack.layers[number]
        known = (notes_of(layer, key, self._format) or {}) if stat.S_ISREG(attr.st_mode) else {}
        if not self._format.is_metacopy(known, attr):
            return _Composed(((number, key),), attr), attr
        if found.is_complete and len(hits) > 1:
            return _Composed(((number, key), hits[-1][:2]), attr), attr
        notes = {name_: known[name_] for name_ in self._own if name_ in known}
        redirect = None if found.further is None else self._redirect(found, name, is_root)
        if redirect is not None:
            note = self._format.partial_of(known)
            if note is None:
                notes[self._format.redirect] = redirect
            else:
                path, _ = found.further or ((), True)
                notes[self._format.partial] = make_partial(note._replace(path=b"/" + b"/".join(path)))
        return _Composed(((number, key),), attr, notes), attr

    @staticmethod
    def _redirect(found: Found, name: bytes, is_root: bool) -> bytes | None:
        """Return the redirect to where the layers below have *name*; None if it is under its own name."""
        assert found.further is not None
        path, from_root = found.further
        if path == (name,) and (is_root or not from_root):
            return None
        return b"/" + b"/".join(path) if from_root else b"/".join(path)

    def readdir(self, directory: _Composed) -> list[DirEntry]:
        return [*chain.from_iterable(self.pieces(directory))]

    def pieces(self, directory: _Composed) -> Iterator[list[DirEntry]]:
        """Yield the entries, as many at a time as the layers do; other calls may come in between."""
        seen: set[bytes] = set()
        for number, key in directory.places:
            for some in self._stack.layers[number].pieces(key):
                fresh = [entry for entry in some if entry.name not in seen]
                seen.update(entry.name for entry in fresh)
                yield fresh

    def names(self, directory: _Composed) -> list[bytes] | NamesJob:
        return [entry.name for entry in self.readdir(directory)]

    # --- inodes

    def stat(self, key: _Composed) -> Attr:
        number, below = key.places[0]
        return key.attr if stat.S_ISCHR(key.attr.st_mode) else self._stack.layers[number].stat(below)

    def readlink(self, key: _Composed) -> bytes:
        layer, below = self._top(key)
        return layer.readlink(below)

    def listxattr(self, key: _Composed) -> list[bytes]:
        layer, below = self._top(key)
        return [*(name for name in layer.listxattr(below) if name not in self._own), *key.notes]

    def getxattr(self, key: _Composed, name: bytes) -> bytes:
        if name in key.notes:
            return key.notes[name]
        if name in self._own:
            raise os_error(errno.ENODATA)
        layer, below = self._top(key)
        return layer.getxattr(below, name)

    def open(self, key: _Composed, flags: int) -> File:
        layer, below = self._top(key)
        if len(key.places) == 1:
            return layer.open(below, flags)
        number, data = key.places[-1]
        note = self._format.partial_of(notes_of(layer, below, self._format) or {})
        end = None if note is None else min(note.end, key.attr.st_size)
        return Inode(layer, below, key.attr, (self._stack.layers[number], data), end).open()

    def handle(self, key: _Composed) -> FileHandle | None:
        layer, below = self._top(key)
        return layer.handle(below)

    def handle_ino(self, handle: FileHandle) -> int | None:
        return self._stack.layers[0].handle_ino(handle)

    def statfs(self) -> FsStats:
        return self._stack.layers[0].statfs()

    def forget(self, key: _Composed) -> None:
        if key is self.root or key is self.index:
            return
        for number, below in key.places:
            try:
                self._stack.layers[number].forget(below)
            except GONE:
                continue

    def close(self) -> None:
        """Do nothing: the caller that opened the layers closes them."""

    def _top(self, key: _Composed) -> tuple[LowerLayer, Key]:
        number, below = key.places[0]
        return self._stack.layers[number], below


class Above(NamedTuple):
    """The layers above some layer of a store, as one, to be compared with it."""

    layer: UpperLayer
    root: Key
    links: Key | None
    """The directory of hard links."""


def above(
    upper: tuple[UpperLayer, Key] | None,
    frozen: Sequence[LowerLayer],
    xattrs: XattrFormat,
    index: Key | None,
) -> Above:
    """Combine the upper, if there is one, and the *frozen* layers directly below it into one layer."""
    if upper is None:
        composite = Composite(frozen, xattrs)
    elif not frozen:
        return Above(*upper, index)
    else:
        composite = Composite([upper[0], *frozen], xattrs, upper[1], index)
    return Above(cast(UpperLayer, composite), composite.root, composite.index)
