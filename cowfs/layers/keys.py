"""The keys of a directory layer."""

from __future__ import annotations

import stat

from cowfs.layers.beneath import DIRECTORY
from cowfs.types import Attr, own_attr


class PathKey:
    """An inode of a directory layer: a name in a directory, or a descriptor that pins it.

    *fd* is -1, or an O_PATH descriptor: for a directory a cache, for an inode whose name is gone
    (then *parent* is None) the way to it. *mark* is what was looked up (:func:`beneath.marker`).
    """

    __slots__ = ("fd", "mark", "name", "parent")

    def __init__(self, parent: PathKey | None, name: bytes, mark: int, fd: int = -1) -> None:
        self.parent = parent
        self.name = name
        self.mark = mark
        self.fd = fd


class CoveredKey(PathKey):
    """A directory that something is mounted on: to the layer it is empty, with attributes made up."""

    __slots__ = ("attr",)

    def __init__(self, parent: PathKey, name: bytes, attr: Attr) -> None:
        super().__init__(parent, name, DIRECTORY)
        self.attr = attr


def apart(key: PathKey, attr: Attr) -> Attr:
    """Return the attributes of a file with several names as if this were its only one, with a number that no
    other has: larger than those of filesystems."""
    if stat.S_ISDIR(attr.st_mode):
        return attr
    own = own_attr(attr)
    own.st_nlink = 1
    names = []
    walk: PathKey | None = key
    while walk is not None:
        names.append(walk.name)
        walk = walk.parent
    own.st_ino = int.from_bytes(b"/".join(reversed(names))) << 64
    return own
