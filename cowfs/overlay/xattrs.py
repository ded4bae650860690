"""Extended attributes (the kernel's xattrs.c).

The union's own (``trusted.overlay.*`` or ``user.overlay.*``) are hidden. If a user sets one of these, for
example another overlay inside this one, it is stored under an escaped name, as in the kernel since 6.7:
``trusted.overlay.x`` is stored as ``trusted.overlay.overlay.x``.
"""

from __future__ import annotations

import errno
from contextlib import suppress

from cowfs.errors import os_error
from cowfs.overlay import protect
from cowfs.overlay.copyup import copy_up_meta
from cowfs.overlay.fs import OverlayFs
from cowfs.overlay.node import Node
from cowfs.overlay.xattr_format import IMPURE

_ACLS = b"system.posix_acl_"


def _must_have(fs: OverlayFs, node: Node) -> None:
    """EOPNOTSUPP where no file is to have attributes."""
    if not fs.options.has_xattrs:
        raise os_error(errno.EOPNOTSUPP, node.name)


def getxattr(fs: OverlayFs, node: Node, name: bytes) -> bytes:
    """Return an attribute's value; ENODATA if there is none."""
    _must_have(fs, node)
    layer, key = fs.topmost(node)
    try:
        return layer.getxattr(key, fs.format.stored(name))
    except OSError as failure:
        # The kernel reads the ACL to check permissions; any errno but ENODATA would become the result.
        if failure.errno == errno.EOPNOTSUPP and name.startswith(_ACLS):
            raise os_error(errno.ENODATA, node.name) from None
        raise


def listxattr(fs: OverlayFs, node: Node) -> list[bytes]:
    """Return the names of all attributes except the union's own."""
    _must_have(fs, node)
    layer, key = fs.topmost(node)
    names = map(fs.format.shown, layer.listxattr(key))
    return [name for name in names if name is not None]


def setxattr(fs: OverlayFs, node: Node, name: bytes, value: bytes, flags: int = 0) -> None:
    """Set an attribute. *flags*: XATTR_CREATE, XATTR_REPLACE."""
    _must_have(fs, node)
    protect.must_change(fs, node)
    copy_up_meta(fs, node)
    stored = fs.format.stored(name)
    try:
        fs.upper.setxattr(node.upper, stored, value, flags)
    except OSError as failure:
        if failure.errno != errno.ENOSPC or not _make_room(fs, node):
            raise
        try:
            fs.upper.setxattr(node.upper, stored, value, flags)
        except OSError:
            with suppress(OSError):
                fs.note(node.upper, fs.format.impure, IMPURE)
            raise


def _make_room(fs: OverlayFs, node: Node) -> bool:
    """Remove the note that a directory is impure, if it has one: a merged directory does not need it.

    The kernel writes that note when it copies something up into the directory. Removing it makes room.
    """
    if not node.is_dir or not node.is_merged:
        return False
    try:
        fs.upper.removexattr(node.upper, fs.format.impure)
    except OSError:
        return False
    return True


def removexattr(fs: OverlayFs, node: Node, name: bytes, *, appends: bool = False) -> None:
    """Remove an attribute; ENODATA, and no copy-up, if there is none. *appends*: only to append then."""
    _must_have(fs, node)
    if appends:
        protect.must_write(fs, node, appends=True)
    else:
        protect.must_change(fs, node)
    try:
        getxattr(fs, node, name)
    except OSError as failure:
        if failure.errno != errno.EINVAL:  # the kernel's answer to an invalid security.capability
            raise
    copy_up_meta(fs, node)
    fs.upper.removexattr(node.upper, fs.format.stored(name))
