"""Link counts. A directory's is as on ext3: 2, plus one for each directory in it."""

from __future__ import annotations

import stat

from cowfs.layers.base import Key, LowerLayer
from cowfs.overlay.away import names_away
from cowfs.overlay.fs import OverlayFs
from cowfs.overlay.node import Node
from cowfs.overlay.stack import Merging
from cowfs.types import Attr, DirEntry

_UNKNOWN = 1
"""The link count of a directory on filesystems that do not count."""
_MOST = 64 << 10
"""A larger lower directory (st_size, in bytes) is not read for it."""


def nlink(fs: OverlayFs, node: Node, attr: Attr) -> int:
    """Return the link count of a node; *attr* is the result of :meth:`OverlayFs.stat`.

    For a merged directory, return 1 (not counted) if counting would take long.
    """
    if node.dead:
        return 0
    if node.children is None:
        names = names_of(node, attr)
        if names > 1 and node.indexed is None and node.upper is not None:
            names -= names_away(fs, node.upper)
        return names
    if not fs.options.counts_directories:
        return _UNKNOWN
    if len(node.lowers) + (node.upper is not None) <= 1:
        return attr.st_nlink
    below = fs.below.get(node, ...)
    if below is ...:
        try:
            below = _count_below(fs, node)
        except OSError:
            below = None
        fs.below[node] = below
    if below is None or attr.st_nlink <= _UNKNOWN:
        return _UNKNOWN
    return below + (2 if node.upper is None else attr.st_nlink)


def names_of(node: Node, attr: Attr) -> int:
    """Return the link count of an inode that is not a directory, including its names in the trash."""
    return attr.st_nlink if node.indexed is None else node.indexed


def _count_below(fs: OverlayFs, node: Node) -> int | None:
    """Return how many directories in a merged directory only the lowers have; None if unknown.

    The upper's own link count includes the others. :meth:`OverlayFs.covers` later updates the number.
    """
    lowers = [(fs.lowers[layer], key) for layer, key in node.lowers]
    if any(layer.waits for layer, _ in lowers):
        return None
    attrs = [layer.stat(key) for layer, key in lowers]
    if len(lowers) == 1 and attrs[0].st_nlink == 2:
        return 0
    if any(attr.st_size > _MOST or attr.st_nlink <= _UNKNOWN for attr in attrs):
        return None
    merging = Merging(fs.format)
    found: set[bytes] = set()
    for layer, key in lowers:
        for entry in layer.readdir(key):
            if merging.shows(layer, key, entry) and _is_directory(layer, key, entry):
                found.add(entry.name)
    if node.upper is None or not found:
        return len(found)
    names = fs.upper.names(node.upper)
    return None if callable(names) else len(found.difference(names))


def _is_directory(layer: LowerLayer, directory: Key, entry: DirEntry) -> bool:
    if entry.type:
        return stat.S_ISDIR(entry.type)
    there = layer.lookup(directory, entry.name)
    if there is None:
        return False
    layer.forget(there[0])
    return stat.S_ISDIR(there[1].st_mode)
