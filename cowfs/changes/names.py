"""Estimate how many names a layer has, to predict how long something will take."""

from __future__ import annotations

import stat
from collections.abc import Callable

from cowfs.changes.scan import readdir
from cowfs.layers.base import Key, LowerLayer

Expect = Callable[[Callable[[], int]], None]
"""Called before a walk, with a function that returns about how many names there are. That function may take
as long as find(1)."""


def not_asked(_: Callable[[], int]) -> None:
    """Ignore the number: the default :data:`Expect`."""


def count_names(layer: LowerLayer, root: Key) -> int:
    """Return about how many names are below *root*. An image tells it; a directory is walked. Blocks."""
    if not layer.has_descriptors:
        stats = layer.statfs()
        return stats.files - stats.ffree
    count, waiting = 0, [root]
    while waiting:
        directory = waiting.pop()
        try:
            for entry in readdir(layer, directory):
                count += 1
                if entry.type in {0, stat.S_IFDIR} and (hit := layer.lookup(directory, entry.name)):
                    if stat.S_ISDIR(hit[1].st_mode):
                        waiting.append(hit[0])
                    else:
                        layer.forget(hit[0])
        except OSError:
            pass  # a caller that needs its contents reports the error
        if directory is not root:
            layer.forget(directory)
    return count
