"""Copy-up of small files and of directories in one step, if the upper layer supports it.

It creates nothing in the work directory and renames nothing: on disk, the copy is one change.
"""

from __future__ import annotations

import os
import stat
from contextlib import closing

from cowfs.layers import acl
from cowfs.layers.base import Key, reads_whole, takes_whole
from cowfs.overlay.fs import OverlayFs
from cowfs.overlay.install import place_of, set_upper
from cowfs.overlay.node import Node
from cowfs.overlay.original import Original, Xattr, read_original
from cowfs.overlay.xattr_format import IMPURE, METACOPY
from cowfs.types import Attr

_ATTRIBUTES = 512
"""Bytes of extended attributes, and of our notes, that any upper takes."""


def copy_whole(fs: OverlayFs, node: Node, attr: Attr, size: int) -> bool:
    """Copy up a regular file with the attributes *attr* and its first *size* bytes.

    Return False, with nothing changed, if that is not possible. All directories above must be in the upper.
    """
    upper = fs.upper
    if node.dead or size > fs.options.inline_up_to or not takes_whole(upper) or fs.data_waits(node):
        return False
    xattrs = _xattrs_of(fs, node, read_original(fs, node, attr))
    data = None if xattrs is None else _data_of(fs, node, size)
    if xattrs is None or data is None:
        return False
    parent, name = place_of(fs, node)
    key = upper.copy_in(parent.upper, name, attr, data, xattrs)
    node.metacopy = False
    set_upper(fs, node, key)
    return True


def copy_directory(fs: OverlayFs, node: Node, attr: Attr) -> Key | None:
    """Copy up a directory with the attributes *attr*, without its names; return its inode in the upper.

    Return None, with nothing changed, if that is not possible. All directories above must be in the upper.
    """
    return _copy_without_data(fs, node, attr, (fs.format.impure, IMPURE))


def copy_inode(fs: OverlayFs, node: Node, attr: Attr) -> bool:
    """Copy up a regular file with the attributes *attr*, but not its data: make a metacopy.

    Return False, with nothing changed, if that is not possible. All directories above must be in the upper.
    """
    key = _copy_without_data(fs, node, attr, (fs.format.metacopy, METACOPY))
    if key is None:
        return False
    node.metacopy = True
    set_upper(fs, node, key)
    return True


def _copy_without_data(fs: OverlayFs, node: Node, attr: Attr, note: Xattr) -> Key | None:
    upper = fs.upper
    if node.dead or not takes_whole(upper):
        return None
    xattrs = _xattrs_of(fs, node, read_original(fs, node, attr))
    if xattrs is None:
        return None
    parent, name = place_of(fs, node)
    return upper.copy_in(parent.upper, name, attr, None, [*xattrs, note])


def copy_up_small(fs: OverlayFs, node: Node, *, in_place: bool = False) -> bool:
    """Copy up a small file that one lower has, under one name, in a directory that the upper has; with its
    data, unless only its owner, mode or times are to change (*in_place*).

    Return False, with nothing changed, for any other; and if it needs more than these steps.
    """
    parent = node.parent
    if (
        node.upper is not None
        or not isinstance(node.below, int)
        or not stat.S_ISREG(node.mode)
        or node.mode & (stat.S_ISUID | stat.S_ISGID)
        or node.copying is not None
        or parent is None
        or parent.upper is None
    ):
        return False
    attr = fs.stat(node)
    if attr.st_nlink > 1:
        return False
    if in_place and not needs_data(fs, node, attr, in_place=True):
        return copy_inode(fs, node, attr)
    return attr.st_size < fs.options.metacopy_from and copy_whole(fs, node, attr, attr.st_size)


def needs_data(fs: OverlayFs, node: Node, attr: Attr, *, in_place: bool = False) -> bool:
    """Whether a change of an inode's attributes or names copies up its data, too; see copy_up_meta()."""
    if not stat.S_ISREG(attr.st_mode):
        return False
    if not fs.options.metacopy or fs.in_module(node):
        return True
    nobody = fs.options.nobody
    is_nobodys = nobody is not None and (attr.st_uid == nobody[0] or attr.st_gid == nobody[1])
    any_data = in_place or is_nobodys or fs.data_waits(node)
    return attr.st_size < (1 if any_data else fs.options.metacopy_from)


def _xattrs_of(fs: OverlayFs, node: Node, original: Original) -> list[Xattr] | None:
    """Return all xattrs of the copy, with the notes; None if some need more than setting an xattr."""
    number = node.lowers[0][0]
    if original.index_name is not None or original.protection or number < 0 or fs.options.sync_copy_up:
        return None
    xattrs = [*original.xattrs, (fs.format.origin, original.origin)]
    if number > 0:
        xattrs.append((fs.format.layer, b"%d" % number))
    if len(xattrs) > 1:
        taken = sum(len(name) + len(value) for name, value in xattrs)
        if taken > _ATTRIBUTES or any(name in {acl.ACCESS, acl.DEFAULT} for name, _ in xattrs):
            return None
    return xattrs


def _data_of(fs: OverlayFs, node: Node, size: int) -> bytes | None:
    """Return the first *size* bytes of a lower file; None if they contain holes."""
    if not size:
        return b""
    number, key = node.lowers[-1]
    layer = fs.lowers[number]
    if reads_whole(layer):
        whole = layer.read_whole(key, size)
        if whole is not None and len(whole) == size:
            return whole
    with closing(layer.open(key, os.O_RDONLY)) as source:
        if next(source.segments(size), None) != (0, size):
            return None
        data = source.pread(size, 0)
    return data if len(data) == size else None
