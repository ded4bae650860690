"""Readdir: the names of a merged directory, each once (the kernel's readdir.c)."""

from __future__ import annotations

import errno
import stat

from cowfs.layers.base import Key, LowerLayer
from cowfs.overlay.node import Node
from cowfs.overlay.state import State, error, is_whiteout
from cowfs.types import DirEntry


def readdir(fs: State, node: Node) -> list[DirEntry]:
    """List a directory without ``.`` and ``..``: the upper's names first, then the unseen lower ones."""
    if node.dead:
        return []
    if node.children is None:
        raise error(errno.ENOTDIR, node.name)
    sources: list[tuple[LowerLayer, Key]] = []
    if node.upper is not None:
        sources.append((fs.upper, node.upper))
    sources.extend((fs.lowers[layer], key) for layer, key in node.lowers)
    if len(sources) == 1:
        layer, key = sources[0]
        return [entry for entry in layer.readdir(key) if entry.type or not _hides(layer, key, entry)]
    seen: set[bytes] = set()
    entries = []
    for layer, key in sources:
        for entry in layer.readdir(key):
            if entry.name in seen:
                continue
            seen.add(entry.name)
            if entry.type and not stat.S_ISCHR(entry.type):
                entries.append(entry)
            elif not _hides(layer, key, entry):
                entries.append(entry)
    return entries


def names(fs: State, node: Node) -> list[bytes]:
    """List the names that a directory may show: a lookup of each tells which ones are whiteouts."""
    if node.dead:
        return []
    if node.children is None:
        raise error(errno.ENOTDIR, node.name)
    listed = fs.upper.names(node.upper) if node.upper is not None else []
    for layer, key in node.lowers:
        below = fs.lowers[layer].names(key)
        if listed:
            seen = set(listed)
            listed.extend(name for name in below if name not in seen)
        else:
            listed = below
    return listed


def is_empty(fs: State, node: Node) -> bool:
    """Whether a directory shows no names."""
    return not readdir(fs, node)


def _hides(layer: LowerLayer, key: Key, entry: DirEntry) -> bool:
    found = layer.lookup(key, entry.name)
    return found is None or is_whiteout(found[1])
