"""Rename (the kernel's ovl_rename()): one renameat2(2) in the upper, whatever is below.

Users do not see the preparation: an inode is copied up, and a directory is marked with where its lower part
is (a redirect), or that it has none (opaque). The whiteout at the old place comes with the rename itself
(RENAME_WHITEOUT), or was at the new place before (RENAME_EXCHANGE).
"""

from __future__ import annotations

import errno
import stat
from contextlib import nullcontext, suppress

from cowfs.errors import os_error
from cowfs.layers.base import Key, together
from cowfs.linux.files import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT
from cowfs.overlay import protect, whiteout
from cowfs.overlay import redirect as redirects
from cowfs.overlay.copyup import copy_up, copy_up_directory, copy_up_meta, link_alias, note_nlink
from cowfs.overlay.dir import ROOT, Owner, leave_whiteout, name_removed, prepare_whiteout
from cowfs.overlay.fs import OverlayFs
from cowfs.overlay.lookup import lookup, lower_has, resolve
from cowfs.overlay.nlink import names_of
from cowfs.overlay.node import Node
from cowfs.overlay.readdir import Seen, see
from cowfs.overlay.whole import needs_data
from cowfs.overlay.work import made_aside
from cowfs.overlay.xattr_format import IMPURE, OPAQUE

_FLAGS = RENAME_NOREPLACE | RENAME_EXCHANGE | RENAME_WHITEOUT


def rename(
    fs: OverlayFs,
    parent: Node,
    name: bytes,
    new_parent: Node,
    new_name: bytes,
    flags: int = 0,
    seen: Seen | None = None,
    owner: Owner = ROOT,
) -> Node | None:
    """Rename as renameat2(2) does, with RENAME_NOREPLACE, RENAME_EXCHANGE and RENAME_WHITEOUT.

    RENAME_WHITEOUT leaves a character device 0:0 that belongs to *owner* under the old name. *seen* is an
    earlier result of :func:`look_through` for a directory that is replaced; without it, the directory is read
    here. Return the replaced node, if any.
    """
    if flags & ~_FLAGS or (flags & RENAME_EXCHANGE and flags != RENAME_EXCHANGE):
        raise os_error(errno.EINVAL, name)
    node = resolve(fs, parent, name)
    found = lookup(fs, new_parent, new_name)
    target = found[0] if found else None
    _check(node, new_parent, new_name, target, flags)
    if target is node:
        return None  # two names of one inode: POSIX says to do nothing
    _must_be_allowed(fs, (parent, node), (new_parent, target))
    if not fs.options.redirect_dir:
        _refuse_redirects(node, target if flags & RENAME_EXCHANGE else None)
    _refuse_modules(fs, node, target if flags & RENAME_EXCHANGE else None)
    if target is not None and target.is_dir and not flags & RENAME_EXCHANGE:
        seen = see(fs, target, seen)
        if not seen.empty:
            raise os_error(errno.ENOTEMPTY, new_name)
    new_parent.added += 1
    _bring_up(fs, node, parent, name)
    copy_up_directory(fs, new_parent)
    if flags & RENAME_EXCHANGE:
        assert target is not None
        _bring_up(fs, target, new_parent, new_name)
        _exchange(fs, (parent, name, node), (new_parent, new_name, target))
        return None
    last = False
    if target is not None:
        last = _make_replaceable(fs, target, new_parent, new_name, seen)
    _mark(fs, node, parent, new_parent, new_name)
    left = prepare_whiteout(fs, parent, owner) if flags & RENAME_WHITEOUT else None
    with nullcontext() if left is None else together(fs.upper):
        _move(fs, (parent, name, node), (new_parent, new_name, target))
        fs.nodes.detach(parent, name)
        if target is not None:
            _drop_replaced(fs, target, new_parent, new_name, last=last)
        fs.nodes.rename(node, new_parent, new_name)
        if left is not None:
            leave_whiteout(fs, parent, name, left)
    return target


def _drop_replaced(fs: OverlayFs, target: Node, parent: Node, name: bytes, *, last: bool) -> None:
    """Remove the name of a node that another one replaced; *last*: it was its last name."""
    if not target.is_dir:
        name_removed(fs, target, parent, name, last=last)
        return
    if target.upper is None:
        fs.covers(parent)
    fs.nodes.detach(parent, name)
    target.dead = True
    fs.release(target)


def _refuse_redirects(*nodes: Node | None) -> None:
    """EXDEV for a node that would need a redirect: a directory that is, or was, in a lower."""
    for node in nodes:
        if node is not None and node.lowers and (node.is_dir or node.metacopy):
            raise os_error(errno.EXDEV, node.name)


def _refuse_modules(fs: OverlayFs, *nodes: Node | None) -> None:
    """EXDEV for a directory in a module: without the module, a redirect would lead nowhere."""
    for node in nodes:
        if node is not None and node.is_dir and fs.in_module(node):
            raise os_error(errno.EXDEV, node.name)


def _must_be_allowed(fs: OverlayFs, source: tuple[Node, Node], target: tuple[Node, Node | None]) -> None:
    """EPERM if the flags of chattr(1) forbid it (may_delete() and may_create() in the kernel)."""
    protect.must_remove(fs, *source)
    protect.must_add(fs, target[0])
    if target[1] is not None:
        protect.must_remove(fs, target[0], target[1])


def _check(node: Node, new_parent: Node, new_name: bytes, target: Node | None, flags: int) -> None:
    if new_parent.children is None:
        raise os_error(errno.ENOTDIR, new_parent.name)
    if new_parent.dead:
        raise os_error(errno.ENOENT, new_name)
    walk: Node | None = new_parent
    while node.is_dir and walk is not None:
        if walk is node:
            raise os_error(errno.EINVAL, new_name)
        walk = walk.parent
    if flags & RENAME_EXCHANGE:
        if target is None:
            raise os_error(errno.ENOENT, new_name)
        return
    if target is None:
        return
    if flags & RENAME_NOREPLACE:
        raise os_error(errno.EEXIST, new_name)
    if target is node:
        return
    if node.is_dir and not target.is_dir:
        raise os_error(errno.ENOTDIR, new_name)
    if target.is_dir and not node.is_dir:
        raise os_error(errno.EISDIR, new_name)


def _bring_up(fs: OverlayFs, node: Node, parent: Node, name: bytes) -> None:
    """Make sure that the inode is in the upper under exactly this name."""
    fs.nodes.rename(node, parent, name)
    copy_up_meta(fs, node)
    if node.metacopy and node.partial is None and needs_data(fs, node, fs.stat(node)):
        copy_up(fs, node)  # it was small enough to be copied, but only its attributes had been changed
    link_alias(fs, node, parent, name)


def _make_replaceable(fs: OverlayFs, target: Node, parent: Node, name: bytes, seen: Seen | None) -> bool:
    """Prepare a target to be replaced; return whether it loses its last name."""
    if target.is_dir:
        assert seen is not None
        if not seen.bare:
            _empty(fs, target, parent, name)
        return True
    attr = fs.stat(target)
    last = names_of(target, attr) <= 1
    if target.indexed is not None or (target.upper is None and attr.st_nlink > 1 and fs.index is not None):
        _bring_up(fs, target, parent, name)
        note_nlink(fs, target)
    return last


def _empty(fs: OverlayFs, target: Node, parent: Node, name: bytes) -> None:
    """Replace a directory that contains only whiteouts by an empty opaque one (ovl_clear_empty())."""
    attr = fs.upper.stat(target.upper)
    with made_aside(fs, directory=True) as temporary:
        made = fs.upper.mkdir(fs.work, temporary, stat.S_IMODE(attr.st_mode), attr.st_uid, attr.st_gid)
        fs.note(made, fs.format.opaque, OPAQUE)
        fs.upper.rename(
            (fs.work, temporary), (parent.upper, name), RENAME_EXCHANGE, moved=made, replaced=target.upper
        )
    old, target.upper, target.lowers = target.upper, made, ()
    fs.upper.forget(old)
    whiteout.throw_away(fs, temporary, None)


_Place = tuple[Node, bytes, Node]
_Target = tuple[Node, bytes, Node | None]


def _exchange(fs: OverlayFs, one: _Place, other: _Place) -> None:
    _mark(fs, one[2], one[0], other[0], other[1])
    _mark(fs, other[2], other[0], one[0], one[1])
    fs.upper.rename(
        (one[0].upper, one[1]),
        (other[0].upper, other[1]),
        RENAME_EXCHANGE,
        moved=one[2].upper,
        replaced=other[2].upper,
    )
    fs.nodes.rename(one[2], other[0], other[1])
    fs.nodes.rename(other[2], one[0], one[1])


def _mark(fs: OverlayFs, node: Node, parent: Node, new_parent: Node, new_name: bytes) -> None:
    """Mark a node that will be moved with where its lower part is, as seen from its new place."""
    if node.is_dir and not node.lowers:
        if new_parent.is_merged and lower_has(fs, new_parent, new_name):
            fs.note(node.upper, fs.format.opaque, OPAQUE)
        return
    if node.is_dir or node.metacopy:
        # A relative redirect would be wrong for the other names of a hard link.
        relative = parent is new_parent and node.indexed is None
        redirect = redirects.of(node, same_directory=relative)
        if redirect != node.redirect:
            fs.note(node.upper, fs.format.redirect, redirect)
            node.redirect = redirect
    if not new_parent.is_merged:
        with suppress(OSError):  # a hint to the kernel's readdir that inode numbers differ
            fs.note(new_parent.upper, fs.format.impure, IMPURE)


def _move(fs: OverlayFs, source: _Place, target: _Target) -> None:
    """Do the rename itself, and hide what a lower has at the old place."""
    parent, name, node = source
    new_parent, new_name, replaced = target
    old, new = (parent.upper, name), (new_parent.upper, new_name)
    key: Key | None = replaced.upper if replaced is not None else None
    covered = parent.is_merged and lower_has(fs, parent, name)
    there = fs.upper.lookup(*new) if replaced is None or replaced.upper is None else None
    if there is not None and fs.is_whiteout(*there) and (covered or node.is_dir):
        fs.upper.rename(old, new, RENAME_EXCHANGE, moved=node.upper)
        if not covered:
            with suppress(OSError):  # a whiteout where nothing is below hides nothing
                fs.upper.unlink(parent.upper, name, None)
        return
    if not covered:
        fs.upper.rename(old, new, moved=node.upper, replaced=key)
        return
    try:
        fs.upper.rename(old, new, RENAME_WHITEOUT, moved=node.upper, replaced=key)
    except OSError as failure:
        if failure.errno not in {errno.EINVAL, errno.EPERM} or replaced is not None:
            raise
        # A filesystem without RENAME_WHITEOUT: a whiteout where nothing is hides nothing.
        whiteout.make(fs, new_parent.upper, new_name)
        fs.upper.rename(old, new, RENAME_EXCHANGE, moved=node.upper)
