"""Walk through all inodes below a directory of a layer."""

from __future__ import annotations

import stat
from collections.abc import Iterator

from cowfs.layers.base import Key, LowerLayer
from cowfs.types import Attr


def inodes_below(layer: LowerLayer, top: Key) -> Iterator[tuple[Key, Attr]]:
    """Yield each inode below a directory once for each of its names, a directory before its contents.

    Each key is valid until the next one is yielded. Inodes that are removed meanwhile are skipped. Holds
    the keys of the directories that are still to be read. Blocks as the layer does; raises its
    :class:`OSError`.
    """
    waiting = [top]
    while waiting:
        directory = waiting.pop()
        for entry in layer.readdir(directory):
            found = layer.lookup(directory, entry.name)
            if found is None:
                continue
            yield found
            if stat.S_ISDIR(found[1].st_mode):
                waiting.append(found[0])
            else:
                layer.forget(found[0])
        if directory is not top:
            layer.forget(directory)
