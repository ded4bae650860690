"""Paths in a tree, and the words for file types."""

from __future__ import annotations

import stat
from collections.abc import Container

_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


def type_name(mode: int) -> str:
    """Return the word that :class:`cowfs.types.Change` uses for a file type."""
    return _TYPES.get(stat.S_IFMT(mode), "file")


def checked(path: bytes) -> bytes:
    """Return a path that another user's daemon has sent. ValueError if it is not one inside a tree.

    The empty path is the root of the tree.
    """
    if (path and not {b"", b".", b".."}.isdisjoint(path.split(b"/"))) or b"\0" in path:
        raise ValueError(path)
    return path


def below(base: bytes, redirect: bytes) -> bytes:
    """Return the path in the lowers that *redirect* means, for a child of the directory *base*."""
    return redirect[1:] if redirect.startswith(b"/") else join(base, redirect)


def join(directory: bytes, name: bytes) -> bytes:
    """Return the path of *name* in a directory; the root is the empty path."""
    return directory + b"/" + name if directory else name


def is_below(path: bytes, paths: Container[bytes], inside: bytes = b"") -> bool:
    """Whether one of *paths* is a directory above *path* and below the directory *inside*."""
    while b"/" in path:
        path = path.rpartition(b"/")[0]
        if len(path) <= len(inside):
            return False
        if path in paths:
            return True
    return False
