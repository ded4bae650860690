"""Scan the upper for renamed directories and files, and find their old paths."""

from __future__ import annotations

import errno
import stat
from collections.abc import Generator, Iterator
from contextlib import suppress

from cowfs.changes.paths import below, join
from cowfs.layers.base import Key, LowerLayer
from cowfs.overlay.stack import is_whiteout, notes_of
from cowfs.overlay.xattr_format import Notes, RedirectError, XattrFormat, leads_somewhere
from cowfs.types import Attr, DirEntry

GONE = (FileNotFoundError, NotADirectoryError)
"""Errors of a layer for an inode that was removed or replaced meanwhile: the tree may be in use."""


def readdir(layer: LowerLayer, directory: Key) -> list[DirEntry]:
    """Return the entries of a directory; none if it was removed meanwhile. Blocks; other OSErrors."""
    try:
        return layer.readdir(directory)
    except GONE:
        return []


def entries(layer: LowerLayer, directory: Key) -> Iterator[DirEntry | None]:
    """Yield the same entries one by one, and None after some of them: a caller's turn. If the directory was
    removed meanwhile, there are no more.
    """
    with suppress(*GONE):
        for some in layer.pieces(directory):
            yield from some
            yield None


def source_of(notes: Notes, attr: Attr, base: bytes, xattrs: XattrFormat) -> bytes | None:
    """Return the path in the lowers to which an upper inode's redirect leads; None if it has no redirect.

    For a directory, that is where its lower contents are; for a metacopy, its data. *base* is the path in the
    lowers of the directory that contains the inode. EINVAL for an invalid redirect.
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
    """Return the path in the lowers from which an upper inode was renamed; None if that is not recorded.

    It is recorded for directories, and for files that were renamed while their data was in a lower. The
    redirect of a file with several names does not tell which of them is new: for such a file, return None.
    EINVAL for an invalid redirect.
    """
    if not stat.S_ISDIR(attr.st_mode) and attr.st_nlink > 1:
        return None
    return source_of(notes, attr, base, xattrs)


def renamed(layer: LowerLayer, root: Key, xattrs: XattrFormat) -> Generator[None, None, dict[bytes, bytes]]:
    """Return the paths in the lowers of all renamed directories and files, each with its present path.

    A rename leaves a whiteout, or a new file, at the old path. Only the new path, which a walk may reach
    earlier or later, shows that the old one was not deleted. So this pass reads the whole upper first: for
    each inode one lookup and the xattrs. Only renamed inodes take memory. Blocks, but yields before each
    inode; OSError.
    """
    found = {}
    waiting: list[tuple[Key, bytes, bytes]] = [(root, b"", b"")]
    while waiting:
        directory, path, base = waiting.pop()
        for entry in entries(layer, directory):
            if entry is None:
                yield
                continue
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
            here = join(path, entry.name)
            if source is not None:
                found[source] = here
            if stat.S_ISDIR(attr.st_mode):
                waiting.append((key, here, join(base, entry.name) if source is None else source))
            else:
                layer.forget(key)
        if directory is not root:
            layer.forget(directory)
    return found
