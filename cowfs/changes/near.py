"""Find out what must be read to list the changes at some paths: only what is there, or the whole upper.

If the upper hides something that the lowers have there, only a scan of the whole upper
(:func:`cowfs.changes.scan.renamed`) tells whether that was deleted or renamed. It hides names of the lowers
with a whiteout, an opaque directory, a redirect, or a file that is not a copy of the lower's.
"""

from __future__ import annotations

import stat
from collections.abc import Generator, Iterable
from enum import IntEnum

from cowfs.changes.lowers import Lower, LowerView
from cowfs.changes.paths import is_below
from cowfs.changes.scan import GONE, entries
from cowfs.layers.base import Key, UpperLayer
from cowfs.overlay.index import came_from
from cowfs.overlay.stack import is_whiteout, notes_of
from cowfs.overlay.xattr_format import make_origin
from cowfs.types import Attr


class Needs(IntEnum):
    """What must be read to list the changes at a path."""

    NOTHING_ELSE = 0
    RENAMES = 1
    """All renames: something that the lowers have there is hidden."""
    EVERYTHING = 2
    """A directory above it is not the one that the lowers have under that path."""


def outermost(paths: Iterable[bytes]) -> frozenset[bytes]:
    """Return the paths that are not below another of them; none if the root is one of them."""
    wanted = frozenset(paths)
    if b"" in wanted:
        return frozenset()
    return frozenset(path for path in wanted if not is_below(path, wanted))


def ways_to(paths: Iterable[bytes]) -> dict[bytes, set[bytes]]:
    """Return the directories above *paths*, each with the names in it that lead to one of them."""
    ways: dict[bytes, set[bytes]] = {}
    for path in paths:
        while path:
            directory, _, name = path.rpartition(b"/")
            ways.setdefault(directory, set()).add(name)
            path = directory
    return ways


class Survey:
    """Looks at paths in an upper and its lowers. Blocks as the layers do."""

    def __init__(self, upper: UpperLayer, root: Key, view: LowerView) -> None:
        self._upper = upper
        self._root = root
        self._view = view
        self._held: list[tuple[Key, Lower | None]] = []
        """Directories still to be released."""

    def needs(self, path: bytes, *, alone: bool = False) -> Generator[None, None, Needs]:
        """Return what must be read to list the changes at *path* and, unless it is wanted *alone*, below it.

        Yields before each inode, when the caller may do other work. OSError.
        """
        try:
            return (yield from self._needs(path.split(b"/"), alone))
        except GONE:
            return Needs.EVERYTHING
        finally:
            while self._held:
                self._leave(*self._held.pop())

    def _needs(self, names: list[bytes], alone: bool) -> Generator[None, None, Needs]:
        self._held.append((self._root, self._view.root()))
        for name in names[:-1]:
            yield
            above = len(self._held)
            keeps = self._look(*self._held[-1], name)
            if keeps is None:
                return Needs.NOTHING_ELSE
            if not keeps or len(self._held) == above:
                return Needs.EVERYTHING
        above = len(self._held)
        if (yield from self._hides(*self._held[-1], names[-1:])):
            return Needs.RENAMES
        while len(self._held) > above and not alone:
            directory = self._held.pop()
            try:
                if (yield from self._hides(*directory, (yield from self._names(*directory)))):
                    return Needs.RENAMES
            finally:
                self._leave(*directory)
        return Needs.NOTHING_ELSE

    def _hides(self, key: Key, base: Lower | None, names: list[bytes]) -> Generator[None, None, bool]:
        """Whether the upper may hide something of the lowers under one of the names in a directory."""
        for name in names:
            yield
            if self._look(key, base, name) is False:
                return True
        return False

    def _names(self, key: Key, base: Lower | None) -> Generator[None, None, list[bytes]]:
        """Return the names to look at in a directory: those of directories, if the lowers have nothing
        there."""
        names: list[bytes] = []
        for each in entries(self._upper, key):
            if each is None:
                yield
            elif base is not None or each.type in {0, stat.S_IFDIR}:
                names.append(each.name)
        return names

    def _look(self, key: Key, base: Lower | None, name: bytes) -> bool | None:
        """Return whether the upper surely hides nothing under a name in a directory; None if it has nothing
        there. A directory is then held."""
        hit = self._upper.lookup(key, name)
        if hit is None:
            return None
        self._held.append((hit[0], None if base is None else self._view.lookup(base, name)))
        keeps = self._keeps(*hit, self._held[-1][1])
        if not stat.S_ISDIR(hit[1].st_mode):
            self._leave(*self._held.pop())
        return keeps

    def _keeps(self, key: Key, attr: Attr, low: Lower | None) -> bool:
        """Whether an inode of the upper surely hides nothing of the lowers that may be elsewhere now."""
        upper, xattrs = self._upper, self._view.format
        if is_whiteout(upper, key, attr, xattrs):
            return low is None
        if stat.S_ISDIR(attr.st_mode):
            notes = notes_of(upper, key, xattrs) or {}
            if xattrs.is_opaque(notes):
                return low is None
            return xattrs.redirect not in notes and (low is None or low.is_dir)
        if low is None:
            return True
        if not stat.S_ISREG(low.attr.st_mode):
            return not low.is_dir  # only files and directories record where they were
        number, original = low.places[0]
        handle = self._view.layers[number].handle(original)
        if handle is None or not stat.S_ISREG(attr.st_mode):
            return False
        notes = notes_of(upper, key, xattrs) or {}
        return notes.get(xattrs.origin) == make_origin(handle) and came_from(upper, key, handle.place, xattrs)

    def _leave(self, key: Key, base: Lower | None) -> None:
        if key is not self._root:
            self._upper.forget(key)
        if base is not None:
            self._view.forget(base)
