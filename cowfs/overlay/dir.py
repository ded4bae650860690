"""Making and removing names (the kernel's dir.c)."""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from cowfs.layers.base import File, Key
from cowfs.linux import files
from cowfs.overlay import acl, origin, partial, whiteout
from cowfs.overlay.copyup import copy_up, copy_up_directory, copy_up_meta, link_alias, note_nlink
from cowfs.overlay.lookup import lower_has, resolve
from cowfs.overlay.node import Node
from cowfs.overlay.readdir import Seen, see
from cowfs.overlay.state import State, error, is_whiteout
from cowfs.types import Attr


class Owner(NamedTuple):
    """Whom a new inode belongs to."""

    uid: int
    gid: int


def create(fs: State, parent: Node, name: bytes, mode: int, owner: Owner) -> tuple[Node, Attr, File]:
    """Make an empty regular file and open it. *mode* is taken as it is: the caller applies the umask."""
    files_: list[File] = []

    def make(directory: Key, name: bytes, owner: Owner) -> Key:
        key, file = fs.upper.create(directory, name, mode, *owner)
        files_.append(file)
        return key

    node, attr = _make(fs, parent, name, make, owner)
    return node, attr, files_[0]


def mkdir(fs: State, parent: Node, name: bytes, mode: int, owner: Owner) -> tuple[Node, Attr]:
    """Make a directory, empty whatever the lowers hold under its name."""
    return _make(fs, parent, name, lambda d, n, o: fs.upper.mkdir(d, n, mode, *o), owner, directory=True)


def symlink(fs: State, parent: Node, name: bytes, target: bytes, owner: Owner) -> tuple[Node, Attr]:
    """Make a symbolic link."""
    return _make(fs, parent, name, lambda d, n, o: fs.upper.symlink(d, n, target, *o), owner)


def mknod(fs: State, parent: Node, name: bytes, mode: int, rdev: int, owner: Owner) -> tuple[Node, Attr]:
    """Make a device, fifo, socket or regular file. EPERM for the device that is a whiteout."""
    if stat.S_ISREG(mode) or not stat.S_IFMT(mode):
        node, attr, file = create(fs, parent, name, mode, owner)
        file.close()
        return node, attr
    if stat.S_ISCHR(mode) and rdev == 0:
        raise error(errno.EPERM, name)
    return _make(fs, parent, name, lambda d, n, o: fs.upper.mknod(d, n, mode, rdev, *o), owner)


_Maker = Callable[[Key, bytes, Owner], Key]


def _make(
    fs: State, parent: Node, name: bytes, maker: _Maker, owner: Owner, *, directory: bool = False
) -> tuple[Node, Attr]:
    _must_live(parent, name)
    parent.added += 1
    covered = parent.is_merged and lower_has(fs, parent, name)
    if covered:
        _only_whiteout(fs, parent, name)
        key = _make_over_whiteout(fs, parent, name, maker, owner, directory=directory)
    else:
        copy_up_directory(fs, parent)
        try:
            key = maker(parent.upper, name, owner)
        except FileExistsError:
            _only_whiteout(fs, parent, name)
            key = _make_over_whiteout(fs, parent, name, maker, owner, directory=directory)
        else:
            if directory and parent.is_merged:
                fs.note(key, fs.x_opaque, b"y")
    attr = fs.upper.stat(key)
    node = Node(fs.ino_of(0, fs.upper.dev, attr), attr.st_mode, parent, name, key, ())
    fs.nodes.add(node)
    return node, attr


def _must_live(parent: Node, name: bytes) -> None:
    if parent.children is None:
        raise error(errno.ENOTDIR, parent.name)
    if parent.dead:
        raise error(errno.ENOENT, name)


def _only_whiteout(fs: State, parent: Node, name: bytes) -> None:
    """EEXIST unless a whiteout is what the upper has under the name."""
    found = fs.upper.lookup(parent.upper, name) if parent.upper is not None else None
    if found is None or not is_whiteout(found[1]):
        raise error(errno.EEXIST, name)


def _make_over_whiteout(
    fs: State, parent: Node, name: bytes, maker: _Maker, owner: Owner, *, directory: bool
) -> Key:
    """Make the new inode in the work directory, then let it take the whiteout's place."""
    above = fs.upper.stat(parent.upper)
    temporary = fs.temporary()
    inherit = bool(above.st_mode & stat.S_ISGID)
    key = maker(fs.work, temporary, Owner(owner.uid, above.st_gid) if inherit else owner)
    place = (parent.upper, name)
    try:
        acl.inherit(fs.upper, parent.upper, key, fs.upper.stat(key).st_mode)
        if directory:
            if inherit:
                fs.upper.chmod(key, fs.upper.stat(key).st_mode | stat.S_ISGID)
            fs.note(key, fs.x_opaque, b"y")
            fs.upper.rename((fs.work, temporary), place, files.RENAME_EXCHANGE, moved=key)
            with suppress(OSError):  # the whiteout, in the work directory now, hides nothing
                fs.upper.unlink(fs.work, temporary, None)
        else:
            fs.upper.rename((fs.work, temporary), place, moved=key)
    except BaseException:
        with suppress(OSError):
            (fs.upper.rmdir if directory else fs.upper.unlink)(fs.work, temporary, None)
        raise
    return key


def link(fs: State, node: Node, parent: Node, name: bytes) -> Attr:
    """Give a file one more name."""
    _must_live(parent, name)
    if node.is_dir:
        raise error(errno.EPERM, name)
    parent.added += 1
    covered = parent.is_merged and lower_has(fs, parent, name)
    if covered:
        _only_whiteout(fs, parent, name)
    copy_up(fs, node)  # with its data: a metacopy finds it by one name only
    copy_up_directory(fs, parent)
    note_nlink(fs, node)
    try:
        if covered:
            _link_over_whiteout(fs, node, parent, name)
        else:
            fs.upper.link(node.upper, parent.upper, name)
    except FileExistsError:
        _only_whiteout(fs, parent, name)
        _link_over_whiteout(fs, node, parent, name)
    fs.nodes.rename(node, parent, name)
    node.dead = False
    if node.indexed is not None:
        node.indexed += 1
    return fs.stat(node)


def _link_over_whiteout(fs: State, node: Node, parent: Node, name: bytes) -> None:
    temporary = fs.temporary()
    fs.upper.link(node.upper, fs.work, temporary)
    try:
        fs.upper.rename((fs.work, temporary), (parent.upper, name))
    except BaseException:
        fs.upper.unlink(fs.work, temporary, None)
        raise


def unlink(fs: State, parent: Node, name: bytes) -> Node:
    """Remove a name that is not a directory's; return the node that it had."""
    node = resolve(fs, parent, name)
    if node.is_dir:
        raise error(errno.EISDIR, name)
    attr = fs.stat(node)
    last = fs.nlink(node, attr) <= 1
    _keep_count(fs, node, parent, name, attr)
    covered = parent.is_merged and lower_has(fs, parent, name)
    copy_up_directory(fs, parent)
    if not covered:
        fs.upper.unlink(parent.upper, name, node.upper)
    elif node.upper is not None:
        whiteout.replace(fs, parent, name, node)
    else:
        whiteout.make(fs, parent.upper, name)
    gone(fs, node, parent, name, last=last)
    return node


def _keep_count(fs: State, node: Node, parent: Node, name: bytes, attr: Attr) -> None:
    """See to it that removing a name of an indexed hard link takes one from its count.

    The count is kept relative to the names in the upper, so the name must be one of those.
    """
    hard_link = node.upper is None and attr.st_nlink > 1 and fs.index is not None
    if node.indexed is None and not hard_link:
        return
    fs.nodes.rename(node, parent, name)
    if hard_link:
        copy_up_meta(fs, node)
    else:
        link_alias(fs, node, parent, name)
    note_nlink(fs, node)


def gone(fs: State, node: Node, parent: Node, name: bytes, *, last: bool) -> None:
    """Note that a name of *node* is no more; with the last the node is dead."""
    fs.nodes.detach(parent, name)
    if not last:
        if node.indexed is not None:
            node.indexed -= 1
        _stand_elsewhere(fs, node)
        return
    node.dead = True
    partial.gone(fs, node)
    if node.indexed is not None:
        _leave_index(fs, node)
    fs.release(node)


def _stand_elsewhere(fs: State, node: Node) -> None:
    """Let the node's key be that of a name it still has, which costs no descriptor, if one is known."""
    place = fs.nodes.place(node)
    if node.upper is None or place is None or place[0].upper is None:
        return
    parent, name = place
    with suppress(OSError):
        found = fs.upper.lookup(parent.upper, name)
        if found is not None and found[1].st_ino == fs.upper.stat(node.upper).st_ino:
            fs.upper.forget(node.upper)
            node.upper = found[0]


def _leave_index(fs: State, node: Node) -> None:
    """Remove the inode from the index. Its lower names are whited out by now, so nobody asks there."""
    note = b""
    with suppress(OSError):
        note = fs.upper.getxattr(node.upper, fs.x_origin)
    name = origin.index_name(note)
    if name in fs.indexed and fs.index is not None:
        with suppress(OSError):
            fs.upper.unlink(fs.index, name, node.upper)
            fs.indexed.discard(name)


def rmdir(fs: State, parent: Node, name: bytes, seen: Seen | None = None) -> Node:
    """Remove a directory that shows no names; return the node that it had.

    *seen* is what was seen in it; else it is looked through here.
    """
    node = resolve(fs, parent, name)
    if not node.is_dir:
        raise error(errno.ENOTDIR, name)
    if not see(fs, node, seen).empty:
        raise error(errno.ENOTEMPTY, name)
    covered = parent.is_merged and lower_has(fs, parent, name)
    copy_up_directory(fs, parent)
    if covered and node.upper is None:
        whiteout.make(fs, parent.upper, name)
    elif covered:
        whiteout.replace(fs, parent, name, node)
    else:
        _remove_directory(fs, parent, name, node)
    fs.nodes.detach(parent, name)
    node.dead = True
    fs.release(node)
    return node


def _remove_directory(fs: State, parent: Node, name: bytes, node: Node) -> None:
    try:
        fs.upper.rmdir(parent.upper, name, node.upper)
    except OSError as failure:
        if failure.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
        # It still holds whiteouts: take it out of sight before they go.
        temporary = fs.temporary()
        fs.upper.rename((parent.upper, name), (fs.work, temporary), moved=node.upper)
        whiteout.throw_away(fs, temporary, node)
