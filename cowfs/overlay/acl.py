"""The POSIX ACLs that a new inode inherits if it is not created in its final directory.

A filesystem does this itself for an inode that is created under its final name. An inode that replaces a
whiteout is created in the work directory, so the union does it (posix_acl_create() in fs/posix_acl.c).
"""

from __future__ import annotations

import stat
from contextlib import suppress

from cowfs.layers import acl
from cowfs.layers.base import Key, UpperLayer


def inherit(layer: UpperLayer, directory: Key, key: Key, mode: int) -> None:
    """Give a new inode of *mode* the default ACLs of *directory*, if it has any."""
    if stat.S_ISLNK(mode):
        return
    default = b""
    entries: list[acl.Entry] = []
    with suppress(OSError):  # no ACLs, or none on this filesystem
        default = layer.getxattr(directory, acl.DEFAULT)
        entries = acl.parse(default)
    if not entries:
        return
    layer.setxattr(key, acl.ACCESS, acl.build(acl.masked(entries, mode)))
    if stat.S_ISDIR(mode):
        layer.setxattr(key, acl.DEFAULT, default)
