"""The flags i (immutable) and a (append only) of chattr(1) (the kernel's ovl_check_protattr()).

The upper stores them as a note, not as flags of the upper's own inode, which would stop cowfs as well.
"""

from __future__ import annotations

import errno
import stat
from contextlib import suppress

from cowfs.errors import os_error
from cowfs.layers.base import Key, is_flaggable, is_flagged
from cowfs.linux.inode_flags import APPEND, IMMUTABLE
from cowfs.overlay.fs import OverlayFs
from cowfs.overlay.node import Node

EITHER = APPEND | IMMUTABLE
_LETTERS = {ord("a"): APPEND, ord("i"): IMMUTABLE}


def protection(fs: OverlayFs, node: Node) -> int:
    """Return which of the two flags an inode has. Remembers the result."""
    found = node.protection
    if found is None:
        found = node.protection = _seen(fs, node)
    return found


def _seen(fs: OverlayFs, node: Node) -> int:
    if not node.is_dir and not stat.S_ISREG(node.mode):
        return 0
    flags = 0
    with suppress(OSError):  # no note, or no flags on this filesystem
        number, key = (-1, node.upper) if node.upper is not None else node.lowers[0]
        if number >= 0:
            lower = fs.lowers[number]
            return lower.getflags(key) & EITHER if is_flagged(lower) else 0
        # In the upper, or in a frozen upper.
        if not fs.upper.has_descriptors and is_flaggable(fs.upper):  # else the kernel checks the flags
            flags = fs.upper.getflags(key) & EITHER
        if fs.format.protattr in fs.upper.listxattr(key):  # quicker than a failing getxattr
            for letter in fs.upper.getxattr(key, fs.format.protattr):
                flags |= _LETTERS.get(letter, 0)
    return flags


def note(fs: OverlayFs, key: Key, flags: int) -> None:
    """Record in the upper which of the two flags an inode has."""
    letters = bytes(letter for letter, flag in _LETTERS.items() if flags & flag)
    if letters:
        fs.note(key, fs.format.protattr, letters)
        return
    try:
        fs.upper.removexattr(key, fs.format.protattr)
    except OSError as failure:
        if failure.errno not in {errno.ENODATA, errno.EOPNOTSUPP}:
            raise


def must_change(fs: OverlayFs, node: Node) -> None:
    """EPERM if owner, mode, times and xattrs must not change, or names must not be added."""
    if node.protection != 0 and protection(fs, node):
        raise os_error(errno.EPERM, node.name)


def must_add(fs: OverlayFs, parent: Node) -> None:
    """EPERM if no name may be created in a directory."""
    if parent.protection != 0 and protection(fs, parent) & IMMUTABLE:
        raise os_error(errno.EPERM, parent.name)


def must_remove(fs: OverlayFs, parent: Node, node: Node) -> None:
    """EPERM if a node's name must not be removed (may_delete() in fs/namei.c)."""
    must_change(fs, parent)
    must_change(fs, node)


def must_write(fs: OverlayFs, node: Node, *, appends: bool) -> None:
    """EPERM if a file must not be written; *appends*: whether the writer only appends."""
    if node.protection != 0 and protection(fs, node) & (IMMUTABLE if appends else EITHER):
        raise os_error(errno.EPERM, node.name)
