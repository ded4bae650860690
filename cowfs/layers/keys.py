"""The keys of a directory layer."""

from __future__ import annotations

import stat

from cowfs.layers.beneath import DIRECTORY
from cowfs.types import Attr, own_attr


class PathKey:
    """An inode of a directory layer: a name in a directory, or a descriptor that pins it.

    *fd* is -1 or an O_PATH descriptor. A directory's is a cache. An inode that has lost its name (then
    *parent* is None) is only accessible through it. *mark* identifies the inode that was looked up
    (:func:`beneath.marker`).
    """

    __slots__ = ("fd", "mark", "name", "parent")

    def __init__(self, parent: PathKey | None, name: bytes, mark: int, fd: int = -1) -> None:
        self.parent = parent
        self.name = name
        self.mark = mark
        self.fd = fd


class CoveredKey(PathKey):
    """A directory with a mount on it: the layer shows it as empty, with invented attributes."""

    __slots__ = ("attr",)

    def __init__(self, parent: PathKey, name: bytes, attr: Attr) -> None:
        super().__init__(parent, name, DIRECTORY)
        self.attr = attr


def apart(key: PathKey, attr: Attr) -> Attr:
    """Return the attributes of one name of a hard link, as those of a separate file.

    Its number is unique: it is larger than those of filesystems.
    """
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
