"""POSIX ACLs that a new inode inherits, for one that is not made in its directory.

Filesystems do this by themselves where an inode is made under its name. What takes the place of a
whiteout is made in the work directory, so the union does it (posix_acl_create of fs/posix_acl.c; the
xattr's layout is that of linux/posix_acl_xattr.h).
"""

from __future__ import annotations

import stat
import struct
from contextlib import suppress

from cowfs.layers.base import Key, UpperLayer

DEFAULT = b"system.posix_acl_default"
ACCESS = b"system.posix_acl_access"

_VERSION = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")  # tag, perm, id
_USER_OBJ, _GROUP_OBJ, _MASK, _OTHER = 0x01, 0x04, 0x10, 0x20


def inherit(layer: UpperLayer, directory: Key, key: Key, mode: int) -> None:
    """Give a new inode of *mode* the ACLs that *directory* has for new inodes, if it has any."""
    if stat.S_ISLNK(mode):
        return
    default = b""
    with suppress(OSError):  # no ACLs, or a filesystem without
        default = layer.getxattr(directory, DEFAULT)
    if len(default) < _VERSION.size + _ENTRY.size:
        return
    layer.setxattr(key, ACCESS, _masked(default, mode))
    if stat.S_ISDIR(mode):
        layer.setxattr(key, DEFAULT, default)


def _masked(acl: bytes, mode: int) -> bytes:
    """Return the ACL with what the mode does not allow taken away (posix_acl_create_masq)."""
    entries = list(_ENTRY.iter_unpack(acl[_VERSION.size :]))
    group = _MASK if any(tag == _MASK for tag, _, _ in entries) else _GROUP_OBJ
    allowed = {_USER_OBJ: mode >> 6 & 7, group: mode >> 3 & 7, _OTHER: mode & 7}
    return acl[: _VERSION.size] + b"".join(
        _ENTRY.pack(tag, perm & allowed.get(tag, 7), who) for tag, perm, who in entries
    )
