"""Changing attributes (the kernel's inode.c)."""

from __future__ import annotations

import errno
import stat
from dataclasses import dataclass

from cowfs.errors import os_error
from cowfs.overlay import protect
from cowfs.overlay.copyup import copy_up, copy_up_meta
from cowfs.overlay.file import SET_ID, drop_set_id
from cowfs.overlay.fs import OverlayFs
from cowfs.overlay.handle import Writer
from cowfs.overlay.node import Node
from cowfs.types import Attr


@dataclass(slots=True)
class NewAttributes:
    """What setattr should set; None leaves an attribute unchanged."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    writer: Writer = Writer.PRIVILEGED
    is_touch: bool = False
    """Whether the times are set to now, which a caller who does not own the file may do (utime(2))."""

    @property
    def is_nothing(self) -> bool:
        """Whether there is nothing to set. Such a call precedes a write, and clears set-ID bits."""
        return (
            self.mode is None
            and self.uid is None
            and self.mtime_ns is None
            and self.gid is None
            and self.size is None
            and self.atime_ns is None
        )


def setattr_(fs: OverlayFs, node: Node, new: NewAttributes) -> Attr:
    """Change attributes and return the node's new attributes.

    A new size copies up the data that remains; any other change copies up only the inode.
    """
    must_be_allowed(fs, node, new)
    if new.size is not None:
        if node.is_dir:
            raise os_error(errno.EISDIR, node.name)
        copy_up(fs, node, new.size)
    else:
        copy_up_meta(fs, node, in_place=True)
    if node.metacopy:
        fs.stat(node)  # reads the lower, which may fail: so do it before any change
    key = node.upper
    if new.size is not None:
        fs.upper.truncate(key, new.size)
        drop_set_id(fs, node, new.writer)  # a failure keeps them
    elif node.mode & SET_ID and new.is_nothing:
        drop_set_id(fs, node, new.writer)
    if new.uid is not None or new.gid is not None:
        fs.upper.chown(key, -1 if new.uid is None else new.uid, -1 if new.gid is None else new.gid)
    if new.mode is not None:
        if stat.S_ISLNK(node.mode):
            raise os_error(errno.EOPNOTSUPP, node.name)
        fs.upper.chmod(key, stat.S_IMODE(new.mode))
    elif new.uid is not None or new.gid is not None:
        _clear_set_id(fs, node, new.writer)
    if new.atime_ns is not None or new.mtime_ns is not None:
        atime_ns, mtime_ns = new.atime_ns, new.mtime_ns
        if atime_ns is None or mtime_ns is None:
            now = fs.upper.stat(key)
            atime_ns = now.st_atime_ns if atime_ns is None else atime_ns
            mtime_ns = now.st_mtime_ns if mtime_ns is None else mtime_ns
        fs.upper.utimens(key, atime_ns, mtime_ns)
    attr = fs.stat(node)
    node.mode = attr.st_mode
    return attr


def _clear_set_id(fs: OverlayFs, node: Node, writer: Writer) -> None:
    """Clear set-ID bits after a chown, which clears them for every caller.

    A file that has no name yet keeps them. A kernel's overlayfs above copies files up so: it sets the mode,
    and then the owner (ovl_set_attr()). The kernel sends the same request for that as for chown(2).
    """
    if node not in fs.unnamed:
        drop_set_id(fs, node, Writer.STRANGER if writer is Writer.STRANGER else Writer.MEMBER)
    elif node.mode & SET_ID:
        fs.upper.chmod(node.upper, stat.S_IMODE(node.mode))


def must_be_allowed(fs: OverlayFs, node: Node, new: NewAttributes) -> None:
    """EPERM if the flags of chattr(1) forbid the change (may_setattr() and ext4_setattr() in the kernel)."""
    if node.protection == 0:
        return
    if new.mode is not None or new.uid is not None or new.gid is not None:
        protect.must_change(fs, node)
    elif new.size is not None:
        protect.must_write(fs, node, appends=False)
    elif new.is_nothing or new.is_touch:
        protect.must_write(fs, node, appends=True)
    else:
        protect.must_change(fs, node)


def was_read(fs: OverlayFs, node: Node) -> None:
    """Update the access time of a node in the upper. Never copies up (ovl_update_time() in the kernel)."""
    when = fs.upper.atime
    if node.upper is not None and (when.directories if node.is_dir else when.files):
        fs.upper.was_read(node.upper)


def readlink(fs: OverlayFs, node: Node) -> bytes:
    """Return the target of a symbolic link; EINVAL for anything else."""
    if not stat.S_ISLNK(node.mode):
        raise os_error(errno.EINVAL, node.name)
    was_read(fs, node)
    if node.upper is not None:
        return fs.upper.readlink(node.upper)
    layer, key = node.lowers[0]
    return fs.lowers[layer].readlink(key)
