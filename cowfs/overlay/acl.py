"""POSIX ACLs that a new inode inherits, for one that is not made in its directory.

Filesystems do this by themselves where an inode is made under its name. What takes the place of a
whiteout is made in the work directory, so the union does it (posix_acl_create of fs/posix_acl.c).
"""

from __future__ import annotations

import stat
from contextlib import suppress

from cowfs.layers import acl
from cowfs.layers.base import Key, UpperLayer


def inherit(layer: UpperLayer, directory: Key, key: Key, mode: int) -> None:
    """Give a new inode of *mode* the ACLs that *directory* has for new inodes, if it has any."""
    if stat.S_ISLNK(mode):
        return
    default = b""
    entries: list[acl.Entry] = []
    with suppress(OSError):  # no ACLs, or a filesystem without
        default = layer.getxattr(directory, acl.DEFAULT)
        entries = acl.parse(default)
    if not entries:
        return
    layer.setxattr(key, acl.ACCESS, acl.build(acl.masked(entries, mode)))
    if stat.S_ISDIR(mode):
        layer.setxattr(key, acl.DEFAULT, default)
