"""Show layers whose whiteouts are names (aufs, OCI images) as layers of overlayfs.

``.wh.NAME`` beside a name hides it in the layers below; ``.wh..wh..opq`` in a directory hides everything
below that directory. Other names that begin with ``.wh..wh.`` belong to aufs, and cannot be looked up.

The union sees a character device 0:0 under NAME, and the attribute ``opaque`` on the directory. So
:mod:`cowfs.overlay.stack` needs no rule for named whiteouts, and other stacks have no extra cost.
The sources are whout.c and opts.c of aufs, and layer.md of the OCI image specification.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterable, Iterator

from cowfs.errors import os_error
from cowfs.layers.base import Key, LowerLayer, NamesJob
from cowfs.overlay.wrapped import WrappedLayer
from cowfs.overlay.xattr_format import OPAQUE, TRUSTED, USER, XattrFormat
from cowfs.types import Attr, AttrData, DirEntry, FileHandle

PREFIX = b".wh."
META = b".wh..wh."
OPAQUE_NAME = b".wh..wh..opq"
BRANCH_NAMES = (b".wh..wh.aufs", b".wh..wh.plnk", b".wh..wh.orph")
"""Names that aufs creates at the root of a writable branch."""
STYLES = ("overlayfs", "aufs", "oci")
"""How the whiteouts of a layer may be written."""
_OPAQUE_MARKS = frozenset({TRUSTED + b"opaque", USER + b"opaque", b"user.fuseoverlayfs.opaque"})
"""Attributes by which overlayfs and fuse-overlayfs mark opaque directories in a container's layers."""
XATTRS = {"userxattr": USER, "trustedxattr": TRUSTED}
"""More styles: whiteouts as overlayfs writes them, with attributes of this prefix whatever the union uses."""


class Whiteout:
    """The key of a whiteout. It is not an inode, so nothing has to be released."""

    __slots__ = ("attr",)

    def __init__(self, attr: Attr) -> None:
        self.attr = AttrData(
            stat.S_IFCHR,
            attr.st_ino,
            st_dev=attr.st_dev,
            st_uid=attr.st_uid,
            st_gid=attr.st_gid,
            st_blocks=attr.st_blocks,
            st_mtime_ns=attr.st_mtime_ns,
            st_ctime_ns=attr.st_ctime_ns,
        )


class Reworded(WrappedLayer):
    """The layer *inner*, with its marks for whiteouts and the like translated to the union's."""

    def __init__(self, inner: LowerLayer) -> None:
        super().__init__(inner)
        self.format = XattrFormat(TRUSTED)
        """The attributes that the union uses (:func:`use_format`)."""


class NamedWhiteouts(Reworded):
    """The layer *inner* as one with the whiteouts of overlayfs.

    Its keys are those of *inner*, and :class:`Whiteout`.

    *style* is ``aufs`` or ``oci``. They differ if a layer has both NAME and ``.wh.NAME``: for aufs, the name
    is deleted; for OCI images, the whiteout hides the name only in the layers below.
    """

    def __init__(self, inner: LowerLayer, style: str) -> None:
        super().__init__(inner)
        self.style = style
        self._alone: set[Key] = set()
        """Directories of OCI layers, by keys in use, that have a whiteout of their own name beside them."""

    # --- names

    def lookup(self, directory: Key, name: bytes) -> tuple[Key, Attr] | None:
        if name.startswith(PREFIX):
            return None
        if self.style == "aufs":
            return self._whiteout(directory, name) or self._lookup(directory, name)
        found = self._lookup(directory, name)
        if found is None:
            return self._whiteout(directory, name)
        if stat.S_ISDIR(found[1].st_mode) and self._whiteout(directory, name) is not None:
            self._alone.add(found[0])
        return found

    def _lookup(self, directory: Key, name: bytes) -> tuple[Key, Attr] | None:
        return self.inner.lookup(directory, name)

    def _whiteout(self, directory: Key, name: bytes) -> tuple[Whiteout, Attr] | None:
        try:
            found = self._lookup(directory, PREFIX + name)
        except OSError as failure:
            if failure.errno != errno.ENAMETOOLONG:
                raise
            return None
        if found is None:
            return None
        self.inner.forget(found[0])
        key = Whiteout(found[1])
        return key, key.attr

    def readdir(self, directory: Key) -> list[DirEntry]:
        entries = self.inner.readdir(directory)
        shown = {entry.name: entry for entry in entries if not entry.name.startswith(PREFIX)}
        if len(shown) == len(entries):
            return entries
        for name in _hidden(entry.name for entry in entries):
            if self.style == "aufs" or name not in shown:
                shown[name] = DirEntry(name, stat.S_IFCHR)
        return list(shown.values())

    def pieces(self, directory: Key) -> Iterator[list[DirEntry]]:
        yield self.readdir(directory)

    def names(self, directory: Key) -> list[bytes] | NamesJob:
        names = self.inner.names(directory)
        return (lambda: _seen(names())) if callable(names) else _seen(names)

    # --- inodes

    def stat(self, key: Key) -> Attr:
        if isinstance(key, Whiteout):
            return key.attr
        return self.inner.stat(key)

    def listxattr(self, key: Key) -> list[bytes]:
        if isinstance(key, Whiteout):
            return []
        names = [name for name in self.inner.listxattr(key) if not self._is_mark(name)]
        if self.is_opaque(key):
            names.append(self.format.opaque)
        return names

    def getxattr(self, key: Key, name: bytes) -> bytes:
        if not self._is_mark(name):
            return self.inner.getxattr(key, name)
        if name == self.format.opaque and not isinstance(key, Whiteout) and self.is_opaque(key):
            return OPAQUE
        raise os_error(errno.ENODATA)

    def is_opaque(self, key: Key) -> bool:
        """Whether an inode is a directory that hides everything below it."""
        if not stat.S_ISDIR(self.inner.stat(key).st_mode):
            return False
        if key in self._alone or (self.style == "oci" and self._has_opaque_mark(key)):
            return True
        found = self._lookup(key, OPAQUE_NAME)
        if found is not None:
            self.inner.forget(found[0])
        return found is not None

    def _is_mark(self, name: bytes) -> bool:
        """Whether an attribute does not belong to the inode, but concerns the layers below."""
        return name in self.format.notes or (self.style == "oci" and name in _OPAQUE_MARKS)

    def _has_opaque_mark(self, key: Key) -> bool:
        marks = _OPAQUE_MARKS.intersection(self.inner.listxattr(key))
        return any(self.inner.getxattr(key, mark) == OPAQUE for mark in marks)

    def handle(self, key: Key) -> FileHandle | None:
        if isinstance(key, Whiteout):
            return None
        return self.inner.handle(key)

    def forget(self, key: Key) -> None:
        if isinstance(key, Whiteout):
            return
        self._alone.discard(key)
        self.inner.forget(key)


class OtherXattrs(Reworded):
    """The layer *inner*, with the *prefix* of its overlayfs attributes translated to the union's.

    The prefix is ``user.overlay.`` if a user's overlayfs wrote the layer (its option *userxattr*).
    """

    def __init__(self, inner: LowerLayer, prefix: bytes) -> None:
        super().__init__(inner)
        self.lookup = inner.lookup
        self.readdir = inner.readdir
        self.pieces = inner.pieces
        self.names = inner.names
        self.stat = inner.stat
        self.handle = inner.handle
        self.forget = inner.forget
        self._own = XattrFormat(prefix)

    def listxattr(self, key: Key) -> list[bytes]:
        return [self._to_union(name) for name in self.inner.listxattr(key)]

    def getxattr(self, key: Key, name: bytes) -> bytes:
        return self.inner.getxattr(key, self._to_inner(name))

    def _to_union(self, name: bytes) -> bytes:
        """Return the union's name for an attribute of *inner*."""
        if self._own.is_own(name):
            return self.format.prefix + name[len(self._own.prefix) :]
        return self.format.stored(self._own.shown(name) or name)

    def _to_inner(self, name: bytes) -> bytes:
        """Return the name in *inner* for an attribute of the union."""
        if self.format.is_own(name):
            return self._own.prefix + name[len(self.format.prefix) :]
        return self._own.stored(self.format.shown(name) or name)


def reworded(layer: LowerLayer, style: str) -> LowerLayer:
    """Return *layer*, whose whiteouts are of this style, as one that the union understands."""
    if style == "overlayfs":
        return layer
    return OtherXattrs(layer, XATTRS[style]) if style in XATTRS else NamedWhiteouts(layer, style)


def hidden_by(name: bytes) -> bytes | None:
    """Return the name that the whiteout *name* hides; None if it is not a whiteout."""
    if not name.startswith(PREFIX) or name.startswith(META):
        return None
    hidden = name[len(PREFIX) :]
    return None if hidden in {b"", b".", b".."} else hidden


def _hidden(names: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the names that the whiteouts among these names hide."""
    for name in names:
        hidden = hidden_by(name)
        if hidden is not None:
            yield hidden


def _seen(names: list[bytes]) -> list[bytes]:
    """Return the visible names of a directory that lists *names*, and the names that it hides."""
    shown = [name for name in names if not name.startswith(PREFIX)]
    if len(shown) == len(names):
        return names
    known = set(shown)
    return [*shown, *(name for name in _hidden(names) if name not in known)]


def use_format(layer: LowerLayer | None, xattrs: XattrFormat) -> None:
    """Make a layer use these attributes, if its own differ."""
    while layer is not None and not isinstance(layer, Reworded):
        layer = getattr(layer, "inner", None)
    if layer is not None:
        layer.format = xattrs
