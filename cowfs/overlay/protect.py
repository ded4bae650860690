"""The flags of chattr(1) that other calls respect: i (immutable), a (append only), S and D (synchronous).

The upper stores i and a as a note, not as flags of the upper's own inode, which would stop cowfs as well
(the kernel's ovl_check_protattr()). S and D are flags of that inode. In an upper with descriptors, the kernel
respects them.
"""

from __future__ import annotations

import errno
import stat
from contextlib import suppress

from cowfs.errors import os_error
from cowfs.layers.base import Key, is_flaggable, is_flagged
from cowfs.linux.inode_flags import APPEND, DIRSYNC, IMMUTABLE, NOATIME, SYNC
from cowfs.overlay.fs import OverlayFs
from cowfs.overlay.node import Node

EITHER = APPEND | IMMUTABLE
_SYNCHRONOUS = SYNC | DIRSYNC
_COPIED = SYNC | NOATIME
"""Flags of a lower's inode that its copy has, too (the kernel's OVL_COPY_I_FLAGS_MASK)."""
_LETTERS = {ord("a"): APPEND, ord("i"): IMMUTABLE}


def protection(fs: OverlayFs, node: Node) -> int:
    """Return which of the flags i and a an inode has. Remembers the result, and the flags S and D."""
    return _known(fs, node) & EITHER


def _known(fs: OverlayFs, node: Node) -> int:
    found = node.protection
    if found is None:
        found = node.protection = _seen(fs, node)
    return found


def to_copy(fs: OverlayFs, node: Node) -> int:
    """Return the flags that the copy of a lower inode must have."""
    return _known(fs, node) & (EITHER | _COPIED)


def give(fs: OverlayFs, key: Key, flags: int) -> None:
    """Give a new inode of the upper the flags of its original, as far as the upper can have them."""
    if flags & EITHER:
        note(fs, key, flags)
    if flags & _COPIED and is_flaggable(fs.upper):
        with suppress(OSError):
            fs.upper.setflags(key, fs.upper.getflags(key) | flags & _COPIED)


def set_known(fs: OverlayFs, node: Node, flags: int) -> None:
    """Note the flags that an inode of the upper now has."""
    node.protection = flags & (EITHER if fs.upper.has_descriptors else EITHER | _SYNCHRONOUS)


def inherited(parent: Node, mode: int) -> int:
    """Return which of the flags a new inode of *mode* has in an upper directory (ext4_mask_flags())."""
    flags = (parent.protection or 0) & _SYNCHRONOUS
    return flags if stat.S_ISDIR(mode) else flags & SYNC if stat.S_ISREG(mode) else 0


def is_synchronous(fs: OverlayFs, node: Node) -> bool:
    """Whether each change of the data, size and xattrs of a file, or of the names in a directory, must be on
    disk when the call returns."""
    if node.protection == 0 or node.upper is None or fs.upper.has_descriptors:
        return False
    return bool(_known(fs, node) & (_SYNCHRONOUS if node.is_dir else SYNC))


def _seen(fs: OverlayFs, node: Node) -> int:
    if not node.is_dir and not stat.S_ISREG(node.mode):
        return 0
    flags = 0
    with suppress(OSError):  # no note, or no flags on this filesystem
        number, key = (-1, node.upper) if node.upper is not None else node.lowers[0]
        if number >= 0:
            lower = fs.lowers[number]
            return lower.getflags(key) & (EITHER | _COPIED) if is_flagged(lower) else 0
        # In the upper, whose kernel checks the flags if it has descriptors, or in a frozen upper.
        is_frozen = node.upper is None
        if (is_frozen or not fs.upper.has_descriptors) and is_flaggable(fs.upper):
            flags = fs.upper.getflags(key) & (EITHER | (_COPIED if is_frozen else _SYNCHRONOUS))
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
