"""Names of inodes in the trash, outside of the merged tree, where `cowfs revert` puts them.

An upper file with several names may have some in the trash. Link counts include only those in the tree.
"""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Iterator

from cowfs.layers.base import Key
from cowfs.layers.walk import inodes_below
from cowfs.overlay.fs import OverlayFs


def names_away(fs: OverlayFs, key: Key) -> int:
    """Return how many names of an upper file are in the trash. The first call searches the trash."""
    if fs.away is None:
        trash = fs.trash()
        fs.away = Counter() if trash is None else Counter(_below(fs, trash))
    return fs.away[fs.upper.stat(key).st_ino] if fs.away else 0


def moved(fs: OverlayFs, place: tuple[Key, bytes], by: int) -> None:
    """Note that the entry at *place* was moved into the trash (*by* 1), or is about to leave it (-1)."""
    found = None if fs.away is None else fs.upper.lookup(*place)
    if fs.away is None or found is None:
        return
    key, attr = found
    numbers = (
        _below(fs, key) if stat.S_ISDIR(attr.st_mode) else iter([attr.st_ino] if attr.st_nlink > 1 else [])
    )
    for number in numbers:
        fs.away[number] += by
        if not fs.away[number]:
            del fs.away[number]


def _below(fs: OverlayFs, directory: Key) -> Iterator[int]:
    """Yield the number of each hard-linked file below a directory of the upper, once for each name."""
    for key, attr in inodes_below(fs.upper, directory):
        if attr.st_nlink > 1 and not stat.S_ISDIR(attr.st_mode) and not fs.is_whiteout(key, attr):
            yield attr.st_ino  # includes whiteouts: many may share one inode
