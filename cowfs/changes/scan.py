"""A first look through the upper: which directories and files were renamed, and from where."""

from __future__ import annotations

import stat
from collections.abc import Generator

from cowfs.changes.marks import Marks, below, is_whiteout, join
from cowfs.layers.base import Key, LowerLayer
from cowfs.types import Attr, DirEntry

GONE = (FileNotFoundError, NotADirectoryError)
"""What a layer raises for an inode that was removed or replaced while we looked: the tree may be in use."""


def readdir(layer: LowerLayer, directory: Key) -> list[DirEntry]:
    """Return the entries of a directory, none if it was removed meanwhile."""
    try:
        return layer.readdir(directory)
    except GONE:
        return []


def rename_source(layer: LowerLayer, key: Key, attr: Attr, base: bytes, marks: Marks) -> bytes | None:
    """Return the path in the lowers that an upper inode says to come from, None when it says nothing.

    *base* is the path in the lowers of the directory that it stands in. A directory says so if it was
    renamed. A file does if it was renamed while its data was still below; but if it has more than one
    name, the note tells where its data is and not which of the names is a new one: then None.
    """
    if stat.S_ISDIR(attr.st_mode):
        if marks.opaque(layer, key):
            return None
    elif not stat.S_ISREG(attr.st_mode) or attr.st_nlink > 1 or not marks.metacopy(layer, key):
        return None
    redirect = marks.redirect(layer, key)
    return None if redirect is None else below(base, redirect)


def renamed(layer: LowerLayer, root: Key, marks: Marks) -> Generator[None, None, frozenset[bytes]]:
    """Return the paths in the lowers of all that was renamed. Reads the whole upper once.

    Blocks, but yields before each inode.

    What was renamed leaves a whiteout, or something new, at its old place. To know that it is not a
    deletion one must have seen the new place, which may come later or sooner: hence this pass. It
    needs one lookup and two xattrs an inode, and memory for the renamed ones alone.
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
                if hit is None or is_whiteout(hit[1]):
                    continue
                key, attr = hit
                source = rename_source(layer, key, attr, base, marks)
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
