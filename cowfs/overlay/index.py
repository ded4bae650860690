"""The index of hard links: finds the upper inode of a lower inode, by any of its names.

The kernel's overlayfs stores it the same way (ovl_lookup_index() in fs/overlayfs/namei.c).
"""

from __future__ import annotations

from typing import NamedTuple

from cowfs.layers.base import Key, LowerLayer
from cowfs.overlay.xattr_format import XattrFormat, index_name, make_origin
from cowfs.types import Attr, FileHandle


class Index(NamedTuple):
    """The directory of the upper layer that has the copied-up hard links, named by their origins."""

    upper: LowerLayer
    directory: Key
    names: set[bytes]
    """The names in it: what is not among them is not looked for."""
    format: XattrFormat

    def find(self, handle: FileHandle | None) -> tuple[Key, Attr] | None:
        """Return the upper inode of a hard-linked lower inode, copied up perhaps under another name.

        *handle* is that of the lower inode. None if it was not copied up.
        """
        name = None if handle is None else index_name(make_origin(handle))
        if name is None or name not in self.names:
            return None
        assert handle is not None
        found = self.upper.lookup(self.directory, name)
        if found is not None and came_from(self.upper, found[0], handle.place, self.format):
            return found
        return None


def open_index(upper: LowerLayer, directory: Key, xattrs: XattrFormat) -> Index:
    """Return the index in this directory of the upper layer."""
    return Index(upper, directory, {entry.name for entry in upper.readdir(directory)}, xattrs)


def came_from(upper: LowerLayer, key: Key, place: bytes, xattrs: XattrFormat) -> bool:
    """Whether an indexed hard link was copied up from the lower inode at this place; True if unknown.

    A bad image may give two inodes the same number.
    """
    try:
        return not place or upper.getxattr(key, xattrs.place) == place
    except OSError:
        return True  # the kernel, or an old cowfs, copied it up
