"""The flags of chattr(1), and the birth time (the kernel's ovl_fileattr_get(), ovl_getattr())."""

from __future__ import annotations

import errno
import stat

from cowfs.errors import os_error
from cowfs.layers.base import Key, is_flaggable, is_flagged
from cowfs.overlay import protect
from cowfs.overlay.copyup import copy_up_meta
from cowfs.overlay.fs import OverlayFs
from cowfs.overlay.node import Node

_OF_ANYBODY = 0x380FF
"""Flags that files of any filesystem may have (linux/fs.h); the others are specific to a filesystem."""

_INHERITED = 0x180CF
"""Flags that a new inode inherits from its directory (EXT4_FL_INHERITED)."""
_OF_DIRECTORIES = 0x30000


def _must_have_flags(node: Node) -> None:
    if not node.is_dir and not stat.S_ISREG(node.mode):
        raise os_error(errno.ENOTTY, node.name)


def getflags(fs: OverlayFs, node: Node) -> int:
    """Return the flags in the topmost layer, 0 if it has none. ENOTTY for an inode that cannot have flags."""
    _must_have_flags(node)
    layer, key = fs.topmost(node)
    found = layer.getflags(key) if is_flagged(layer) else 0
    found = found & ~protect.EITHER | protect.protection(fs, node)
    return found if node.upper is not None else found & _OF_ANYBODY


def setflags(fs: OverlayFs, node: Node, flags: int) -> None:
    """Set all flags, in the upper. EOPNOTSUPP for flags that the upper does not support."""
    _must_have_flags(node)
    if not is_flaggable(fs.upper):
        raise os_error(errno.EOPNOTSUPP, node.name)
    if node.upper is None:
        copy_up_meta(fs, node)
        flags = flags & _OF_ANYBODY | fs.upper.getflags(node.upper) & ~_OF_ANYBODY
    protect.note(fs, node.upper, flags)
    node.protection = None
    fs.upper.setflags(node.upper, flags & ~protect.EITHER)
    protect.set_known(fs, node, flags)


def inherit(fs: OverlayFs, directory: Key, key: Key, mode: int) -> None:
    """Give a new inode of *mode* in the work directory the flags that it inherits from *directory*.

    Does nothing if the upper is on a kernel filesystem: it would cost two opens for each inode.
    """
    if fs.upper.has_descriptors or not is_flaggable(fs.upper):
        return
    flags = fs.upper.getflags(directory) & _INHERITED
    if flags and stat.S_ISDIR(mode):
        fs.upper.setflags(key, flags)
    elif flags and stat.S_ISREG(mode):
        fs.upper.setflags(key, flags & ~_OF_DIRECTORIES)


def version(fs: OverlayFs, node: Node) -> int:
    """Return the generation of the inode's number in the upper. ENOTTY for one that is not there."""
    _must_have_flags(node)
    if node.upper is None or not is_flaggable(fs.upper):
        raise os_error(errno.ENOTTY, node.name)
    return fs.upper.version(node.upper)


def birth(fs: OverlayFs, node: Node) -> int | None:
    """Return the birth time, in ns, of the inode in the topmost layer; None if the layer does not keep it."""
    layer, key = fs.topmost(node)
    return layer.birth(key) if is_flagged(layer) else None
