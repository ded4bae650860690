"""Origins: the kernel's note, on a copied-up inode, of the lower inode that it came from.

The format is struct ovl_fh / ovl_fb of the kernel's fs/overlayfs/overlayfs.h: version 0, magic 0xfb,
the length of all, flags, the type of the file handle, the filesystem's UUID, and the handle itself.
In hexadecimal it is also the name of a hard-linked inode in the index.
"""

from __future__ import annotations

import struct
import sys

from cowfs.types import FileHandle

_HEAD = struct.Struct("<BBBBB16s")  # version, magic, len, flags, type, uuid
_VERSION, _MAGIC = 0, 0xFB
_BIG_ENDIAN = 1  # OVL_FH_FLAG_BIG_ENDIAN
_CPU = _BIG_ENDIAN if sys.byteorder == "big" else 0


def encode(handle: FileHandle) -> bytes:
    """Return the value of the origin xattr for a lower inode's handle."""
    size = _HEAD.size + len(handle.data)
    return _HEAD.pack(_VERSION, _MAGIC, size, _CPU, handle.type, handle.uuid) + handle.data


def decode(value: bytes) -> FileHandle | None:
    """Return the handle in an origin; None for one of unknown form, or the empty one, which says
    that the inode was copied up from a filesystem without handles."""
    if len(value) < _HEAD.size:
        return None
    version, magic, size, flags, kind, uuid = _HEAD.unpack_from(value)
    if version != _VERSION or magic != _MAGIC or size != len(value) or flags & _BIG_ENDIAN != _CPU:
        return None
    return FileHandle(kind, value[_HEAD.size :], uuid)


def index_name(value: bytes) -> bytes:
    """Return the name that the inode with this origin has in the index."""
    return value.hex().encode()
