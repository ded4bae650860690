"""What must not change, or may only grow: the flags i and a of chattr(1) (the kernel's ovl_check_protattr).

In the upper they are a note, and not flags of the upper's own inode, which would keep us from it as well.
"""

from __future__ import annotations

import errno
import stat
from contextlib import suppress

from cowfs.layers.base import Key, is_flaggable, is_flagged
from cowfs.linux.inode_flags import APPEND, IMMUTABLE
from cowfs.overlay.fs import OverlayFs, error
from cowfs.overlay.node import Node

EITHER = APPEND | IMMUTABLE
_LETTERS = {ord("a"): APPEND, ord("i"): IMMUTABLE}


def protection(fs: OverlayFs, node: Node) -> int:
    """Return which of the two flags an inode has. Looks once."""
    found = node.protection
    if found is None:
        found = node.protection = _seen(fs, node)
    return found


def _seen(fs: OverlayFs, node: Node) -> int:
    if not node.is_dir and not stat.S_ISREG(node.mode):
        return 0
    flags = 0
    with suppress(OSError):  # there is no note, or there are no flags
        number, key = (-1, node.upper) if node.upper is not None else node.lowers[0]
        if number >= 0:
            lower = fs.lowers[number]
            return lower.getflags(key) & EITHER if is_flagged(lower) else 0
        # In the upper, or one that was frozen.
        if not fs.upper.has_descriptors and is_flaggable(fs.upper):  # else that sees to it
            flags = fs.upper.getflags(key) & EITHER
        if fs.format.protattr in fs.upper.listxattr(key):  # to be told of its lack takes longer
            for letter in fs.upper.getxattr(key, fs.format.protattr):
                flags |= _LETTERS.get(letter, 0)
    return flags


def note(fs: OverlayFs, key: Key, flags: int) -> None:
    """Write down in the upper which of the two flags an inode has."""
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
    """EPERM unless owner, mode, times and attributes may be changed, and names be given."""
    if node.protection != 0 and protection(fs, node):
        raise error(errno.EPERM, node.name)


def must_add(fs: OverlayFs, parent: Node) -> None:
    """EPERM unless a name may be made in a directory."""
    if parent.protection != 0 and protection(fs, parent) & IMMUTABLE:
        raise error(errno.EPERM, parent.name)


def must_remove(fs: OverlayFs, parent: Node, node: Node) -> None:
    """EPERM unless the name of something may be removed (may_delete() in fs/namei.c)."""
    must_change(fs, parent)
    must_change(fs, node)


def must_write(fs: OverlayFs, node: Node, *, appends: bool) -> None:
    """EPERM unless a file may be written to, by somebody who only *appends* or not."""
    if node.protection != 0 and protection(fs, node) & (IMMUTABLE if appends else EITHER):
        raise error(errno.EPERM, node.name)
