"""The index of hard links: finds the upper inode that was made from a lower one, under any of its names.

The kernel's overlayfs keeps it the same way (ovl_lookup_index() in fs/overlayfs/namei.c).
"""

from __future__ import annotations

from typing import NamedTuple

from cowfs.layers.base import Key, LowerLayer
from cowfs.overlay.xattr_format import XattrFormat, index_name, make_origin
from cowfs.types import Attr, FileHandle


class Index(NamedTuple):
    """The directory of the upper layer with the hard links that were copied up, under their origins."""

    upper: LowerLayer
    directory: Key
    names: set[bytes]
    """The names in it: what is not among them is not looked for."""
    format: XattrFormat

    def find(self, handle: FileHandle | None) -> tuple[Key, Attr] | None:
        """Return the upper inode of a hard-linked lower one that was copied up, maybe under another name.

        *handle* is the lower inode's. None if it was not.
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
    """Return the index that is this directory of the upper layer."""
    return Index(upper, directory, {entry.name for entry in upper.readdir(directory)}, xattrs)


def came_from(upper: LowerLayer, key: Key, place: bytes, xattrs: XattrFormat) -> bool:
    """Whether an indexed hard link was copied up from the lower inode that is at this place, and not
    from another to which a bad image gives the same number; True where that is not known."""
    try:
        return not place or upper.getxattr(key, xattrs.place) == place
    except OSError:
        return True  # the kernel, or an old cowfs, has copied it up
