"""Copy-up: how a lower inode becomes an upper one, whole or not at all (the kernel's copy_up.c).

An upper that supports it creates a small file in one step (:mod:`cowfs.overlay.whole`). Everything else is
prepared under a temporary name in the work directory and then renamed into place. The data is written before
the xattrs, because a write removes ``security.capability``; the owner is set before the mode, because
chown(2) clears set-ID bits; the times are set last.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from cowfs.errors import os_error
from cowfs.layers.base import Key
from cowfs.overlay import partial
from cowfs.overlay.fs import OverlayFs, Steps
from cowfs.overlay.install import install, place_of, set_upper, show_to_handles
from cowfs.overlay.node import Node
from cowfs.overlay.original import copy_attributes, read_original
from cowfs.overlay.whole import copy_directory, copy_inode, copy_whole, needs_data
from cowfs.overlay.work import made_aside
from cowfs.overlay.xattr_format import METACOPY, make_nlink, parse_count
from cowfs.types import Attr


class CopyUp:
    """One regular file on its way up.

    Any thread may call :meth:`run`, which blocks; only the thread of the union may call the rest. Until
    :meth:`commit`, the node is unchanged, and nobody else may change or remove it.
    """

    def __init__(self, fs: OverlayFs, node: Node, attr: Attr, size: int) -> None:
        self._fs = fs
        self._node = node
        self._original = read_original(fs, node, attr)
        self.size = size
        """How many bytes of the data are wanted."""
        # Meanwhile, a lookup of another name may change the node's.
        self._place = None if node.dead else place_of(fs, node)
        self._temporary = fs.temporary()
        layer, key = node.lowers[-1]
        # Do not read an empty file: its owner may not have permission to.
        self._source = fs.lowers[layer].open(key, os.O_RDONLY) if size else None
        try:
            self._key, self._target = fs.upper.create(
                fs.work, self._temporary, stat.S_IMODE(attr.st_mode), attr.st_uid, attr.st_gid
            )
        except BaseException:
            self._close_source()
            raise

    def run(self) -> None:
        """Copy the data, and keep its holes. Blocks; raises what reading or writing raises."""
        if self._source is not None:
            self._source.copy_to(self._target, self.size)
            if self._fs.options.sync_copy_up:
                self._target.fsync(datasync=True)

    def commit(self) -> None:
        """Install the copy as the node's upper inode. After an exception, the node is unchanged."""
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
        if self._target.fileno() >= 0:  # the kernel frees the copied data now
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
    """Copies the data of a metacopy into its upper inode.

    The note that makes it a metacopy is removed last, so a crash before that leaves the metacopy.
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
        """Copy the data; if that fails, free the space that it took. Blocks."""
        try:
            self._source.copy_to(self._target, self.size)
            if self.size < self._before.attr.st_size:  # else the end would be zeros until the size is set
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
            with suppress(OSError):  # it means nothing on a file that is not a metacopy
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

    Return the remaining work, whose ``run`` and then ``commit`` (or ``abort``) the caller calls; None if
    none.
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
    """Copy up *node* of any type, with its data. Blocks until it is done."""
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
    """Prepare a large file for writing, and copy its data up later; False if that is not possible."""
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


def copy_up_meta(fs: OverlayFs, node: Node, *, in_place: bool = False) -> None:
    """Make sure that *node* has an upper inode, whose attributes and names can be changed.

    A large file becomes a metacopy: its data stays in the lower. A small file is copied whole, unless it
    keeps its names and xattrs (*in_place*).
    """
    if node.upper is not None:
        return
    if node.is_dir:
        if not node.dead:
            _parents(fs, node)
        _copy_up_directory(fs, node)
        return
    attr = fs.stat(node)
    whole = needs_data(fs, node, attr, in_place=in_place)
    if not node.dead:
        _parents(fs, node)
    if whole:
        if not copy_whole(fs, node, attr, attr.st_size):
            _do(CopyUp(fs, node, attr, attr.st_size))
    else:
        _copy_up_inode(fs, node, attr)


def link_alias(fs: OverlayFs, node: Node, parent: Node, name: bytes) -> None:
    """Create a name of an indexed inode in the upper that so far shows only through the index.

    Removing or moving that name requires that it exists in the upper.
    """
    if node.indexed is None:
        return
    copy_up_directory(fs, parent)
    if fs.upper.lookup(parent.upper, name) is not None:
        return
    # The upper gets one more name, the union does not: its directory is unchanged.
    before = fs.upper.stat(parent.upper)
    note_nlink(fs, node, alone=True)
    fs.upper.link(node.upper, parent.upper, name)
    fs.upper.utimens(parent.upper, before.st_atime_ns, before.st_mtime_ns)


def note_nlink(fs: OverlayFs, node: Node, *, alone: bool = False) -> None:
    """Record how many names an indexed inode has in the union, before an operation changes that.

    If the operation changes the upper's nlink *alone*, record it relative to the lower's nlink; if it changes
    both alike, relative to the upper's. Either way, the record is right before and after the operation.
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
    """Record how many names an indexed inode has in the union, after an operation changed that."""
    note_nlink(fs, node, alone=_links_of_lower(fs, node) is not None)


def _links_of_lower(fs: OverlayFs, node: Node) -> int | None:
    """Return the recorded nlink of the lower inode; None if the kernel copied it up."""
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
    """Copy up a directory and all directories above it, one per step, the topmost first."""
    missing = []
    while node is not None and node.upper is None:
        missing.append(node)
        node = node.parent
    for directory in reversed(missing):
        above = directory.parent
        if above is None or above.upper is None or directory.dead:
            return  # moved or removed meanwhile: the caller that needs it handles that
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
            raise os_error(errno.ENOENT, directory.name)
        _copy_up_directory(fs, directory)


def _copy_up_directory(fs: OverlayFs, node: Node) -> None:
    layer, key = node.lowers[0]
    attr = fs.lowers[layer].stat(key)
    node.upper = copy_directory(fs, node, attr) or _make_directory(fs, node, attr)
    if not node.dead:
        fs.covers(node.parent)


def _make_directory(fs: OverlayFs, node: Node, attr: Attr) -> Key:
    original = read_original(fs, node, attr)
    with made_aside(fs, directory=True) as temporary:
        made = fs.upper.mkdir(fs.work, temporary, 0o700, attr.st_uid, attr.st_gid)
        copy_attributes(fs, made, original)
        install(fs, node, None if node.dead else place_of(fs, node), made, temporary, original)
    return made


def _copy_up_inode(fs: OverlayFs, node: Node, attr: Attr) -> None:
    """Copy up a symlink, a device, or a regular file without its data."""
    is_file = stat.S_ISREG(attr.st_mode)
    if is_file and copy_inode(fs, node, attr):
        return
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
    """Create an inode in the work directory, with the type and owner of *node*."""
    upper, work, owner = fs.upper, fs.work, (attr.st_uid, attr.st_gid)
    if stat.S_ISLNK(attr.st_mode):
        layer, key = node.lowers[0]
        return upper.symlink(work, temporary, fs.lowers[layer].readlink(key), *owner)
    stand_in = stat.S_ISCHR(attr.st_mode) and not attr.st_rdev  # frozen: the device would hide what is below
    if not stand_in and not stat.S_ISREG(attr.st_mode):
        return upper.mknod(work, temporary, attr.st_mode, attr.st_rdev, *owner)
    made, file = upper.create(work, temporary, stat.S_IMODE(attr.st_mode), *owner)
    file.close()
    if stand_in:
        fs.note(made, fs.format.device, b"c0:0")
    return made
