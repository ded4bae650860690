"""An ext3 image as an upper layer, read and written in-process: no mount, no loop device, no privilege.

It does what the kernel's VFS does for a mounted filesystem: it sets the owners of new inodes, applies ACLs,
clears set-ID bits and capabilities on changes, and keeps inodes in use that have lost their names.
"""

from __future__ import annotations

import errno
import os
import stat
from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import NamedTuple

from cowfs.errors import NotYetFree, os_error
from cowfs.formats.ext3 import image as ext3
from cowfs.formats.ext3.directory import INO, AnyNames, LargeNames, type_of
from cowfs.formats.ext3.image import Image
from cowfs.layers import acl
from cowfs.layers.base import at_once, may_wait_for_disk
from cowfs.layers.ext3_file import Capabilities, Ext3File, InUse, Key
from cowfs.layers.ext3_reader import NAME_MAX, Ext3Reader
from cowfs.linux.files import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT
from cowfs.types import Atime, Attr


class _Inherit(NamedTuple):
    """What new inodes inherit from a directory."""

    gid: int
    """-1, except in a set-group-ID directory."""
    acl: bytes


_NOTHING = _Inherit(-1, b"")
_ALONE = nullcontext()


class Ext3Layer(Ext3Reader):
    """Serve an open image as a :class:`cowfs.layers.base.UpperLayer`; the layer owns it from now on."""

    def __init__(self, image: Image) -> None:
        super().__init__(image)
        self.fill_unit = 0 if image.read_only else self._block_size
        self._in_use = InUse(image)
        self._capabilities = Capabilities(image)
        self.atime = Atime()
        self.is_beyond_room = False
        """Whether the last ENOSPC was for attributes that fit into no inode, whatever the free space."""
        self.later: Callable[[Callable[[], None]], None] = at_once
        self.pressed = image.pressed
        self.hurry = image.hurry
        self.relieve = image.relieve

    # --- open files and keys

    def open(self, key: int, flags: int) -> Ext3File:
        """Open a regular file. EISDIR; ELOOP for a symlink, as with O_NOFOLLOW; ENXIO for the rest."""
        self._must_be_regular(key)
        if flags & os.O_ACCMODE != os.O_RDONLY and self.image.read_only:
            raise os_error(errno.EROFS)
        if flags & os.O_TRUNC:
            self.truncate(key, 0)
        return self._open(key, flags)

    def _open(self, ino: int, flags: int, *, is_new: bool = False) -> Ext3File:
        show = self.attributes
        return Ext3File(self.image, ino, flags, self._in_use, self._capabilities, show, is_new=is_new)

    def _must_be_regular(self, key: int) -> None:
        kind = stat.S_IFMT(self.image.raw(key)[0])
        if kind != stat.S_IFREG:
            raise os_error({stat.S_IFDIR: errno.EISDIR, stat.S_IFLNK: errno.ELOOP}.get(kind, errno.ENXIO))

    def forget(self, key: int) -> None:
        """Release a key. If it kept an inode without a name, free that inode once none of its files is
        open."""
        self._in_use.forgotten(key)

    def close(self) -> None:
        """Write everything to its final place and close the image. Raises any error of that."""
        self.image.close()

    # --- creating inodes

    def create(self, directory: int, name: bytes, mode: int, uid: int, gid: int) -> tuple[Key, Ext3File]:
        key = self._make(directory, name, stat.S_IFREG | mode & 0o7777, uid, gid)
        return key, self._open(key, os.O_RDWR, is_new=True)

    def add_file(self, directory: int, name: bytes, mode: int, uid: int, gid: int) -> tuple[Key, int] | None:
        names = self._names_for(directory, name)
        if (names.more or self._what_is_inherited(directory, names)) is not _NOTHING:
            return None
        return Key(self.image.create(directory, name, mode, uid, gid)), self.image.generation_of_new

    def plain(self, directory: int, names: Sequence[bytes]) -> list[tuple[Key, int, int]]:
        known = self.image.names(directory)
        if isinstance(known, LargeNames):
            return []
        values = array("I", [known.get(name, 0) & INO for name in names])
        found = self.image.plain(directory, values)
        return [
            (Key(ino), 0 if stat.S_ISDIR(mode) and known.is_twice(ino, name) else mode, generation)
            for name, ino, mode, generation in zip(names, values, found[::2], found[1::2], strict=True)
        ]

    def remove_file(self, directory: int, name: bytes, key: Key) -> bool:
        with self._in_use.lock:
            is_nameless = self.image.unlink(directory, name, keep=True)
            if is_nameless:
                self._in_use.lost_its_name(key, key)
        return is_nameless

    def copy_in(
        self,
        directory: int,
        name: bytes,
        attr: Attr,
        data: bytes | None,
        xattrs: Sequence[tuple[bytes, bytes]],
    ) -> Key:
        self._names_for(directory, name)
        mode = attr.st_mode
        fields, times = (mode, attr.st_uid, attr.st_gid), (attr.st_atime_ns, attr.st_mtime_ns)
        hole = attr.st_size if stat.S_ISREG(mode) else 0
        key = Key(self.image.copy(directory, name, fields, times, hole if data is None else data, xattrs))
        for attribute, _ in xattrs:
            self._capabilities.noted(attribute)
        return key

    def mkdir(self, directory: int, name: bytes, mode: int, uid: int, gid: int) -> Key:
        return self._make(directory, name, stat.S_IFDIR | mode & 0o1777, uid, gid)

    def symlink(self, directory: int, name: bytes, target: bytes, uid: int, gid: int) -> Key:
        if not target:
            raise os_error(errno.ENOENT)
        return self._make(directory, name, stat.S_IFLNK | 0o777, uid, gid, target=target)

    def mknod(self, directory: int, name: bytes, mode: int, rdev: int, uid: int, gid: int) -> Key:
        kind = stat.S_IFMT(mode) or stat.S_IFREG
        if kind in {stat.S_IFDIR, stat.S_IFLNK}:
            raise os_error(errno.EPERM if kind == stat.S_IFDIR else errno.EINVAL)
        if kind not in {stat.S_IFCHR, stat.S_IFBLK}:
            rdev = 0
        return self._make(directory, name, kind | mode & 0o7777, uid, gid, rdev=rdev)

    def _make(
        self, directory: int, name: bytes, mode: int, uid: int, gid: int, rdev: int = 0, target: bytes = b""
    ) -> Key:
        names = self._names_for(directory, name)
        inherit = names.more or self._what_is_inherited(directory, names)
        if inherit is _NOTHING:
            key = Key(self.image.create(directory, name, mode, uid, gid, rdev, target))
            made = self.image.known(key) if stat.S_ISDIR(mode) else None
            if made is not None:
                made.more = _NOTHING
            return key
        assert isinstance(inherit, _Inherit)
        if inherit.gid >= 0:
            gid = inherit.gid
            mode |= stat.S_ISGID if stat.S_ISDIR(mode) else 0
        if not inherit.acl or stat.S_ISLNK(mode):
            return Key(self.image.create(directory, name, mode, uid, gid, rdev, target))
        entries = acl.masked(acl.parse(inherit.acl), mode)
        bits, is_all = acl.mode_of(entries)
        acls = {} if is_all else {acl.ACCESS: acl.build(entries)}
        if stat.S_ISDIR(mode):
            acls[acl.DEFAULT] = inherit.acl
        mode = mode & ~0o777 | bits
        try:  # in one step: nobody must see it without them, not even on disk
            return Key(self.image.create(directory, name, mode, uid, gid, rdev, attrs=list(acls.items())))
        except OSError as failure:
            if failure.errno == errno.ENOSPC and not isinstance(failure, NotYetFree):
                facts = self.image.facts()
                self.is_beyond_room = facts.free_blocks > 0 < facts.free_inodes
            raise

    def _names_for(self, directory: int, name: bytes) -> AnyNames:
        """Return the names of a directory to which *name* may be added."""
        names = self.image.names(directory)
        if name in names:
            raise os_error(errno.EEXIST)
        self._must_take(directory, name)
        return names

    def _must_take(self, directory: int, name: bytes) -> None:
        if len(name) > NAME_MAX:
            raise os_error(errno.ENAMETOOLONG)
        if self._in_use.is_nameless(directory):
            raise os_error(errno.ENOENT)

    def _what_is_inherited(self, directory: int, names: AnyNames) -> _Inherit:
        inode = self.image.getattr(directory)
        default = b""
        with suppress(OSError):
            if acl.DEFAULT in self.image.listxattr(directory):
                default = self.image.getxattr(directory, acl.DEFAULT)
        gid = inode.gid if inode.mode & stat.S_ISGID else -1
        inherit = _NOTHING if gid < 0 and not default else _Inherit(gid, default)
        names.more = inherit
        return inherit

    def _inherits_anew(self, directory: int) -> None:
        names = self.image.known(directory)
        if names is not None:
            names.more = None

    # --- names

    def link(self, key: int, directory: int, name: bytes) -> None:
        self._names_for(directory, name)
        mode = self.image.getattr(key).mode
        if stat.S_ISDIR(mode):
            raise os_error(errno.EPERM)
        if self._in_use.is_nameless(key):
            raise os_error(errno.ENOENT)
        self.image.link(key, mode, directory, name)

    def unlink(self, directory: int, name: bytes, key: int | None) -> None:
        ino, kind = self._find(directory, name)
        if kind == stat.S_IFDIR:
            raise os_error(errno.EISDIR)
        with self._in_use.lock:
            if self.image.unlink(directory, name, keep=self._in_use.has(ino, key)):
                self._in_use.lost_its_name(ino, key)

    def rmdir(self, directory: int, name: bytes, key: int | None) -> None:
        ino, kind = self._find(directory, name)
        if kind != stat.S_IFDIR:
            raise os_error(errno.ENOTDIR)
        with self._in_use.lock:
            if self.image.rmdir(directory, name, keep=self._in_use.has(ino, key)):
                self._in_use.lost_its_name(ino, key)

    def _find(self, directory: int, name: bytes) -> tuple[int, int]:
        """Return the inode number and type of a name. ENOENT."""
        value = self.image.names(directory).get(name)
        if value is None:
            raise os_error(errno.ENOENT if len(name) <= NAME_MAX else errno.ENAMETOOLONG)
        return self._ino_and_type(value)

    def _ino_and_type(self, value: int) -> tuple[int, int]:
        ino = value & INO
        return ino, type_of(value) or stat.S_IFMT(self.image.getattr(ino).mode)

    def rename(
        self,
        source: tuple[int, bytes],
        target: tuple[int, bytes],
        flags: int = 0,
        moved: int | None = None,
        replaced: int | None = None,
    ) -> None:
        exchange = bool(flags & RENAME_EXCHANGE)
        if flags & ~_RENAME_FLAGS or (exchange and flags != RENAME_EXCHANGE):
            raise os_error(errno.EINVAL)
        ino, kind = self._find(*source)
        value = self.image.names(target[0]).get(target[1])
        if value is not None and flags & RENAME_NOREPLACE:
            raise os_error(errno.EEXIST)
        if value is None and exchange:
            raise os_error(errno.ENOENT)
        self._must_take(*target)
        there, there_kind = (0, 0) if value is None else self._ino_and_type(value)
        if there == ino:
            return  # two names of one inode: POSIX says to do nothing
        if kind == stat.S_IFDIR:
            self._must_not_be_above(ino, source[0], target[0])
        if exchange and there_kind == stat.S_IFDIR:
            self._must_not_be_above(there, target[0], source[0])
        if there and not exchange and (kind == stat.S_IFDIR) != (there_kind == stat.S_IFDIR):
            raise os_error(errno.ENOTDIR if kind == stat.S_IFDIR else errno.EISDIR)
        whiteout = (0, 0) if flags & RENAME_WHITEOUT else None
        with self._in_use.lock:
            keep = bool(there) and not exchange and self._in_use.has(there, replaced)
            if self.image.rename(source, target, exchange=exchange, whiteout=whiteout, keep=keep):
                self._in_use.lost_its_name(there, replaced)

    def _must_not_be_above(self, ino: int, parent: int, directory: int) -> None:
        """EINVAL if the directory *ino*, which is in *parent*, would be moved below itself."""
        if directory != parent and self.image.is_above(ino, directory):
            raise os_error(errno.EINVAL)

    # --- attributes

    def chmod(self, key: int, mode: int) -> None:
        if self.image.setattr_simple(key, ext3.MODE, mode=mode & 0o7777):
            return
        before = self.image.raw(key)[0]
        if stat.S_ISLNK(before):
            raise os_error(errno.EOPNOTSUPP)
        access = self._acl(key, acl.ACCESS)
        if access:
            with self.image.together():
                self._setxattr(key, acl.ACCESS, acl.build(acl.with_mode(access, mode)))
                self.image.setattr(key, ext3.MODE, mode=mode & 0o7777)
        else:
            self.image.setattr(key, ext3.MODE, mode=mode & 0o7777)
        if stat.S_ISDIR(before):
            self._inherits_anew(key)

    def _acl(self, key: int, name: bytes) -> list[acl.Entry]:
        return acl.parse(self.image.getxattr(key, name)) if name in self.image.listxattr(key) else []

    def chown(self, key: int, uid: int, gid: int) -> None:
        """Change the owner. Like chown(2), clear set-ID bits and capabilities, except on directories."""
        what = (ext3.UID if uid >= 0 else 0) | (ext3.GID if gid >= 0 else 0)
        if what and self.image.setattr_simple(key, what, uid=max(uid, 0), gid=max(gid, 0)):
            return
        before = self.image.raw(key)[0]
        mode = before
        is_directory = stat.S_ISDIR(before)
        if is_directory:
            self._inherits_anew(key)
        else:
            mode &= ~stat.S_ISUID
            if mode & stat.S_IXGRP:
                mode &= ~stat.S_ISGID
        if mode != before:
            what |= ext3.MODE
        drops = not is_directory and self._capabilities.has(key)
        with self.image.together() if drops else _ALONE:
            if drops:
                self._capabilities.drop(key)
            if what:
                self.image.setattr(key, what, mode=mode & 0o7777, uid=max(uid, 0), gid=max(gid, 0))

    def utimens(self, key: int, atime_ns: int, mtime_ns: int) -> None:
        """Set the times. In inodes of 128 bytes, they are whole seconds from 1901 to 2038."""
        self.image.setattr(key, ext3.ATIME | ext3.MTIME, atime=atime_ns, mtime=mtime_ns)

    def note_reads(self, when: Atime) -> None:
        self.atime = when

    def was_read(self, key: int) -> None:
        self.image.was_read(key, always=self.atime.always)

    def truncate(self, key: int, size: int) -> None:
        if stat.S_ISREG(self.image.getattr(key).mode):
            self._capabilities.drop(key)
            self.image.truncate(key, size)
        else:
            self._must_be_regular(key)

    def setxattr(self, key: int, name: bytes, value: bytes, flags: int = 0) -> None:
        if name in {acl.ACCESS, acl.DEFAULT}:
            self._set_acl(key, name, acl.parse(value))
            return
        self._check_xattr(key, name)
        if len(value) > _XATTR_SIZE_MAX:
            raise os_error(errno.E2BIG)
        self._setxattr(key, name, value, flags)
        self._capabilities.noted(name)

    def _setxattr(self, key: int, name: bytes, value: bytes, flags: int = 0) -> None:
        try:
            self.image.setxattr(key, name, value, flags)
        except OSError as failure:
            self.is_beyond_room = failure.errno == errno.ENOSPC and self.image.facts().free_blocks > 0
            raise

    def removexattr(self, key: int, name: bytes) -> None:
        if name in {acl.ACCESS, acl.DEFAULT}:
            self._set_acl(key, name, [])
            return
        self._check_xattr(key, name)
        self.image.removexattr(key, name)

    def _check_xattr(self, key: int, name: bytes) -> None:
        if name.startswith(b"user.") and not _may_have_user(self.image.getattr(key).mode):
            raise os_error(errno.EPERM)

    def _set_acl(self, key: int, name: bytes, entries: list[acl.Entry]) -> None:
        """Set an ACL, or remove it if there are no entries. The access ACL also sets the mode."""
        mode = self.image.getattr(key).mode
        if stat.S_ISLNK(mode):
            raise os_error(errno.EOPNOTSUPP)
        if name == acl.DEFAULT:
            if not stat.S_ISDIR(mode):
                if entries:
                    raise os_error(errno.EACCES)
                return
            self._inherits_anew(key)
        bits, is_all = acl.mode_of(entries) if entries and name == acl.ACCESS else (mode & 0o777, False)
        with self.image.together():
            if entries and not is_all:
                self._setxattr(key, name, acl.build(entries))
            else:
                try:
                    self.image.removexattr(key, name)
                except OSError as failure:
                    if failure.errno != errno.ENODATA:
                        raise
            if bits != mode & 0o777:
                self.image.setattr(key, ext3.MODE, mode=mode & 0o7000 | bits)

    # --- flags

    def setflags(self, key: int, flags: int) -> None:
        self.image.setflags(key, flags)

    # --- durability

    def together(self) -> AbstractContextManager[object]:
        return self.image.together()

    def open_directory(self, key: int) -> Ext3File:
        if not stat.S_ISDIR(self.image.getattr(key).mode):
            raise os_error(errno.ENOTDIR)
        return self._open(key, os.O_RDONLY)

    def sync(self) -> None:
        """Write all pending changes to disk. Blocks until they are there; any thread may call it."""
        self.image.commit()

    def suspend(self, place: int) -> None:
        """Leave the image clean until :meth:`resume`, so that another program can change it, for example
        grow it.

        Blocks; other threads wait. Meanwhile, inodes in use that have no name get one in the directory
        *place*.
        """
        with may_wait_for_disk(self):
            self._in_use.hide(place)
        try:
            self.image.suspend()
        except OSError:
            self._in_use.unhide(place)
            raise

    def resume(self, place: int, fd: int = -1) -> None:
        """Continue with the image as it is now, through *fd* if given. All keys stay valid."""
        self.image.resume(fd)
        self._in_use.unhide(place)


_RENAME_FLAGS = RENAME_NOREPLACE | RENAME_EXCHANGE | RENAME_WHITEOUT
_XATTR_SIZE_MAX = 65536


def _may_have_user(mode: int) -> bool:
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)
