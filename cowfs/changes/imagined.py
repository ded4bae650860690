"""Show what a rebase would make, as a layer, without writing anything."""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cowfs.changes.compare import Inode, shown_xattrs
from cowfs.errors import os_error
from cowfs.layers.base import File, Key, LowerLayer, NamesJob
from cowfs.overlay.xattr_format import METACOPY, OPAQUE, XattrFormat
from cowfs.types import Attr, AttrData, DirEntry, FileHandle, FsStats, own_attr


@dataclass(slots=True, eq=False)
class _Imagined:
    """An inode of the layer, or one that only exists in memory."""

    attr: Attr
    xattrs: dict[bytes, bytes] | None = None
    """None: the xattrs of *real*."""
    names: dict[bytes, _Imagined] | None = None
    """The entries, if it is a directory."""
    real: tuple[LowerLayer, Key] | None = None
    inode: Inode | None = None
    """The inode that it would be a copy of."""


class ImaginedUpper:
    """A :class:`cowfs.changes.rebase.Maker` that writes nothing, and a layer that shows its result.

    Blocks as the layer of the linked files does; OSError.
    """

    generation: int | None = None
    waits = False
    has_descriptors = True
    data_only = False
    dev = 0

    def __init__(self, layer: LowerLayer, root: Key, xattrs: XattrFormat) -> None:
        """The new root starts with the attributes of *root*, a directory of the layer."""
        self.name = layer.name
        self._layer = layer
        self._format = xattrs
        self.root: Key = _Imagined(layer.stat(root), None, {}, (layer, root))

    # --- what is made

    def directory(
        self, parent: Key, name: bytes, like: Inode, *, opaque: bool = False, redirect: bytes | None = None
    ) -> Key:
        made = _Imagined(like.attr, self._stored(like), {})
        assert made.xattrs is not None
        if opaque:
            made.xattrs[self._format.opaque] = OPAQUE
        if redirect is not None:
            made.xattrs[self._format.redirect] = redirect
        parent.names[name] = made
        return made

    def set_root_attributes(self, like: Inode) -> None:
        self.root.attr, self.root.xattrs = like.attr, self._stored(like)

    def date(self, directory: Key, attr: Attr) -> None:
        directory.attr = replace(own_attr(directory.attr), st_mtime_ns=attr.st_mtime_ns)

    def link(self, key: Key, parent: Key, name: bytes) -> None:
        real = key.places[0][1]
        parent.names[name] = _Imagined(self._layer.stat(real), real=(self._layer, real))

    def copy(self, inode: Inode, parent: Key, name: bytes) -> None:
        parent.names[name] = _Imagined(inode.attr, self._stored(inode), inode=inode)

    def metacopy(self, like: Inode, redirect: bytes, parent: Key, name: bytes) -> None:
        notes = {self._format.metacopy: METACOPY, self._format.redirect: redirect}
        parent.names[name] = _Imagined(like.attr, self._stored(like) | notes)

    def whiteout(self, parent: Key, name: bytes) -> None:
        parent.names[name] = _Imagined(AttrData(stat.S_IFCHR, 0), {})

    def rmdir(self, parent: Key, name: bytes) -> None:
        del parent.names[name]

    def _stored(self, like: Inode) -> dict[bytes, bytes]:
        return {self._format.stored(name): value for name, value in shown_xattrs(like, self._format).items()}

    # --- a layer

    def lookup(self, directory: Key, name: bytes) -> tuple[Key, Attr] | None:
        found = directory.names.get(name)
        return None if found is None else (found, found.attr)

    def stat(self, key: Key) -> Attr:
        attr: Attr = key.attr if key.real is None or key.names is not None else self._layer.stat(key.real[1])
        return attr

    def readdir(self, directory: Key) -> list[DirEntry]:
        return [DirEntry(name, stat.S_IFMT(one.attr.st_mode)) for name, one in directory.names.items()]

    def pieces(self, directory: Key) -> Iterator[list[DirEntry]]:
        yield self.readdir(directory)

    def names(self, directory: Key) -> list[bytes] | NamesJob:
        return list(directory.names)

    def readlink(self, key: Key) -> bytes:
        layer, real = self._place(key)
        return layer.readlink(real)

    def listxattr(self, key: Key) -> list[bytes]:
        if key.xattrs is not None:
            return list(key.xattrs)
        layer, real = self._place(key)
        return [name for name in layer.listxattr(real) if key.names is None or not self._format.is_own(name)]

    def getxattr(self, key: Key, name: bytes) -> bytes:
        if key.xattrs is not None:
            if name not in key.xattrs:
                raise os_error(errno.ENODATA)
            value: bytes = key.xattrs[name]
            return value
        layer, real = self._place(key)
        if key.names is not None and self._format.is_own(name):
            raise os_error(errno.ENODATA)
        return layer.getxattr(real, name)

    def open(self, key: Key, flags: int) -> File:
        if key.inode is not None:
            file: File = key.inode.open()
            return file
        layer, real = self._place(key)
        return layer.open(real, flags)

    def statfs(self) -> FsStats:
        return self._layer.statfs()

    def handle(self, key: Key) -> FileHandle | None:
        return None

    def handle_ino(self, handle: FileHandle) -> int | None:
        return None

    def forget(self, key: Key) -> None:
        """Do nothing: the garbage collector frees keys."""

    def close(self) -> None:
        """Do nothing: the caller that opened the layer closes it."""

    @staticmethod
    def _place(key: Key) -> tuple[LowerLayer, Key]:
        place: tuple[LowerLayer, Key] = key.real or (key.inode.layer, key.inode.key)
        return place
