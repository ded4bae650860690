"""Making and removing names (the kernel's dir.c)."""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from cowfs.errors import os_error
from cowfs.layers.base import File, Key, QuickUpper
from cowfs.linux import files
from cowfs.overlay import acl, flags, partial, protect, whiteout
from cowfs.overlay.copyup import copy_up, copy_up_directory, copy_up_meta, link_alias, note_nlink
from cowfs.overlay.fs import OverlayFs
from cowfs.overlay.lookup import lower_has, resolve
from cowfs.overlay.nlink import names_of
from cowfs.overlay.node import Node
from cowfs.overlay.readdir import Seen, see
from cowfs.overlay.work import made_aside
from cowfs.overlay.xattr_format import OPAQUE, as_device, index_name
from cowfs.types import Attr


class Owner(NamedTuple):
    """The owner of a new inode."""

    uid: int
    gid: int


ROOT = Owner(0, 0)


def create(fs: OverlayFs, parent: Node, name: bytes, mode: int, owner: Owner) -> tuple[Node, Attr, File]:
    """Create an empty regular file and open it. The caller has applied the umask to *mode*."""
    files_: list[File] = []

    def make(directory: Key, name: bytes, owner: Owner) -> Key:
        key, file = fs.upper.create(directory, name, mode, *owner)
        files_.append(file)
        return key

    node, attr = _make(fs, parent, name, make, owner)
    return node, attr, files_[0]


def create_unnamed(fs: OverlayFs, parent: Node, mode: int, owner: Owner) -> tuple[Node, Attr, File]:
    """Create an empty regular file without a name, and open it (O_TMPFILE). :func:`link` can name it later.

    Until then it is in the work directory. If this mount ends uncleanly, the next mount removes it.
    """
    if parent.dead:  # creating a name gives ENOENT here (ext4_new_inode() in fs/ext4/ialloc.c)
        raise os_error(errno.EPERM, parent.name)
    _must_take(fs, parent, b"")
    copy_up_directory(fs, parent)
    above = fs.upper.stat(parent.upper)
    gid = above.st_gid if above.st_mode & stat.S_ISGID else owner.gid
    with made_aside(fs) as temporary:
        key, file = fs.upper.create(fs.work, temporary, mode, owner.uid, gid)
        try:
            acl.inherit(fs.upper, parent.upper, key, mode | stat.S_IFREG)
            flags.inherit(fs, parent.upper, key, mode | stat.S_IFREG)
            attr = fs.upper.stat(key)
        except BaseException:
            file.close()
            raise
    ino = fs.ino_of(0, fs.upper.dev, attr)
    node = Node(ino, attr.st_mode, None, b"", key, (), fs.generation_of(ino, attr))
    node.dead = True
    fs.unnamed[node] = temporary
    fs.nodes.add(node)
    return node, attr, file


def mkdir(fs: OverlayFs, parent: Node, name: bytes, mode: int, owner: Owner) -> tuple[Node, Attr]:
    """Create a directory. It is empty, whatever the lowers have under its name."""
    return _make(fs, parent, name, lambda d, n, o: fs.upper.mkdir(d, n, mode, *o), owner, directory=True)


def symlink(fs: OverlayFs, parent: Node, name: bytes, target: bytes, owner: Owner) -> tuple[Node, Attr]:
    """Create a symbolic link."""
    return _make(fs, parent, name, lambda d, n, o: fs.upper.symlink(d, n, target, *o), owner)


def mknod(fs: OverlayFs, parent: Node, name: bytes, mode: int, rdev: int, owner: Owner) -> tuple[Node, Attr]:
    """Create a device, fifo, socket or regular file."""
    mode |= 0 if stat.S_IFMT(mode) else stat.S_IFREG
    if stat.S_ISREG(mode) and fs.upper.has_descriptors:  # one leads to the new file, whoever takes its name
        node, attr, file = create(fs, parent, name, mode, owner)
        file.close()
        return node, attr
    if stat.S_ISCHR(mode) and rdev == 0:
        return _mknod_whiteout(fs, parent, name, mode, owner)
    return _make(fs, parent, name, lambda d, n, o: fs.upper.mknod(d, n, mode, rdev, *o), owner)


def _mknod_whiteout(fs: OverlayFs, parent: Node, name: bytes, mode: int, owner: Owner) -> tuple[Node, Attr]:
    """Create a device 0:0 that hides nothing here: a whiteout of an overlayfs whose upper is in this
    union."""
    _must_take(fs, parent, name)
    parent.added += 1
    found = fs.upper.lookup(parent.upper, name) if parent.upper is not None else None
    if found is not None or (parent.is_merged and lower_has(fs, parent, name)):
        _only_whiteout(fs, parent, name)
    copy_up_directory(fs, parent)

    def make(directory: Key, temporary: bytes, owner: Owner) -> Key:
        return _make_stand_in(fs, directory, temporary, mode, owner)

    key = _make_over_whiteout(fs, parent, name, make, owner, directory=False)
    return _device_at(fs, parent, name, key)


def _make_stand_in(fs: OverlayFs, directory: Key, name: bytes, mode: int, owner: Owner) -> Key:
    """Create the file that represents a device which the store cannot hold."""
    key, file = fs.upper.create(directory, name, stat.S_IMODE(mode), *owner)
    file.close()
    fs.note(key, fs.format.device, b"c0:0")
    return key


def _device_at(fs: OverlayFs, parent: Node, name: bytes, key: Key) -> tuple[Node, Attr]:
    attr = as_device(fs.upper.stat(key))
    ino = fs.ino_of(0, fs.upper.dev, attr)
    node = Node(ino, attr.st_mode, parent, name, key, (), fs.generation_of(ino, attr))
    fs.nodes.add(node)
    return node, attr


def prepare_whiteout(fs: OverlayFs, parent: Node, owner: Owner) -> tuple[bytes, Key]:
    """Create the whiteout for :func:`leave_whiteout`; return its temporary name and its key."""
    temporary = fs.temporary()
    above = fs.upper.stat(parent.upper)
    if above.st_mode & stat.S_ISGID:
        owner = Owner(owner.uid, above.st_gid)
    return temporary, _make_stand_in(fs, fs.work, temporary, 0, owner)


def leave_whiteout(fs: OverlayFs, parent: Node, name: bytes, prepared: tuple[bytes, Key]) -> None:
    """Put a prepared whiteout at a name that was renamed."""
    temporary, key = prepared
    fs.upper.rename((fs.work, temporary), (parent.upper, name), moved=key)
    _device_at(fs, parent, name, key)


_Maker = Callable[[Key, bytes, Owner], Key]


def _make(
    fs: OverlayFs, parent: Node, name: bytes, maker: _Maker, owner: Owner, *, directory: bool = False
) -> tuple[Node, Attr]:
    _must_take(fs, parent, name)
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
                fs.note(key, fs.format.opaque, OPAQUE)
    attr = fs.upper.stat(key)
    ino = fs.ino_of(0, fs.upper.dev, attr)
    return _enter(fs, parent, name, key, attr.st_mode, ino, fs.generation_of(ino, attr)), attr


def _enter(fs: OverlayFs, parent: Node, name: bytes, key: Key, mode: int, ino: int, generation: int) -> Node:
    node = Node(ino, mode, parent, name, key, (), generation)
    node.protection = 0 if parent.protection == 0 else protect.inherited(parent, mode)
    fs.nodes.add(node)
    return node


def add_file(
    fs: OverlayFs, upper: QuickUpper, parent: Node, name: bytes, mode: int, owner: Owner
) -> Node | None:
    """Create an empty regular file in a directory that only the upper has; None: use :func:`create`.

    That is all that most new files need, so it is kept quick.
    """
    if parent.upper is None or parent.below != () or parent.dead or parent.protection != 0:
        return None
    made = upper.add_file(parent.upper, name, mode, *owner)
    if made is None:
        return None
    parent.added += 1
    key, generation = made
    ino = fs.ino_of_real(0, upper.dev, key)
    return _enter(fs, parent, name, key, mode, ino, fs.generation_from(ino, generation))


def _must_take(fs: OverlayFs, parent: Node, name: bytes) -> None:
    if parent.children is None:
        raise os_error(errno.ENOTDIR, parent.name)
    if parent.dead:
        raise os_error(errno.ENOENT, name)
    protect.must_add(fs, parent)


def _only_whiteout(fs: OverlayFs, parent: Node, name: bytes) -> None:
    """EEXIST unless the upper has a whiteout under the name."""
    found = fs.upper.lookup(parent.upper, name) if parent.upper is not None else None
    if found is None or not fs.is_whiteout(*found):
        raise os_error(errno.EEXIST, name)


def _make_over_whiteout(
    fs: OverlayFs, parent: Node, name: bytes, maker: _Maker, owner: Owner, *, directory: bool
) -> Key:
    """Create the new inode in the work directory, then replace the whiteout with it."""
    above = fs.upper.stat(parent.upper)
    inherit = bool(above.st_mode & stat.S_ISGID)
    place = (parent.upper, name)
    with made_aside(fs, directory=directory) as temporary:
        key = maker(fs.work, temporary, Owner(owner.uid, above.st_gid) if inherit else owner)
        mode = fs.upper.stat(key).st_mode
        acl.inherit(fs.upper, parent.upper, key, mode)
        flags.inherit(fs, parent.upper, key, mode)
        if directory:
            if inherit:
                fs.upper.chmod(key, fs.upper.stat(key).st_mode | stat.S_ISGID)
            fs.note(key, fs.format.opaque, OPAQUE)
            fs.upper.rename((fs.work, temporary), place, files.RENAME_EXCHANGE, moved=key)
            with suppress(OSError):  # the whiteout is now in the work directory, and hides nothing
                fs.upper.unlink(fs.work, temporary, None)
        else:
            fs.upper.rename((fs.work, temporary), place, moved=key)
    return key


def link(fs: OverlayFs, node: Node, parent: Node, name: bytes) -> Attr:
    """Give a file another name."""
    _must_take(fs, parent, name)
    if node.is_dir:
        raise os_error(errno.EPERM, name)
    protect.must_change(fs, node)
    parent.added += 1
    covered = parent.is_merged and lower_has(fs, parent, name)
    if covered:
        _only_whiteout(fs, parent, name)
    copy_up(fs, node)  # with its data: a metacopy finds its data by one name only
    copy_up_directory(fs, parent)
    note_nlink(fs, node)
    temporary = fs.unnamed.get(node)
    try:
        if temporary is not None:
            _name(fs, node, temporary, (parent.upper, name), covered=covered)
        elif covered:
            _link_over_whiteout(fs, node, parent, name)
        else:
            fs.upper.link(node.upper, parent.upper, name)
    except FileExistsError:
        _only_whiteout(fs, parent, name)
        if temporary is not None:
            _name(fs, node, temporary, (parent.upper, name), covered=True)
        else:
            _link_over_whiteout(fs, node, parent, name)
    fs.nodes.rename(node, parent, name)
    node.dead = False
    if node.indexed is not None:
        node.indexed += 1
    return fs.stat(node)


def _name(fs: OverlayFs, node: Node, temporary: bytes, place: tuple[Key, bytes], *, covered: bool) -> None:
    """Give a file its first name. With *covered*, replace the whiteout there; else EEXIST if the name
    exists."""
    flags = 0 if covered else files.RENAME_NOREPLACE
    fs.upper.rename((fs.work, temporary), place, flags, moved=node.upper)
    del fs.unnamed[node]


def _link_over_whiteout(fs: OverlayFs, node: Node, parent: Node, name: bytes) -> None:
    with made_aside(fs) as temporary:
        fs.upper.link(node.upper, fs.work, temporary)
        fs.upper.rename((fs.work, temporary), (parent.upper, name))


def unlink(fs: OverlayFs, parent: Node, name: bytes) -> Node:
    """Remove a name that is not a directory's; return its node."""
    node = resolve(fs, parent, name)
    if node.is_dir:
        raise os_error(errno.EISDIR, name)
    protect.must_remove(fs, parent, node)
    attr = fs.stat(node)
    last = names_of(node, attr) <= 1
    _keep_count(fs, node, parent, name, attr)
    covered = parent.is_merged and lower_has(fs, parent, name)
    copy_up_directory(fs, parent)
    if not covered:
        fs.upper.unlink(parent.upper, name, node.upper)
    elif node.upper is not None:
        whiteout.replace(fs, parent, name, node)
    else:
        whiteout.make(fs, parent.upper, name)
    name_removed(fs, node, parent, name, last=last)
    return node


def remove_file(fs: OverlayFs, upper: QuickUpper, parent: Node, name: bytes, node: Node) -> bool:
    """Remove a name of a file that only the upper has, from a directory that only the upper has.

    Return False, and do nothing, if that needs :func:`unlink`.
    """
    if not (
        parent.upper is not None
        and parent.below == ()
        and parent.protection == 0
        and node.upper is not None
        and node.below == ()
        and node.protection == 0
        and node.others is None
        and node.indexed is None
        and node.partial is None
        and not (parent.dead or node.dead)
    ):
        return False
    if upper.remove_file(parent.upper, name, node.upper):
        fs.nodes.detach(parent, name)
        node.dead = True
        fs.release(node)
    else:
        name_removed(fs, node, parent, name, last=False)
    return True


def _keep_count(fs: OverlayFs, node: Node, parent: Node, name: bytes, attr: Attr) -> None:
    """Make sure that removing a name of an indexed hard link lowers its link count by one.

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


def name_removed(fs: OverlayFs, node: Node, parent: Node, name: bytes, *, last: bool) -> None:
    """Note that a name of *node* is removed; with its last name the node is dead."""
    fs.nodes.detach(parent, name)
    if not last:
        if node.indexed is not None:
            node.indexed -= 1
        rekey(fs, node)
        return
    last_removed(fs, node)


def last_removed(fs: OverlayFs, node: Node) -> None:
    """Note that *node* has no name any more: mark it dead, and remove it from the index."""
    node.dead = True
    partial.name_removed(fs, node)
    if node.indexed is not None:
        _leave_index(fs, node)
    fs.release(node)


def rekey(fs: OverlayFs, node: Node) -> None:
    """Use the key of a name that the node still has, if one is known: such a key costs no descriptor."""
    place = fs.nodes.place(node)
    if node.upper is None or place is None or place[0].upper is None:
        return
    parent, name = place
    with suppress(OSError):
        found = fs.upper.lookup(parent.upper, name)
        if found is not None and found[1].st_ino == fs.upper.stat(node.upper).st_ino:
            fs.upper.forget(node.upper)
            node.upper = found[0]


def _leave_index(fs: OverlayFs, node: Node) -> None:
    """Remove the inode from the index. Its lower names have whiteouts already, so no lookup needs the
    entry."""
    note = b""
    with suppress(OSError):
        note = fs.noted(node.upper, fs.format.origin)
    name = index_name(note)
    if name in fs.indexed and fs.index is not None:
        with suppress(OSError):
            fs.upper.unlink(fs.index_of(name), name, node.upper)
            fs.indexed.discard(name)
            if fs.companions is not None and name in fs.companions.names:
                fs.companions.leave(name)


def rmdir(fs: OverlayFs, parent: Node, name: bytes, seen: Seen | None = None) -> Node:
    """Remove a directory that shows no names; return its node.

    *seen* is an earlier result of :func:`look_through`; without it, the directory is read here.
    """
    node = resolve(fs, parent, name)
    if not node.is_dir:
        raise os_error(errno.ENOTDIR, name)
    protect.must_remove(fs, parent, node)
    if not see(fs, node, seen).empty:
        raise os_error(errno.ENOTEMPTY, name)
    covered = parent.is_merged and lower_has(fs, parent, name)
    copy_up_directory(fs, parent)
    if covered and node.upper is None:
        whiteout.make(fs, parent.upper, name)
        fs.covers(parent)
    elif covered:
        whiteout.replace(fs, parent, name, node)
    else:
        _remove_directory(fs, parent, name, node)
    fs.nodes.detach(parent, name)
    node.dead = True
    fs.release(node)
    return node


def _remove_directory(fs: OverlayFs, parent: Node, name: bytes, node: Node) -> None:
    try:
        fs.upper.rmdir(parent.upper, name, node.upper)
    except OSError as failure:
        if failure.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
        # It still contains whiteouts: move it out of the tree before removing them.
        temporary = fs.temporary()
        fs.upper.rename((parent.upper, name), (fs.work, temporary), moved=node.upper)
        whiteout.throw_away(fs, temporary, node)
