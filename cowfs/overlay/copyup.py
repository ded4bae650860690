"""Copy-up: how a lower inode becomes an upper one, whole or not at all (the kernel's copy_up.c).

Where the upper takes a small file in one step, it gets that (:mod:`cowfs.overlay.whole`). Everything else is
made ready under a temporary name in the work directory and then renamed into place. The data goes in before
the xattrs, since writing drops ``security.capability``; the owner before the mode, since chown(2) drops
set-ID bits; the times last.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from cowfs.layers.base import Key
from cowfs.overlay import partial
from cowfs.overlay.fs import OverlayFs, Steps, error
from cowfs.overlay.install import install, place_of, set_upper, show_to_handles
from cowfs.overlay.node import Node
from cowfs.overlay.original import copy_attributes, read_original
from cowfs.overlay.whole import copy_whole
from cowfs.overlay.work import made_aside
from cowfs.overlay.xattr_format import METACOPY, make_nlink, parse_count
from cowfs.types import Attr


class CopyUp:
    """One regular file on its way up.

    :meth:`run` may be called in any thread and blocks; everything else belongs to the thread of the
    union. Meanwhile the node is as it was, and must be neither changed nor removed by anybody else.
    """

    def __init__(self, fs: OverlayFs, node: Node, attr: Attr, size: int) -> None:
        self._fs = fs
        self._node = node
        self._original = read_original(fs, node, attr)
        self.size = size
        """How many bytes of the data are wanted."""
        # A lookup of another name may change the node's meanwhile.
        self._place = None if node.dead else place_of(fs, node)
        self._temporary = fs.temporary()
        layer, key = node.lowers[-1]
        # An empty file is copied without reading it: its owner may not be allowed to.
        self._source = fs.lowers[layer].open(key, os.O_RDONLY) if size else None
        try:
            self._key, self._target = fs.upper.create(
                fs.work, self._temporary, stat.S_IMODE(attr.st_mode), attr.st_uid, attr.st_gid
            )
        except BaseException:
            self._close_source()
            raise

    def run(self) -> None:
        """Copy the data, holes and all. Blocks; raises what reading or writing does."""
        if self._source is not None:
            self._source.copy_to(self._target, self.size)
        if self._fs.options.sync_copy_up:
            self._target.fsync(datasync=True)

    def commit(self) -> None:
        """Give the node its upper. After an exception the node is as it was."""
        fs, node = self._fs, self._node
        try:
            self._close()
            copy_attributes(fs, self._key, self._original)
            install(fs, node, self._place, self._key, self._temporary, self._original)
        except BaseException:
            self.abort()
            raise
        node.metacopy = False
        set_upper(fs, node, self._key)

    def abort(self) -> None:
        """Remove what was made so far."""
        self._close_source()
        with suppress(OSError):
            self._fs.upper.unlink(self._fs.work, self._temporary, None)
        if self._target.fileno() >= 0:  # what was copied is freed now, by the kernel
            self._fs.upper.later(self._target.close)
        else:
            self._target.close()

    def _close(self) -> None:
        self._close_source()
        self._target.close()

    def _close_source(self) -> None:
        if self._source is not None:
            self._source.close()


class DataCopyUp:
    """The data of a metacopy on its way up: into the inode that is there already.

    The note that makes it a metacopy is taken away last, so a crash before leaves the metacopy.
    """

    def __init__(self, fs: OverlayFs, node: Node, size: int) -> None:
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
        fs.upper.removexattr(node.upper, fs.format.metacopy)
        node.metacopy = False
        if node.redirect is not None:
            node.redirect = None
            with suppress(OSError):  # on a file that is no metacopy it means nothing
                fs.upper.removexattr(node.upper, fs.format.redirect)
        show_to_handles(fs, node)

    def abort(self) -> None:
        """Leave the metacopy as it was."""
        self._source.close()
        with suppress(OSError):
            self._before.restore()
        self._target.close()


def prepare(fs: OverlayFs, node: Node, size: int | None = None) -> CopyUp | DataCopyUp | partial.Rest | None:
    """Begin to copy up a regular file with its first *size* bytes (all by default).

    Returns the remaining work: ``run``, then ``commit`` (or ``abort``); None if there is none.
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
    return None if copy_whole(fs, node, attr, wanted) else CopyUp(fs, node, attr, wanted)


def copy_up(fs: OverlayFs, node: Node, size: int | None = None) -> None:
    """Copy up whatever *node* is, with its data, at once. Blocks for the time that it takes."""
    if stat.S_ISREG(node.mode):
        job = prepare(fs, node, size)
        if job is not None:
            _do(job)
    else:
        copy_up_meta(fs, node)


def _do(job: CopyUp | DataCopyUp | partial.Rest) -> None:
    try:
        job.run()
    except BaseException:
        job.abort()
        raise
    job.commit()


def begin_lazily(fs: OverlayFs, node: Node) -> bool:
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
        show_to_handles(fs, node)
    return True


def copy_up_meta(fs: OverlayFs, node: Node) -> None:
    """Make sure that *node* has an upper inode to change attributes and names of.

    A large file's data stays where it is: a metacopy. A small one is copied whole.
    """
    if node.upper is not None:
        return
    if node.is_dir:
        if not node.dead:
            _parents(fs, node)
        _copy_up_directory(fs, node)
        return
    attr = fs.stat(node)
    metacopy_from = fs.options.metacopy_from
    metacopy = fs.options.metacopy and not fs.in_module(node)
    if metacopy and fs.data_waits(node):
        metacopy_from = 1
    if not node.dead:
        _parents(fs, node)
    if stat.S_ISREG(attr.st_mode) and (attr.st_size < metacopy_from or not metacopy):
        if not copy_whole(fs, node, attr, attr.st_size):
            _do(CopyUp(fs, node, attr, attr.st_size))
    else:
        _copy_up_inode(fs, node, attr)


def link_alias(fs: OverlayFs, node: Node, parent: Node, name: bytes) -> None:
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


def note_nlink(fs: OverlayFs, node: Node, *, alone: bool = False) -> None:
    """Write down how many names an indexed inode has in the union, before some operation changes them.

    For one that adds to the upper's nlink *alone*, relative to the lower's; for one that changes both
    alike, relative to the upper's: right before and after it either way.
    """
    if node.indexed is None:
        return
    links = _links_of_lower(fs, node) if alone else None
    if links is not None:
        note = make_nlink(b"L", node.indexed - links)
    else:
        upper = fs.upper.stat(node.upper).st_nlink + alone
        note = make_nlink(b"U", node.indexed - upper)
    fs.note(node.upper, fs.format.nlink, note)


def write_nlink(fs: OverlayFs, node: Node) -> None:
    """Write down how many names an indexed inode has in the union, after something has changed that."""
    note_nlink(fs, node, alone=_links_of_lower(fs, node) is not None)


def _links_of_lower(fs: OverlayFs, node: Node) -> int | None:
    """Return the nlink of the lower inode, which we noted; None if the kernel copied it up."""
    try:
        return parse_count(fs.noted(node.upper, fs.format.links))
    except OSError as failure:
        if failure.errno != errno.ENODATA:
            raise
        return None


def copy_up_directory(fs: OverlayFs, node: Node) -> None:
    """Make sure that a directory, and those above it, are in the upper."""
    if node.upper is None:
        _parents(fs, node)
        _copy_up_directory(fs, node)


def copy_up_chain(fs: OverlayFs, node: Node | None) -> Steps[None]:
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


def _parents(fs: OverlayFs, node: Node) -> None:
    place_of(fs, node)
    missing = []
    walk = node.parent
    while walk is not None and walk.upper is None:
        missing.append(walk)
        walk = walk.parent
    for directory in reversed(missing):
        if directory.dead:
            raise error(errno.ENOENT, directory.name)
        _copy_up_directory(fs, directory)


def _copy_up_directory(fs: OverlayFs, node: Node) -> None:
    layer, key = node.lowers[0]
    attr = fs.lowers[layer].stat(key)
    original = read_original(fs, node, attr)
    with made_aside(fs, directory=True) as temporary:
        made = fs.upper.mkdir(fs.work, temporary, 0o700, attr.st_uid, attr.st_gid)
        copy_attributes(fs, made, original)
        install(fs, node, None if node.dead else place_of(fs, node), made, temporary, original)
    node.upper = made
    if not node.dead:
        fs.covers(node.parent)


def _copy_up_inode(fs: OverlayFs, node: Node, attr: Attr) -> None:
    """Copy up a symlink, a device, or a regular file without its data."""
    is_file = stat.S_ISREG(attr.st_mode)
    original = read_original(fs, node, attr)
    with made_aside(fs) as temporary:
        made = _make(fs, node, temporary, attr)
        if is_file:
            fs.upper.truncate(made, attr.st_size)
            fs.note(made, fs.format.metacopy, METACOPY)
        copy_attributes(fs, made, original)
        install(fs, node, None if node.dead else place_of(fs, node), made, temporary, original)
    node.metacopy = is_file
    set_upper(fs, node, made)


def _make(fs: OverlayFs, node: Node, temporary: bytes, attr: Attr) -> Key:
    """Make an inode of the type and the owner that *node* has in the work directory."""
    upper, work, owner = fs.upper, fs.work, (attr.st_uid, attr.st_gid)
    if stat.S_ISLNK(attr.st_mode):
        layer, key = node.lowers[0]
        return upper.symlink(work, temporary, fs.lowers[layer].readlink(key), *owner)
    stand_in = stat.S_ISCHR(attr.st_mode) and not attr.st_rdev  # frozen: the device hides what is below
    if not stand_in and not stat.S_ISREG(attr.st_mode):
        return upper.mknod(work, temporary, attr.st_mode, attr.st_rdev, *owner)
    made, file = upper.create(work, temporary, stat.S_IMODE(attr.st_mode), *owner)
    file.close()
    if stand_in:
        fs.note(made, fs.format.device, b"c0:0")
    return made
