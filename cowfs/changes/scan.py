"""A first look through the upper: which directories and files were renamed, and from where."""

from __future__ import annotations

import errno
import stat
from collections.abc import Generator

from cowfs.changes.paths import below, join
from cowfs.layers.base import Key, LowerLayer
from cowfs.overlay.stack import is_whiteout, notes_of
from cowfs.overlay.xattr_format import Notes, RedirectError, XattrFormat, leads_somewhere
from cowfs.types import Attr, DirEntry

GONE = (FileNotFoundError, NotADirectoryError)
"""What a layer raises for an inode that was removed or replaced while we looked: the tree may be in use."""


def readdir(layer: LowerLayer, directory: Key) -> list[DirEntry]:
    """Return the entries of a directory; none if it was removed meanwhile."""
    try:
        return layer.readdir(directory)
    except GONE:
        return []


def source_of(notes: Notes, attr: Attr, base: bytes, xattrs: XattrFormat) -> bytes | None:
    """Return the path in the lowers where the directory, or the data, of an upper inode is; None: at its own.

    *base* is the path in the lowers of the directory that contains it. Raises EINVAL for an invalid redirect.
    """
    if stat.S_ISDIR(attr.st_mode):
        redirect = None if xattrs.is_opaque(notes) else xattrs.redirect_of(notes)
    elif xattrs.is_metacopy(notes, attr):
        redirect = xattrs.redirect_of(notes, is_upper=True)
    else:
        return None
    if redirect is None:
        return None
    if not leads_somewhere(redirect):
        raise RedirectError(errno.EINVAL, redirect)
    return below(base, redirect)


def rename_source(notes: Notes, attr: Attr, base: bytes, xattrs: XattrFormat) -> bytes | None:
    """Return the path in the lowers that an upper inode says it comes from; None if it says nothing.

    A renamed directory says so. A file says so if it was renamed while its data was still below. If a file
    has several names, the attribute says where its data is, but not which of the names is new: then None.
    """
    if not stat.S_ISDIR(attr.st_mode) and attr.st_nlink > 1:
        return None
    return source_of(notes, attr, base, xattrs)


def renamed(layer: LowerLayer, root: Key, xattrs: XattrFormat) -> Generator[None, None, frozenset[bytes]]:
    """Return the paths in the lowers of everything that was renamed.

    Reads the whole upper once. Blocks, but yields before each inode.

    What was renamed leaves a whiteout, or something new, at its old place. Only the new place shows that this
    is not a deletion, and it may come sooner or later: hence this pass. It needs one lookup and the xattrs of
    each inode, and memory only for the renamed ones.
    """
    sources = set()
    waiting: list[tuple[Key, bytes]] = [(root, b"")]
    while waiting:
        directory, base = waiting.pop()
        for entry in readdir(layer, directory):
            if entry.type not in {0, stat.S_IFREG, stat.S_IFDIR}:
                continue
            yield
            try:
                hit = layer.lookup(directory, entry.name)
                if hit is None or is_whiteout(layer, *hit, xattrs):
                    continue
                key, attr = hit
                source = rename_source(notes_of(layer, key, xattrs) or {}, attr, base, xattrs)
            except GONE:
                continue
            if source is not None:
                sources.add(source)
            if stat.S_ISDIR(attr.st_mode):
                waiting.append((key, join(base, entry.name) if source is None else source))
            else:
                layer.forget(key)
        if directory is not root:
            layer.forget(directory)
    return frozenset(sources)
