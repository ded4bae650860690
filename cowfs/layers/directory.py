"""A directory as a layer: one of the host's tree, or of an image that the kernel mounted.

It only uses file descriptors (:mod:`cowfs.layers.descriptors`), so the tree need not be mounted anywhere.
Nothing that leads out of the directory is followed. If another inode has replaced the one that was looked
up, it is not touched: ESTALE.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext, suppress
from typing import TypeVar

from cowfs.errors import os_error
from cowfs.layers import beneath
from cowfs.layers.acl import ACCESS
from cowfs.layers.base import NamesJob
from cowfs.layers.beneath import (
    DIRECTORY,
    LINK,
    NO_NAMES,
    REGULAR,
    check_name,
    covered,
    stale,
)
from cowfs.layers.descriptors import Descriptors, stands_at
from cowfs.layers.kernel_file import KernelFile
from cowfs.layers.keys import CoveredKey, PathKey, apart
from cowfs.layers.owner_notes import OwnerNotes, needed
from cowfs.layers.reopened import Reopened
from cowfs.linux import files, inode_flags, mounts
from cowfs.types import Atime, Attr, DirEntry, FileHandle, FsStats

R = TypeVar("R")

_PATH_MAX = 4096


class DirectoryLayer(Descriptors):
    """Serve the tree below *root_fd* (which the layer owns from now on) as an upper or lower layer.

    Mounts inside it do not belong to it. *alone*: there cannot be any, because *root_fd* is the root of a
    mount that is in no namespace.

    Without privilege (*privileged* false), an upper cannot give files to other users. It then notes the
    requested owner and shows it: in the union, a directory of root's that another user copies up still
    belongs to root (:mod:`cowfs.layers.owner_notes`).
    """

    generation: int | None = None
    waits = False
    fill_unit = 0
    has_descriptors = True
    data_only = False
    number = 0
    """Which lower it is, counted from the topmost, if its handles have another UUID."""

    def __init__(self, root_fd: int, name: str, *, privileged: bool = True, alone: bool = False) -> None:
        super().__init__(root_fd, name, alone=alone)
        self.atime = Atime()
        self._uuid: bytes | None = None
        self._noatime = os.O_NOATIME
        self._notes = None if privileged else OwnerNotes(self)
        self._separates = False
        self._most_listed = sys.maxsize

    # --- reading

    def lookup(self, directory: PathKey, name: bytes) -> tuple[PathKey, Attr] | None:
        if name in NO_NAMES or b"/" in name or b"\0" in name:
            check_name(name)
        fd = directory.fd
        if fd < 0:
            if isinstance(directory, CoveredKey):
                return None
            fd = self._open_dir(directory)
        try:
            attr: Attr = self._stat(fd, name)
        except FileNotFoundError:
            return None
        except OSError as failure:
            if failure.errno != errno.EXDEV:
                raise
            attr = covered(fd, name)
            return CoveredKey(directory, name, attr), attr
        key = PathKey(directory, name, self._mark(attr))
        if self._separates and attr.st_nlink > 1:
            return key, apart(key, attr)
        if self._nameless.hidden:
            attr = self._nameless.seen(key.mark, attr)
        return key, attr if self._notes is None else self._notes.shown(key, attr)

    def stat(self, key: PathKey) -> Attr:
        attr = self.plain_stat(key)
        if self._separates and attr.st_nlink > 1:
            return apart(key, attr)
        return attr if self._notes is None else self._notes.shown(key, attr)

    def separate_names(self) -> None:
        """Treat each name of a hard link as a separate file, if the filesystem has no persistent handles.

        In that case, overlayfs has no index either. Only for a lower, before the first lookup.
        """
        self._separates = self._magic in beneath.FLEETING or self.handle(self.root) is None

    def readdir(self, directory: PathKey) -> list[DirEntry]:
        if isinstance(directory, CoveredKey):
            return []
        return beneath.entries(self._dir_fd(directory), self._unnoticed(), self._most_listed)

    def pieces(self, directory: PathKey) -> Iterator[list[DirEntry]]:
        """Yield the entries, some at a time; other calls may come in between.

        They may or may not contain names that are added or removed meanwhile. ENOTDIR, EUCLEAN.
        """
        if not isinstance(directory, CoveredKey):
            yield from beneath.pieces(self._dir_fd(directory), self._unnoticed(), self._most_listed)

    def names(self, directory: PathKey) -> list[bytes] | NamesJob:
        if isinstance(directory, CoveredKey):
            return []
        return beneath.names(self._dir_fd(directory), self._unnoticed(), self._most_listed)

    def _unnoticed(self) -> int:
        """Return the open flags that keep a directory's atime: not every read is a listing by a user."""
        return os.O_NOATIME if self.atime.directories or not self._has_own_mount else 0

    def readlink(self, key: PathKey) -> bytes:
        if key.mark & 15 == LINK:
            return self._by_fd(key, beneath.readlink)
        if self._notes is None or not stat.S_ISLNK(self.stat(key).st_mode):
            raise os_error(errno.EINVAL, key.name)
        with closing(self.open(key, os.O_RDONLY)) as stand_in:
            return stand_in.pread(_PATH_MAX, 0)

    def listxattr(self, key: PathKey) -> list[bytes]:
        return [] if isinstance(key, CoveredKey) else self._by_fd(key, beneath.listxattr)

    def getxattr(self, key: PathKey, name: bytes) -> bytes:
        if isinstance(key, CoveredKey):
            raise os_error(errno.ENODATA, name)
        value = self._by_fd(key, beneath.getxattr, name)
        return value if name != ACCESS or self._notes is None else self._notes.shown_acl(key, value)

    def open(self, key: PathKey, flags: int) -> KernelFile:
        flags |= self._noatime
        try:
            return KernelFile(self._open_file(key, flags))
        except PermissionError:
            # Only the owner and root may use O_NOATIME (open(2)); others may still read.
            return KernelFile(self._insist(lambda: self._open_file(key, flags & ~os.O_NOATIME), key))

    def reopened(self, key: PathKey, flags: int) -> Reopened:
        """Open a regular file without a descriptor."""
        return Reopened(lambda: self.open(key, flags))

    def _open_file(self, key: PathKey, flags: int) -> int:
        """Open a regular file, and never a fifo or a device."""
        if key.mark & 15 == DIRECTORY:
            self.stat(key)  # or ESTALE
            raise os_error(errno.EISDIR, key.name)
        if key.mark & 15 != REGULAR:
            raise stale(key.name)
        return self._by_fd(key, beneath.reopen, flags)

    def _with_open(self, key: PathKey, call: Callable[..., R], *arguments: object) -> R:
        """Make a call with a descriptor of an opened file or directory."""
        if key.mark & 15 == DIRECTORY:
            with closing(self.open_directory(key)) as directory:
                return call(directory.fileno(), *arguments)
        with closing(self.open(key, os.O_RDONLY)) as file:
            return call(file.fileno(), *arguments)

    def getflags(self, key: PathKey) -> int:
        return 0 if isinstance(key, CoveredKey) else self._with_open(key, inode_flags.get)

    def setflags(self, key: PathKey, flags: int) -> None:
        self._with_open(key, inode_flags.put, flags)

    def version(self, key: PathKey) -> int:
        return self._with_open(key, inode_flags.version)

    def birth(self, key: PathKey) -> int | None:
        return None if isinstance(key, CoveredKey) else self._by_fd(key, inode_flags.birth)

    def statfs(self) -> FsStats:
        info = os.fstatvfs(self.root.fd)
        return FsStats(
            bsize=info.f_bsize,
            frsize=info.f_frsize,
            blocks=info.f_blocks,
            bfree=info.f_bfree,
            bavail=info.f_bavail,
            files=info.f_files,
            ffree=info.f_ffree,
            favail=info.f_favail,
            namemax=info.f_namemax,
        )

    def handle(self, key: PathKey) -> FileHandle | None:
        if self._separates or isinstance(key, CoveredKey):
            return None
        found = self._by_fd(key, beneath.handle)
        if found is None:
            return None
        return FileHandle(found[0], found[1], self.uuid, lower=self.number)

    def handle_ino(self, handle: FileHandle) -> int | None:
        return files.inode_of_handle(self._magic, handle) if handle.uuid == self.uuid else None

    @property
    def uuid(self) -> bytes:
        """The UUID of the filesystem, for which file handles are valid, or the one that was set instead."""
        if self._uuid is None:
            fd = beneath.open_directory(self.root.fd)
            self._uuid = files.filesystem_uuid(fd)
            os.close(fd)
        return self._uuid

    @uuid.setter
    def uuid(self, value: bytes) -> None:
        self._uuid = value

    def numbered(self, ino: int) -> None:
        """Return None: the kernel finds inodes by name."""

    # --- changing

    def create(
        self, directory: PathKey, name: bytes, mode: int, uid: int, gid: int
    ) -> tuple[PathKey, KernelFile]:
        mode = stat.S_IFREG | stat.S_IMODE(mode)
        added = self._added(mode)
        fd = self._insist(
            lambda: beneath.make_file(self._place(directory, name), name, stat.S_IMODE(mode | added)),
            directory,
        )
        file = KernelFile(fd)
        info = os.fstat(fd)
        key = PathKey(directory, name, self._mark(info), fd)
        try:
            self._give(key, info, uid, gid, added)  # through that descriptor, whatever has the name now
        finally:
            key.fd = -1
        return key, file

    def mkdir(self, directory: PathKey, name: bytes, mode: int, uid: int, gid: int) -> PathKey:
        mode = stat.S_IMODE(mode)
        added = self._added(stat.S_IFDIR | mode)
        since = beneath.now()
        self._insist(
            lambda: beneath.make_directory(self._place(directory, name), name, mode | added), directory
        )
        return self._made(directory, name, DIRECTORY, since, uid, gid, added)

    def _added(self, mode: int) -> int:
        """Return the permissions that this layer needs but a new inode must not show."""
        return 0 if self._notes is None else needed(mode) & ~mode

    def symlink(self, directory: PathKey, name: bytes, target: bytes, uid: int, gid: int) -> PathKey:
        since = beneath.now()
        self._insist(lambda: beneath.make_symlink(self._place(directory, name), name, target), directory)
        return self._made(directory, name, LINK, since, uid, gid)

    def mknod(self, directory: PathKey, name: bytes, mode: int, rdev: int, uid: int, gid: int) -> PathKey:
        check_name(name)
        if self._notes is not None:
            stand_in: PathKey | None = self._notes.special(directory, name, mode, rdev, uid, gid)
            if stand_in is not None:
                return stand_in
        since = beneath.now()
        self._insist(lambda: beneath.make_node(self._place(directory, name), name, mode, rdev), directory)
        return self._made(directory, name, mode >> 12 or REGULAR, since, uid, gid)

    def _made(
        self, directory: PathKey, name: bytes, kind: int, since: int, uid: int, gid: int, added: int = 0
    ) -> PathKey:
        """Return the key of an inode that was just created. ESTALE if it was removed already."""
        attr = self._stat(self._dir_fd(directory), name)
        if attr.st_mode >> 12 != kind:
            raise stale(name)
        key = PathKey(directory, name, self._mark(attr))
        self._give(key, attr, uid, gid, added, since)
        return key

    def _give(
        self, key: PathKey, attr: os.stat_result, uid: int, gid: int, added: int, since: int = 0
    ) -> None:
        """Give a new inode to *uid* and *gid*, or to the group of its set-group-ID directory."""
        assert key.parent is not None
        if self._notes is not None:
            self._notes.give(key, key.parent, attr, uid, gid, added)
            return
        if attr.st_uid == uid and attr.st_gid == gid:
            return
        above = os.fstat(self._dir_fd(key.parent))
        if above.st_mode & stat.S_ISGID:
            gid = above.st_gid
        if attr.st_uid == uid and attr.st_gid == gid:
            return
        if key.fd < 0 and not self._by_fd(key, beneath.is_new, attr, since, self._magic):
            raise stale(key.name)
        self.chown(key, uid, gid)
        if attr.st_mode & (stat.S_ISUID | stat.S_ISGID) and not stat.S_ISLNK(attr.st_mode):
            self.chmod(key, attr.st_mode)  # chown(2) cleared these bits

    def link(self, key: PathKey, directory: PathKey, name: bytes) -> None:
        check_name(name)
        self.stand_in(key)
        self._insist(lambda: self._link(key, directory, name), directory)

    def stand_in(self, key: PathKey) -> None:
        """See :meth:`OwnerNotes.stand_in`."""
        if self._notes is not None:
            self._notes.stand_in(key)

    def _link(self, key: PathKey, directory: PathKey, name: bytes) -> None:
        self._dir_fd(directory)
        fd = self._reach(key)
        try:
            beneath.link(fd, self._dir_fd(directory), name)
        finally:
            self._leave(key, fd)

    def unlink(self, directory: PathKey, name: bytes, key: PathKey | None) -> None:
        self._remove(directory, name, key, beneath.unlink)

    def rmdir(self, directory: PathKey, name: bytes, key: PathKey | None) -> None:
        self._remove(directory, name, key, beneath.rmdir)

    def _remove(
        self, directory: PathKey, name: bytes, key: PathKey | None, call: Callable[[int, bytes], None]
    ) -> None:
        named = key is not None and stands_at(key, (directory, name))
        with self._pinned(key) if named and key is not None else nullcontext():
            self._insist(lambda: call(self._place(directory, name), name), directory)

    def rename(
        self,
        source: tuple[PathKey, bytes],
        target: tuple[PathKey, bytes],
        flags: int = 0,
        moved: PathKey | None = None,
        replaced: PathKey | None = None,
    ) -> None:
        check_name(source[1])
        check_name(target[1])
        exchange = flags & files.RENAME_EXCHANGE
        pin = replaced if not exchange and replaced is not None and stands_at(replaced, target) else None
        with self._pinned(pin) if pin is not None else nullcontext():
            source_fd, target_fd = self._two_dir_fds(source[0], target[0])
            self._insist(
                lambda: files.rename(source_fd, source[1], target_fd, target[1], flags),
                *(key for key in (source[0], target[0], moved, replaced) if key is not None),
            )
        moved_here = moved is not None and stands_at(moved, source)
        if exchange and replaced is not None and stands_at(replaced, target):
            replaced.parent, replaced.name = source
        if moved is not None and moved_here:
            moved.parent, moved.name = target

    def chmod(self, key: PathKey, mode: int) -> None:
        if self._notes is None:
            self.plain_chmod(key, mode)
        else:
            self._notes.chmod(key, mode)

    def plain_chmod(self, key: PathKey, mode: int) -> None:
        """Change the real mode."""
        self._by_fd(key, beneath.chmod, mode)

    def chown(self, key: PathKey, uid: int, gid: int) -> None:
        if self._notes is None:
            self.plain_chown(key, uid, gid)
        else:
            self._notes.chown(key, uid, gid)

    def plain_chown(self, key: PathKey, uid: int, gid: int) -> None:
        """Change the real owner."""
        self._by_fd(key, beneath.chown, uid, gid)

    def show_owners(self, owner: Callable[[int, int], tuple[int, int]]) -> None:
        """Translate the owners that the kernel shows, but not those in notes."""
        if self._notes is not None:
            self._notes.owner = owner

    def act_as_root(self, spare: PathKey, *, anew: bool) -> None:
        """Keep every owner, mode and device without privilege (:meth:`OwnerNotes.act_as_root`)."""
        if self._notes is not None:
            self._notes.act_as_root(spare, anew=anew)

    def place(self, key: PathKey) -> tuple[PathKey, bytes] | None:
        """Return the directory and the name of a key; None if it has lost its name."""
        return None if key.parent is None else (key.parent, key.name)

    def plain_write(self, directory: PathKey, name: bytes, content: bytes) -> PathKey:
        """Create a regular file with this *content*, owned by this process's user."""
        with closing(KernelFile(beneath.make_file(self._place(directory, name), name, 0o600))) as file:
            file.pwrite(content, 0)
            return PathKey(directory, name, self._mark(file.stat()))

    def become(self, key: PathKey, other: PathKey) -> None:
        """Make *key* refer to the inode of *other*, which has replaced its own."""
        key.mark = other.mark

    def utimens(self, key: PathKey, atime_ns: int, mtime_ns: int) -> None:
        self._by_fd(key, beneath.utimens, atime_ns, mtime_ns)

    def note_reads(self, when: Atime) -> None:
        self.atime = when
        if when.files:
            self._noatime = 0
            if self._has_own_mount:
                mounts.note_reads(self.root.fd, when)

    def was_read(self, key: PathKey) -> None:
        """Read a directory, or the first byte of a file, so that its atime can change.

        The kernel notes all reads through this layer itself: this is for others.
        """
        with suppress(OSError):
            if key.mark & 15 == DIRECTORY:
                beneath.note_listing(self._dir_fd(key))
                return
            fd = self._open_file(key, os.O_RDONLY)
            try:
                os.read(fd, 1)
            finally:
                os.close(fd)

    def truncate(self, key: PathKey, size: int) -> None:
        fd = self._insist(lambda: self._open_file(key, os.O_WRONLY), key)
        try:
            os.ftruncate(fd, size)
        finally:
            os.close(fd)

    def setxattr(self, key: PathKey, name: bytes, value: bytes, flags: int = 0) -> None:
        def call() -> None:
            self._by_fd(key, beneath.setxattr, name, value, flags)

        if self._notes is not None and name == ACCESS:
            self._notes.set_acl(key, value, lambda: self._insist(call, key))
        else:
            self._insist(call, key)

    def removexattr(self, key: PathKey, name: bytes) -> None:
        self._insist(lambda: self._by_fd(key, beneath.removexattr, name), key)

    def open_directory(self, key: PathKey) -> KernelFile:
        return KernelFile(beneath.open_directory(self._dir_fd(key)))

    def hurry(self, on: bool) -> bool:
        """Do nothing: only the kernel knows when a thread would wait for the disk."""
        del on
        return False

    def relieve(self, for_room: bool) -> None:
        """Do nothing: the kernel writes changes to disk."""

    def sync(self) -> None:
        fd = beneath.open_directory(self.root.fd)
        try:
            files.syncfs(fd)
        finally:
            os.close(fd)

    # --- operations that only root may do

    def _insist(self, call: Callable[[], R], *keys: PathKey) -> R:
        """Make a call that the modes of *keys* forbid to their owner, by changing the modes for its duration.

        The kernel has checked the caller against the modes; the layer must be able to do everything, like
        root.
        """
        try:
            return call()
        except PermissionError:
            if self._notes is None:
                raise
        lent = []
        try:
            for key in keys:
                mode = self.plain_stat(key).st_mode
                if not stat.S_ISLNK(mode) and mode & stat.S_IRWXU != stat.S_IRWXU:
                    self.plain_chmod(key, mode | stat.S_IRWXU)
                    lent.append((key, mode))
            return call()
        finally:
            for key, mode in reversed(lent):
                self.plain_chmod(key, mode)


def open_directory(path: str, *, privileged: bool = True) -> DirectoryLayer:
    """Open a directory of the host as a layer. Raises the errors of open(2)."""
    return DirectoryLayer(beneath.open_given(path), name=os.path.abspath(path), privileged=privileged)
