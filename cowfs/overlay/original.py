"""The attributes that a copy takes over from its original: everything except data and name."""

from __future__ import annotations

import errno
import stat
from collections.abc import Sequence
from typing import NamedTuple

from cowfs.layers.base import Key, LowerLayer
from cowfs.overlay import protect
from cowfs.overlay.fs import OverlayFs
from cowfs.overlay.node import Node
from cowfs.overlay.xattr_format import index_name, make_origin
from cowfs.types import Attr

_MAY_FAIL = {errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL}

Xattr = tuple[bytes, bytes]


class Original(NamedTuple):
    """What is read from a lower inode before anything is created in the upper."""

    attr: Attr
    xattrs: Sequence[Xattr]
    origin: bytes
    index_name: bytes | None
    """The inode's name in the index; None if it is not a hard link, or there is no index."""
    protection: int = 0
    place: bytes = b""
    """Tells inodes with the same handle apart, in a layer that may have several."""


def read_original(fs: OverlayFs, node: Node, attr: Attr) -> Original:
    """Return what the copy of *node* takes over, except data or target, and name. *attr* is the node's."""
    layer, key = node.lowers[0]
    xattrs = user_xattrs(fs, fs.lowers[layer], key)
    handle = fs.lowers[layer].handle(key)
    flags = protect.to_copy(fs, node)
    hard_link = attr.st_nlink > 1 and not stat.S_ISDIR(attr.st_mode)
    if handle is None or (hard_link and fs.index is None):
        return Original(attr, xattrs, b"", None, flags)
    note = make_origin(handle)
    if not hard_link:
        return Original(attr, xattrs, note, None, flags)
    return Original(attr, xattrs, note, index_name(note), flags, handle.place)


def copy_attributes(fs: OverlayFs, key: Key, original: Original) -> None:
    """Give the new inode everything of the old one except data and name."""
    upper, attr = fs.upper, original.attr
    _give_xattrs(fs, key, original.xattrs)
    if original.protection:
        protect.give(fs, key, original.protection)
    acls = bool(original.xattrs)
    if not stat.S_ISLNK(attr.st_mode) and (acls or attr.st_mode & 0o7000 or not stat.S_ISREG(attr.st_mode)):
        upper.chmod(key, attr.st_mode)  # an ACL changes the mode, and chown(2) clears set-ID bits
    upper.utimens(key, attr.st_atime_ns, attr.st_mtime_ns)


def copy_xattrs(fs: OverlayFs, layer: LowerLayer, source: Key, key: Key) -> None:
    """Copy all xattrs except the union's own. Skip those that the upper cannot hold."""
    _give_xattrs(fs, key, user_xattrs(fs, layer, source))


def user_xattrs(fs: OverlayFs, layer: LowerLayer, key: Key) -> list[Xattr]:
    """Return the xattrs of an inode, except the union's own and those that cannot be read."""
    try:
        names = layer.listxattr(key)
    except OSError as failure:
        if failure.errno in _MAY_FAIL:
            return []
        raise
    xattrs = []
    for name in names:
        if fs.format.is_own(name):
            continue
        try:
            xattrs.append((name, layer.getxattr(key, name)))
        except OSError as failure:
            if failure.errno not in _MAY_FAIL:
                raise
    return xattrs


def _give_xattrs(fs: OverlayFs, key: Key, xattrs: Sequence[Xattr]) -> None:
    for name, value in xattrs:
        try:
            fs.upper.setxattr(key, name, value)
        except OSError as failure:
            if failure.errno not in _MAY_FAIL:
                raise
