"""Readdir: the names of a merged directory, each once (the kernel's readdir.c)."""

from __future__ import annotations

import errno
import stat
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from cowfs.errors import os_error
from cowfs.layers.base import Key, LowerLayer, NamesJob, QuickUpper
from cowfs.overlay.fs import OverlayFs, Steps, done_at_once
from cowfs.overlay.node import APART, Node
from cowfs.overlay.stack import Merging, hides
from cowfs.types import DirEntry


def readdir(fs: OverlayFs, node: Node) -> list[DirEntry]:
    """List a directory without ``.`` and ``..``: the upper's names first, then the lowers' other names."""
    if node.dead:
        return []
    if node.children is None:
        raise os_error(errno.ENOTDIR, node.name)
    sources: list[tuple[LowerLayer, Key]] = []
    if node.upper is not None:
        sources.append((fs.upper, node.upper))
    sources.extend((fs.lowers[layer], key) for layer, key in node.lowers)
    if len(sources) == 1:
        layer, key = sources[0]
        return [
            entry
            for entry in layer.readdir(key)
            if entry.type not in {0, stat.S_IFCHR} or not hides(layer, key, entry.name, fs.format)
        ]
    merging = Merging(fs.format)
    entries = []
    for layer, key in sources:
        entries += [entry for entry in layer.readdir(key) if merging.shows(layer, key, entry)]
    return entries


_OWN = 1 << 62
_HASH = (1 << 57) - 1
_TIES = 4


class Listing:
    """The names that a directory may show, each at a fixed place as long as the directory exists.

    A change of other names never changes a place, and a name that is created again gets its old place. So a
    listing can continue after any change, for any reader, from any place that a reader was given, and shows a
    name exactly once if it existed all the time. Names of lower layers come first, in the layers' own order,
    which does not change. Names that only the upper has follow, ordered by a hash of the name.
    """

    __slots__ = ("_below", "_own")

    def __init__(self, below: list[bytes], upper: list[bytes]) -> None:
        """*below* are the names of the lower layers, each once; *upper* are all names of the upper."""
        self._below = below
        if below and upper:
            known = _set_of(below)
            upper = [name for name in upper if name not in known]
        self._own = _in_order(upper) if upper else upper

    def __len__(self) -> int:
        return len(self._below) + len(self._own)

    def after(self, place: int) -> Iterator[tuple[int, bytes]]:
        """Yield the places and names after *place*. All places are above 0 and below 2 ** 63 - 2."""
        if place < _OWN:
            for number in range(place, len(self._below)):
                yield number + 1, self._below[number]
        if not self._own:
            return
        # Names with the same hash, which are rare, get consecutive places.
        first = place >> _TIES << _TIES
        before = first - 1
        for number in range(bisect_left(self._own, first, key=_place), len(self._own)):
            name = self._own[number]
            at = before = max(_place(name), before + 1)
            if at > place:
                yield at, name


def _set_of(names: list[bytes]) -> set[bytes]:
    """Return set(names), built in parts, since set() lets no other thread run until it is complete."""
    known: set[bytes] = set()
    for name in names:
        known.add(name)
    return known


def _in_order(names: list[bytes]) -> list[bytes]:
    """Sort names by their places, some hundreds at a time, because sort() lets no other thread run."""
    count = len(names) // 500 + 1
    parts: list[list[tuple[int, bytes]]] = [[] for _ in range(count)]
    for name in names:
        parts[(hash(name) & _HASH) * count // (_HASH + 1)].append((_place(name), name))
    ordered: list[bytes] = []
    for part in parts:
        part.sort()
        ordered += [name for _, name in part]
        part.clear()  # nor does freeing all of them at once
    return ordered


def _place(name: bytes) -> int:
    return _OWN | (hash(name) & _HASH) << _TIES


_MANY = 10_000
"""From this many names on a thread sorts them."""


def listing(fs: OverlayFs, node: Node) -> Listing | Callable[[], Listing]:
    """Return the names that a directory may show. A lookup of each name tells whether it is a whiteout.

    For a large directory, return a function that returns them. It blocks; any thread may call it.
    """
    if node.children is None:
        raise os_error(errno.ENOTDIR, node.name)
    if node.dead:
        return Listing([], [])
    lowers = [fs.lowers[layer].names(key) for layer, key in node.lowers]
    upper = fs.upper.names(node.upper) if node.upper is not None else []
    count = 0
    for names in (*lowers, upper):
        count += len(names) if isinstance(names, list) else _MANY
    return _listing(lowers, upper) if count < _MANY else lambda: _listing(lowers, upper)


def _listing(lowers: Sequence[list[bytes] | NamesJob], upper: list[bytes] | NamesJob) -> Listing:
    below: list[bytes] = []
    for part in lowers:
        names = part() if callable(part) else part
        if below:
            known = _set_of(below)
            below += [name for name in names if name not in known]
        else:
            below = names
    return Listing(below, upper() if callable(upper) else upper)


def plain_nodes(fs: OverlayFs, upper: QuickUpper, parent: Node, names: Sequence[bytes]) -> list[Node]:
    """Return the nodes of the first *names* in a directory that only the upper has, without their attributes.

    The list ends before the first name that does not exist, or that needs more than most: look that up.
    """
    if parent.upper is None or parent.below != () or parent.dead or fs.companions is not None:
        return []
    found: list[Node] = []
    for name, (key, mode, generation) in zip(names, upper.plain(parent.upper, names), strict=False):
        node = fs.nodes.child(parent, name)
        if node is None:
            ino = fs.ino_of_real(0, upper.dev, key)
            if not mode or fs.nodes.get(ino) is not None:
                break
            node = Node(ino, mode, parent, name, key, (), fs.generation_from(ino, generation))
            node.protection = 0
            fs.nodes.add(node)
        elif not mode or node.upper != key or node.metacopy or node.ino & APART:
            break
        found.append(node)
    return found


class Seen(NamedTuple):
    """The result of looking through a directory."""

    node: Node
    added: int
    empty: bool
    """Whether it shows no names."""
    bare: bool
    """Whether the upper has no whiteouts in it either."""

    def holds(self) -> bool:
        """Whether the result is still valid. A directory that was not empty may have become empty."""
        return self.added == self.node.added or not self.empty


def look_through(fs: OverlayFs, node: Node) -> Steps[Seen]:
    """Find out whether a directory is empty."""
    if node.children is None:
        raise os_error(errno.ENOTDIR, node.name)
    added, bare = node.added, True
    sources: list[tuple[LowerLayer, Key]] = []
    if node.upper is not None and not node.dead:
        sources.append((fs.upper, node.upper))
    if not node.dead:
        sources.extend((fs.lowers[layer], key) for layer, key in node.lowers)
    merging = Merging(fs.format)
    for layer, key in sources:
        names = layer.names(key)
        for name in (yield names) if callable(names) else names:
            yield None
            bare = bare and layer is not fs.upper
            if merging.shows(layer, key, DirEntry(name, 0)):
                return Seen(node, added, empty=False, bare=bare)
    return Seen(node, added, empty=True, bare=bare)


def see(fs: OverlayFs, node: Node, seen: Seen | None = None) -> Seen:
    """Look through a directory. Return *seen* instead if it is of this directory and still valid."""
    if seen is not None and seen.node is node and seen.holds():
        return seen
    return done_at_once(look_through(fs, node))
