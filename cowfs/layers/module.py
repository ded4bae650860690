"""A squashfs image as a module: a lower that can be removed, so that nothing may depend on it (ADR 0061)."""

from __future__ import annotations

import stat

from cowfs.formats.squashfs.inodes import Inode
from cowfs.formats.squashfs.source import Bytes
from cowfs.layers.squashfs import SquashfsLayer
from cowfs.types import Attr, AttrData, FileHandle

_OF_NAMES = 1 << 33
"""Above all numbers that images have."""


class ModuleLayer(SquashfsLayer):
    """Shows each name of a hard link as a file of its own, and gives no handles.

    So no copy records its origin: later, another image may be there, or none.
    """

    def __init__(self, path: str, *, offset: int = 0, data: Bytes | None = None) -> None:
        """See :class:`cowfs.layers.squashfs.SquashfsLayer`."""
        super().__init__(path, offset=offset, data=data)
        self._numbers_of_names: dict[tuple[int, bytes], int] = {}

    def lookup(self, directory: int, name: bytes) -> tuple[int, Attr] | None:
        """As SquashfsLayer does."""
        found = super().lookup(directory, name)
        if found is None or stat.S_ISDIR(found[1].st_mode) or self._image.inode(found[0]).nlink == 1:
            return found
        key, attr = found[0], self._attr(self._image.inode(found[0]))
        numbers = self._numbers_of_names
        attr.st_ino = numbers.setdefault((directory, name), _OF_NAMES + len(numbers))
        return key, attr

    def _attr(self, inode: Inode) -> AttrData:
        attr = super()._attr(inode)
        if not stat.S_ISDIR(inode.mode):
            attr.st_nlink = 1
        return attr

    def handle(self, key: int) -> FileHandle | None:
        """Return None: a module has no file handles."""
        return None

    def handle_ino(self, handle: FileHandle) -> int | None:
        """Return None: no handle belongs to this layer."""
        return None
