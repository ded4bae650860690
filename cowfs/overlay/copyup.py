"""Copy-up: how a lower inode becomes an upper one, whole or not at all (the kernel's copy_up.c).

Everything is made ready under a temporary name in the work directory and then renamed into place. The
data goes in before the xattrs, since writing drops ``security.capability``; the owner before the mode,
since chown(2) drops set-ID bits; the times last.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from cowfs.layers.base import Key, LowerLayer
from cowfs.linux import files
from cowfs.overlay import origin, partial
from cowfs.overlay.handle import Reader
from cowfs.overlay.node import Node
from cowfs.overlay.state import State, Steps, count_in, error
from cowfs.types import Attr

_MAY_FAIL = {errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL}


_Place = tuple[Node, bytes]
Xattr = tuple[bytes, bytes]


class _Original(NamedTuple):
    """A lower inode: what is read of it before anything is made in the upper."""

    attr: Attr
    xattrs: Sequence[Xattr]
    origin: bytes
    index_name: bytes | None
    """Where the inode is put in the index; None when it is no hard link, or there is no index."""
    place: bytes = b""
    """Which inode it is of those with its handle, if a layer knows that there may be others."""


class CopyUp:
    """One regular file on its way up.

    :meth:`run` may be called in any thread and blocks; everything else belongs to the thread of the
    union. Meanwhile the node is as it was, and must be neither changed nor removed by anybody else.
    """

    def __init__(self, fs: State, node: Node, attr: Attr, size: int) -> None:
        self._fs = fs
        self._node = node
        self._original = _read(fs, node, attr)
        self.size = size
        """How many bytes of the data are wanted."""
        # A lookup of another name may change the node's meanwhile.
        self._place = None if node.dead else _place_of(fs, node)
        self._temporary = fs.temporary()
        layer, key = node.lowers[-1]
        self._source = fs.lowers[layer].open(key, os.O_RDONLY)
        try:
            self._key, self._target = fs.upper.create(
                fs.work, self._temporary, stat.S_IMODE(attr.st_mode), attr.st_uid, attr.st_gid
            )
        except BaseException:
            self._source.close()
            raise

    def run(self) -> None:
        """Copy the data, holes and all. Blocks; raises what reading or writing does."""
        self._source.copy_to(self._target, self.size)
        if self._fs.options.sync_copy_up:
            self._target.fsync(datasync=True)

    def commit(self) -> None:
        """Give the node its upper. After an exception the node is as it was."""
        fs, node = self._fs, self._node
        try:
            self._close()
            _dress(fs, self._key, self._original)
            _settle(fs, node, self._place, self._key, self._temporary, self._original)
        except BaseException:
            self.abort()
            raise
        node.metacopy = False
        _adopt(fs, node, self._key)

    def abort(self) -> None:
        """Remove what was made so far."""
        self._source.close()
        with suppress(OSError):
            self._fs.upper.unlink(self._fs.work, self._temporary, None)
        if self._target.fileno() >= 0:  # what was copied is freed now, by the kernel
            self._fs.upper.later(self._target.close)
        else:
            self._target.close()

    def _close(self) -> None:
        self._source.close()
        self._target.close()


class DataCopyUp:
    """The data of a metacopy on its way up: into the inode that is there already.

    The note that makes it a metacopy is taken away last, so a crash before leaves the metacopy.
    """

    def __init__(self, fs: State, node: Node, size: int) -> None:
        self._fs = fs
        self._node = node
        self.size = size
        layer, key = node.lowers[-1]
        self._before = partial.Before(fs, node.upper)
        self._source = fs.lowers[layer].open(key, os.O_RDONLY)
        try:
            self._target = fs.upper.open(node.upper, os.O_RDWR)
        except BaseException:
            self._source.close()
            raise

    def run(self) -> None:
        """Copy the data; if that fails, give back the room that it took. Blocks."""
        try:
            self._source.copy_to(self._target, self.size)
            if self.size < self._before.attr.st_size:  # or what is behind would be zeros until it is cut
                self._target.truncate(self.size)
            if self._fs.options.sync_copy_up:
                self._target.fsync(datasync=True)
        except BaseException:
            with suppress(OSError):
                self._target.truncate(0)
                self._target.truncate(self._before.attr.st_size)
            raise

    def commit(self) -> None:
        """Make the node an ordinary upper file."""
        fs, node = self._fs, self._node
        self._source.close()
        self._target.close()
        self._before.restore()
        fs.upper.removexattr(node.upper, fs.x_metacopy)
        node.metacopy = False
        if node.redirect is not None:
            node.redirect = None
            with suppress(OSError):  # on a file that is no metacopy it means nothing
                fs.upper.removexattr(node.upper, fs.x_redirect)
        _switch_handles(fs, node)

    def abort(self) -> None:
        """Leave the metacopy as it was."""
        self._source.close()
        with suppress(OSError):
            self._before.restore()
        self._target.close()


def prepare(fs: State, node: Node, size: int | None = None) -> CopyUp | DataCopyUp | partial.Rest | None:
    """Begin to copy up a regular file with its first *size* bytes (all by default).

    Returns what is left to do: ``run``, then ``commit`` (or ``abort``); None when nothing is.
    """
    if node.upper is not None and not node.metacopy:
        return None
    if node.partial is not None:
        return partial.Rest(fs, node, size)
    attr = fs.stat(node)
    wanted = attr.st_size if size is None else min(size, attr.st_size)
    if node.upper is not None:
        return DataCopyUp(fs, node, wanted)
    if not node.dead:
        _parents(fs, node)
    return CopyUp(fs, node, attr, wanted)


def copy_up(fs: State, node: Node, size: int | None = None) -> None:
    """Copy up whatever *node* is, with its data, at once. Blocks for the time that it takes."""
    if stat.S_ISREG(node.mode):
        job = prepare(fs, node, size)
        if job is not None:
            try:
                job.run()
            except BaseException:
                job.abort()
                raise
            job.commit()
    else:
        copy_up_meta(fs, node)


def begin_lazily(fs: State, node: Node) -> bool:
    """Let a large file be written to, with its data to come up later; False if that cannot be."""
    if not fs.fill_unit or not stat.S_ISREG(node.mode) or (node.dead and node.partial is None):
        return False
    if node.upper is None:
        attr = fs.stat(node)
        if fs.notebook is None or len(fs.pending) >= partial.MOST or not partial.may_be(fs, node, attr):
            return False
        _parents(fs, node)
        _copy_up_inode(fs, node, attr)
    known = node.partial
    if not partial.begin(fs, node):
        return False
    if known is None:
        _switch_handles(fs, node)
    return True


def copy_up_meta(fs: State, node: Node) -> None:
    """Make sure that *node* has an upper inode to change attributes and names of.

    A large file's data stays where it is: a metacopy. A small one is copied whole.
    """
    if node.upper is not None:
        return
    if node.is_dir:
        _parents(fs, node)
        _copy_up_directory(fs, node)
        return
    attr = fs.stat(node)
    metacopy_from = 1 if fs.data_waits(node) else fs.options.metacopy_from
    if stat.S_ISREG(attr.st_mode) and attr.st_size < metacopy_from:
        copy_up(fs, node)
        return
    if not node.dead:
        _parents(fs, node)
    _copy_up_inode(fs, node, attr)


def link_alias(fs: State, node: Node, parent: Node, name: bytes) -> None:
    """Give an indexed inode a name of its in the upper, where it shows only through the index so far.

    Whatever removes or moves that name needs it there.
    """
    if node.indexed is None:
        return
    copy_up_directory(fs, parent)
    if fs.upper.lookup(parent.upper, name) is not None:
        return
    # One more name in the upper, none in the union, whose directory has not changed.
    before = fs.upper.stat(parent.upper)
    note_nlink(fs, node, alone=True)
    fs.upper.link(node.upper, parent.upper, name)
    fs.upper.utimens(parent.upper, before.st_atime_ns, before.st_mtime_ns)


def note_nlink(fs: State, node: Node, *, alone: bool = False) -> None:
    """Write down how many names an indexed inode has in the union, before some operation changes them.

    For one that adds to the upper's nlink *alone*, relative to the lower's; for one that changes both
    alike, relative to the upper's: right before and after it either way.
    """
    if node.indexed is None:
        return
    links = _links_of_lower(fs, node) if alone else None
    if links is not None:
        note = b"L%+d" % (node.indexed - links)
    else:
        upper = fs.upper.stat(node.upper).st_nlink + alone
        note = b"U%+d" % (node.indexed - upper)
    fs.note(node.upper, fs.x_nlink, note)


def _links_of_lower(fs: State, node: Node) -> int | None:
    """Return the nlink of the lower inode, which we noted; None if the kernel copied it up."""
    try:
        return count_in(fs.upper.getxattr(node.upper, fs.x_links))
    except OSError as failure:
        if failure.errno != errno.ENODATA:
            raise
        return None


def copy_up_directory(fs: State, node: Node) -> None:
    """Make sure that a directory, and those above it, are in the upper."""
    if node.upper is None:
        _parents(fs, node)
        _copy_up_directory(fs, node)


def copy_up_chain(fs: State, node: Node | None) -> Steps[None]:
    """Copy up a directory and all above it, one in each step, the topmost first."""
    missing = []
    while node is not None and node.upper is None:
        missing.append(node)
        node = node.parent
    for directory in reversed(missing):
        above = directory.parent
        if above is None or above.upper is None or directory.dead:
            return  # it was moved or removed meanwhile: whoever needs it, sees to it
        if directory.upper is None:
            _copy_up_directory(fs, directory)
        yield None


def _place_of(fs: State, node: Node) -> _Place:
    """Return a name that the node has, for a hard link whichever is known."""
    found = fs.nodes.place(node)
    if found is None:
        raise error(errno.ENOENT, node.name)
    return found


def _parents(fs: State, node: Node) -> None:
    _place_of(fs, node)
    missing = []
    walk = node.parent
    while walk is not None and walk.upper is None:
        missing.append(walk)
        walk = walk.parent
    for directory in reversed(missing):
        if directory.dead:
            raise error(errno.ENOENT, directory.name)
        _copy_up_directory(fs, directory)


def _copy_up_directory(fs: State, node: Node) -> None:
    layer, key = node.lowers[0]
    attr = fs.lowers[layer].stat(key)
    original = _read(fs, node, attr)
    temporary = fs.temporary()
    made = fs.upper.mkdir(fs.work, temporary, 0o700, attr.st_uid, attr.st_gid)
    try:
        _dress(fs, made, original)
        with suppress(OSError):  # only a hint to the kernel's readdir
            fs.note(made, fs.x_impure, b"y")
        _settle(fs, node, _place_of(fs, node), made, temporary, original)
    except BaseException:
        with suppress(OSError):
            fs.upper.rmdir(fs.work, temporary, None)
        raise
    node.upper = made


def _copy_up_inode(fs: State, node: Node, attr: Attr) -> None:
    """Copy up a symlink, a device, or a regular file without its data."""
    layer, key = node.lowers[0]
    original = _read(fs, node, attr)
    target = fs.lowers[layer].readlink(key) if stat.S_ISLNK(attr.st_mode) else b""
    temporary = fs.temporary()
    upper, work = fs.upper, fs.work
    is_file = stat.S_ISREG(attr.st_mode)
    if stat.S_ISLNK(attr.st_mode):
        made = upper.symlink(work, temporary, target, attr.st_uid, attr.st_gid)
    elif is_file:
        made, file = upper.create(work, temporary, stat.S_IMODE(attr.st_mode), attr.st_uid, attr.st_gid)
        file.close()
    else:
        made = upper.mknod(work, temporary, attr.st_mode, attr.st_rdev, attr.st_uid, attr.st_gid)
    try:
        if is_file:
            upper.truncate(made, attr.st_size)
            fs.note(made, fs.x_metacopy, b"")
        _dress(fs, made, original)
        place = None if node.dead else _place_of(fs, node)
        _settle(fs, node, place, made, temporary, original)
    except BaseException:
        with suppress(OSError):
            upper.unlink(work, temporary, None)
        raise
    node.metacopy = is_file
    _adopt(fs, node, made)


def _read(fs: State, node: Node, attr: Attr) -> _Original:
    """Return all that *node*, with the attributes *attr*, gives to its copy but data, or target, and name."""
    layer, key = node.lowers[0]
    xattrs = _xattrs_of(fs, fs.lowers[layer], key)
    handle = fs.lowers[layer].handle(key)
    hard_link = attr.st_nlink > 1 and not stat.S_ISDIR(attr.st_mode)
    if handle is None or (hard_link and fs.index is None):
        return _Original(attr, xattrs, b"", None)
    note = origin.encode(handle)
    if not hard_link:
        return _Original(attr, xattrs, note, None)
    return _Original(attr, xattrs, note, origin.index_name(note), handle.place)


def _dress(fs: State, key: Key, original: _Original) -> None:
    """Give the new inode everything of the old one but data and name."""
    upper, attr = fs.upper, original.attr
    _give_xattrs(fs, key, original.xattrs)
    acls = bool(original.xattrs)
    if not stat.S_ISLNK(attr.st_mode) and (acls or attr.st_mode & 0o7000 or not stat.S_ISREG(attr.st_mode)):
        upper.chmod(key, attr.st_mode)  # an ACL changes the mode, and chown(2) takes set-ID bits
    upper.utimens(key, attr.st_atime_ns, attr.st_mtime_ns)


def copy_xattrs(fs: State, layer: LowerLayer, source: Key, key: Key) -> None:
    """Copy all xattrs but the union's own; one that the upper cannot hold is left behind."""
    _give_xattrs(fs, key, _xattrs_of(fs, layer, source))


def _xattrs_of(fs: State, layer: LowerLayer, key: Key) -> list[Xattr]:
    """Return the xattrs of an inode but the union's own, and those that cannot be read."""
    try:
        names = layer.listxattr(key)
    except OSError as failure:
        if failure.errno in _MAY_FAIL:
            return []
        raise
    xattrs = []
    for name in names:
        if name.startswith(fs.options.xattr_prefix) and not name.startswith(fs.escaped):
            continue
        try:
            xattrs.append((name, layer.getxattr(key, name)))
        except OSError as failure:
            if failure.errno not in _MAY_FAIL:
                raise
    return xattrs


def _give_xattrs(fs: State, key: Key, xattrs: Sequence[Xattr]) -> None:
    for name, value in xattrs:
        try:
            fs.upper.setxattr(key, name, value)
        except OSError as failure:
            if failure.errno not in _MAY_FAIL:
                raise


def _settle(
    fs: State, node: Node, place: _Place | None, key: Key, temporary: bytes, original: _Original
) -> None:
    """Move what is ready from the work directory to the node's name; without one, it lives by its key."""
    upper = fs.upper
    if place is None:
        upper.unlink(fs.work, temporary, key)
        return
    parent, name = place
    if _is_taken(fs, original):
        original = original._replace(origin=b"", index_name=None)
    try:
        fs.note(key, fs.x_origin, original.origin)
    except OSError as failure:
        # user.* xattrs are not allowed on symlinks and devices (xattr(7)).
        if failure.errno not in {errno.EPERM, errno.EOPNOTSUPP}:
            raise
    else:
        if node.lowers[0][0]:
            fs.note(key, fs.x_layer, b"%d" % node.lowers[0][0])
    before = upper.stat(parent.upper)
    if original.index_name is not None and fs.index is not None:
        _settle_indexed(fs, node, place, key, temporary, original.index_name, original)
    else:
        upper.rename((fs.work, temporary), (parent.upper, name), files.RENAME_NOREPLACE, moved=key)
    # The directory has not changed as far as the merged tree is concerned.
    upper.utimens(parent.upper, before.st_atime_ns, before.st_mtime_ns)


def _is_taken(fs: State, original: _Original) -> bool:
    """Whether the index has another lower inode, of the same number, in the place of this one."""
    if not original.place or original.index_name not in fs.indexed or fs.index is None:
        return False
    found = fs.upper.lookup(fs.index, original.index_name)
    return found is not None and not fs.came_from(found[0], original.place)


def _settle_indexed(
    fs: State, node: Node, place: _Place, key: Key, temporary: bytes, index_name: bytes, original: _Original
) -> None:
    """Put a hard link into the index, and from there under its name."""
    parent, name = place
    fs.note(key, fs.x_nlink, b"L+0")
    fs.note(key, fs.x_links, b"%d" % original.attr.st_nlink)
    if original.place:
        fs.note(key, fs.x_place, original.place)
    fs.upper.rename((fs.work, temporary), (fs.index, index_name), moved=key)
    fs.indexed.add(index_name)
    node.indexed = original.attr.st_nlink
    fs.upper.link(key, parent.upper, name)


def _adopt(fs: State, node: Node, key: Key) -> None:
    node.upper = key
    _switch_handles(fs, node)


def _switch_handles(fs: State, node: Node) -> None:
    """Let the files that are open for reading see from now on what is written to the upper."""
    handles = node.handles
    if handles is None or (node.metacopy and node.partial is None):  # its data is where it was
        return
    reading = [handle for handle in handles if not handle.writable]
    if reading:
        reader = handles.reader = Reader(partial.open_data(fs, node, os.O_RDONLY))
        for handle in reading:
            handle.replace(reader)
