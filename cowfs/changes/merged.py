"""Read the merged tree of some layers by path."""

from __future__ import annotations

import functools
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain
from typing import cast

from cowfs.changes.compare import Inode, shown_xattrs
from cowfs.changes.links import find_aliases
from cowfs.changes.lowers import Lower, LowerView
from cowfs.changes.paths import join
from cowfs.changes.scan import readdir
from cowfs.changes.version import Node, Version
from cowfs.layers.base import File, Key, LowerLayer, UpperLayer
from cowfs.layers.frozen import FrozenLayer
from cowfs.overlay.index import Index
from cowfs.overlay.stack import Stack, notes_of
from cowfs.overlay.xattr_format import is_whiteout_device
from cowfs.types import Attr

_PIECE = 1 << 20


class Merged:
    """Looks up paths (from the root, without a leading slash) in merged layers. Blocks as the layers do."""

    def __init__(self, stack: Stack, index: Index | None = None) -> None:
        self._view = LowerView(stack)
        self._stack = stack
        self._index = index
        self._way: list[tuple[bytes, Lower]] = []
        """The directories down to the last one looked up. Callers mostly ask for paths in order."""

    @property
    def layers(self) -> Sequence[LowerLayer]:
        """The merged layers, topmost first."""
        return self._stack.layers

    def version(self, path: bytes) -> Version | None:
        """Return the version of the file at *path*; None if there is none."""
        inode = self._inode(path)
        return None if inode is None else Version(inode.attr, functools.partial(_read, inode))

    def node(self, path: bytes) -> Node | None:
        """Return the node at *path*, with everything known about it; None if there is none."""
        inode = self._inode(path)
        if inode is None:
            return None
        number = self._view.layers.index(inode.layer)
        return Node(
            inode.attr,
            (number, inode.attr.st_dev, inode.attr.st_ino),
            functools.partial(shown_xattrs, inode, self._stack.format),
            functools.partial(inode.layer.readlink, inode.key),
            inode.open,
        )

    def names(self, path: bytes) -> set[bytes]:
        """Return the names in the directory at *path*; none if it is not a directory."""
        found = self._directory(path)
        return set() if found is None else self._view.names(found)

    def files(self, path: bytes) -> Iterator[bytes]:
        """Yield the paths of everything below the directory at *path*, except directories."""
        waiting = [path]
        while waiting:
            path = waiting.pop()
            found = self._view.resolve(path)
            if found is None:
                continue
            if not found.is_dir:
                yield path
                self._view.forget(found)
                continue
            waiting += [join(path, name) for name in sorted(self._view.names(found), reverse=True)]
            self._view.forget(found)

    def others(self, wanted: Iterable[tuple[int, int, int]]) -> Iterator[bytes]:
        """Yield all paths of those of these inodes (:attr:`Node.identity`) that are in the store."""
        layers: dict[int, set[tuple[int, int]]] = {}
        for number, dev, ino in wanted:
            if self._is_of_store(number):
                layers.setdefault(number, set()).add((dev, ino))
        for number, inodes in layers.items():
            for path in chain(self._paths_in(number, inodes), self._untouched() if not number else ()):
                node = self.node(path)
                if node is not None and node.identity[0] == number and node.identity[1:] in inodes:
                    yield path

    def _untouched(self) -> Iterator[bytes]:
        """Yield the names, in the lowers, of the indexed inodes: names without an entry in the upper."""
        if self._index is None:
            return
        lowers = LowerView(Stack(self._view.layers[1:], self._stack.format))
        upper, root = cast(UpperLayer, self._index.upper), self._stack.root_of[0]
        search = find_aliases(upper, root, self._index.directory, lowers)
        try:
            while True:
                next(search)
        except StopIteration as done:
            yield from done.value.keys

    def _paths_in(self, number: int, inodes: set[tuple[int, int]]) -> Iterator[bytes]:
        layer, root = self._view.layers[number], self._stack.root_of[number]
        waiting = [(b"", root)]
        while waiting:
            base, directory = waiting.pop()
            for entry in readdir(layer, directory):
                hit = layer.lookup(directory, entry.name)
                if hit is None:
                    continue
                key, attr = hit
                if stat.S_ISDIR(attr.st_mode):
                    waiting.append((join(base, entry.name), key))
                    continue
                layer.forget(key)
                if (attr.st_dev, attr.st_ino) in inodes:
                    yield join(base, entry.name)
            if directory is not root:
                layer.forget(directory)

    def _is_of_store(self, number: int) -> bool:
        """Whether a layer is the upper, or a checkpoint, which was the upper once."""
        return (self._stack.has_upper and not number) or isinstance(self._view.layers[number], FrozenLayer)

    # --- looking up

    def _directory(self, path: bytes) -> Lower | None:
        """Return the directory at *path*; None if it is not one. Its key stays valid until later calls."""
        while self._way and self._way[-1][0] and not _is_above(self._way[-1][0], path):
            self._view.forget(self._way.pop()[1])
        if not self._way:
            root = self._view.root()
            if root is None:
                return None
            self._way.append((b"", root))
        here, directory = self._way[-1]
        rest = path[len(here) :].strip(b"/")
        for name in rest.split(b"/") if rest else ():
            found = self._view.lookup(directory, name)
            if found is None or not found.is_dir:
                if found is not None:
                    self._view.forget(found)
                return None
            here, directory = join(here, name), found
            self._way.append((here, directory))
        return directory

    def _inode(self, path: bytes) -> Inode | None:
        found: Lower | None
        if path:
            parent, _, name = path.rpartition(b"/")
            directory = self._directory(parent)
            found = None if directory is None else self._view.lookup(directory, name)
        else:
            found = self._view.root()
        if found is None:
            return None
        number, key = found.places[0]
        inode = Inode(self._view.layers[number], key, found.attr)
        if found.is_dir:
            return inode
        hit = self._indexed(number, inode)
        if hit is not None:
            inode, number = Inode(self._view.layers[0], *hit), 0
        if stat.S_ISREG(found.attr.st_mode):
            if hit is not None or len(found.places) > 1:
                data_number, data_key = found.places[-1]
                self._give_data(inode, (self._view.layers[data_number], data_key))
            if not inode.attr.st_size and self._is_of_store(number):
                notes = self._stack.notes(number, inode.key) or {}
                inode.attr = self._stack.format.seen(notes, inode.attr)
        return inode

    def _indexed(self, number: int, inode: Inode) -> tuple[Key, Attr] | None:
        """Return the upper inode if another name of the lower inode was copied up; else None."""
        if self._index is None or not number or inode.attr.st_nlink < 2:
            return None
        hit = self._index.find(inode.layer.handle(inode.key))
        if hit is None or stat.S_IFMT(hit[1].st_mode) != stat.S_IFMT(inode.attr.st_mode):
            return None  # a whiteout: none of its names is left in the upper
        return None if is_whiteout_device(hit[1]) else hit

    def _give_data(self, inode: Inode, data: tuple[LowerLayer, Key]) -> None:
        """Give a metacopy its data from below: all of it, or the part that it lacks."""
        xattrs = self._stack.format
        notes = notes_of(inode.layer, inode.key, xattrs) or {}
        if xattrs.is_metacopy(notes, inode.attr):
            note = xattrs.partial_of(notes)
            inode.data = data
            inode.end = None if note is None else min(note.end, inode.attr.st_size)


def _is_above(directory: bytes, path: bytes) -> bool:
    """Whether *path* is the directory or below it."""
    return path == directory or path.startswith(directory + b"/")


def _read(inode: Inode) -> bytes:
    if stat.S_ISLNK(inode.attr.st_mode):
        return inode.layer.readlink(inode.key)
    if not stat.S_ISREG(inode.attr.st_mode):
        return b""
    with closing(inode.open()) as file:
        return b"".join(_pieces(file, inode.attr.st_size))


def _pieces(file: File, size: int) -> Iterator[bytes]:
    position = 0
    while position < size:
        piece = file.pread(min(_PIECE, size - position), position)
        if not piece:
            return
        yield piece
        position += len(piece)
