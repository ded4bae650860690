"""The index of hard links: finds the upper inode of a lower inode, by any of its names.

The kernel's overlayfs stores it the same way (ovl_lookup_index() in fs/overlayfs/namei.c).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from cowfs.layers.base import Key, LowerLayer
from cowfs.overlay.xattr_format import XattrFormat, index_name, make_origin, parse_count
from cowfs.types import NO_UUID, Attr, FileHandle, is_lower_uuid


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
        found = self.named(handle)
        return None if found is None else found[1:]

    def named(self, handle: FileHandle | None) -> tuple[bytes, Key, Attr] | None:
        """Return what :meth:`find` does, after the name that it has in the index."""
        for name, is_old in names_of(handle):
            found = self.upper.lookup(self.directory, name) if name in self.names else None
            if found is None or handle is None:
                continue
            if is_old and not is_of_lower(self.upper, found[0], handle.lower, self.format):
                continue
            if came_from(self.upper, found[0], handle.place, self.format):
                return name, *found
        return None


def names_of(handle: FileHandle | None) -> Iterator[tuple[bytes, bool]]:
    """Yield the names that the index may have for a lower inode, and whether an old cowfs made the name.

    Old versions made handles without a UUID for all images: :func:`is_of_lower` tells the images apart.
    """
    if handle is not None:
        yield index_name(make_origin(handle)), False
        if is_lower_uuid(handle.uuid):
            yield index_name(make_origin(handle._replace(uuid=NO_UUID))), True


def is_of_lower(upper: LowerLayer, key: Key, number: int, xattrs: XattrFormat) -> bool:
    """Whether the notes of a copied-up inode say that it came from this lower."""
    try:
        return parse_count(upper.getxattr(key, xattrs.layer)) == number
    except OSError:
        return not number


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
