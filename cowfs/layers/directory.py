"""A directory as a layer: of the host's tree, or of an image that the kernel has mounted.

Everything happens relative to file descriptors, so it makes no difference whether the tree is
mounted anywhere, and no path is ever longer than one name: trees deeper than PATH_MAX work. What leads
out of the directory is not followed (:mod:`cowfs.layers.beneath`).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import closing
from typing import TypeVar

from cowfs.layers.acl import ACCESS
from cowfs.layers.beneath import PLAIN, check_name, covered, enclosed
from cowfs.layers.kernel_file import KernelFile
from cowfs.layers.owner_notes import OwnerNotes, needed
from cowfs.linux import files
from cowfs.types import Attr, DirEntry, FileHandle, FsStats

R = TypeVar("R")

_OPEN_DIRECTORIES = 512
"""How many directory descriptors are kept open at a time."""
_PATH_MAX = 4096
_KEPT_CHAIN = 64
"""Descriptors of the directories above are kept too when a directory is less deep than this."""


class PathKey:
    """An inode of a directory layer: a name in a directory, or a descriptor that pins it.

    *fd* is -1, or an O_PATH descriptor: for a directory a cache, for an inode whose name is gone
    (then *parent* is None) the only way to it.
    """

    __slots__ = ("fd", "name", "parent")

    def __init__(self, parent: PathKey | None, name: bytes, fd: int = -1) -> None:
        self.parent = parent
        self.name = name
        self.fd = fd


class CoveredKey(PathKey):
    """A directory that something is mounted on: to the layer it is empty, with attributes made up."""

    __slots__ = ("attr",)

    def __init__(self, parent: PathKey, name: bytes, attr: Attr) -> None:
        super().__init__(parent, name)
        self.attr = attr


class DirectoryLayer:
    """Serve the tree below *root_fd* (which the layer owns from now on) as an upper or lower layer.

    What is mounted inside it does not belong to it. *alone* says that nothing can be: *root_fd* is the root
    of a mount that is in no namespace.

    Without privilege (*privileged* false) an upper cannot give files to other users. It then notes
    the owner that was asked for and shows it: a directory of root's, copied up by somebody else, goes
    on belonging to root as far as the union is concerned (:mod:`cowfs.layers.owner_notes`).
    """

    def __init__(self, root_fd: int, name: str, *, privileged: bool = True, alone: bool = False) -> None:
        self.name = name
        info = os.fstat(root_fd)
        if not stat.S_ISDIR(info.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), name)
        self._given = root_fd
        root, self._ways = (root_fd, PLAIN) if alone else enclosed(root_fd)
        self.root = PathKey(None, b"", root)
        self.dev = info.st_dev
        self._open: list[PathKey] = []  # directories with a cached descriptor, oldest first
        self._pinned: set[PathKey] = set()  # inodes without a name, held by their descriptors
        self._magic = files.fs_magic(root_fd)
        self._uuid: bytes | None = None
        self._noatime = os.O_NOATIME
        self._notes = None if privileged else OwnerNotes(self)

    # --- from keys to descriptors

    def _dir_fd(self, key: PathKey) -> int:
        """Return a descriptor of a directory, valid until the next call that opens one."""
        return key.fd if key.fd >= 0 else self._open_dir(key)

    def _open_dir(self, key: PathKey) -> int:
        if len(self._open) >= _OPEN_DIRECTORIES:
            self._close_oldest()
        chain = []
        walk = key
        while walk.fd < 0:
            chain.append(walk)
            if walk.parent is None:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), walk.name)
            walk = walk.parent
        fd = walk.fd
        keep = len(chain) < _KEPT_CHAIN
        for depth, step in enumerate(reversed(chain), 1 - len(chain)):
            above, above_is_kept = fd, step.parent.fd >= 0 if step.parent else True
            try:
                fd = self._ways.open(above, step.name, os.O_PATH | os.O_DIRECTORY)
            finally:
                if not above_is_kept:
                    os.close(above)
            if keep or depth == 0:
                step.fd = fd
                self._open.append(step)
        return fd

    def _place(self, directory: PathKey, name: bytes) -> int:
        """Return a descriptor of a directory in which a name is to be made, moved or removed."""
        check_name(name)
        return self._dir_fd(directory)

    def _above(self, key: PathKey) -> int:
        """Return a descriptor of the directory that *key* has its name in. ESTALE when it has none, EXDEV for
        what something is mounted on."""
        if key.parent is None or isinstance(key, CoveredKey):
            code = errno.ESTALE if key.parent is None else errno.EXDEV
            raise OSError(code, os.strerror(code), key.name)
        return self._dir_fd(key.parent)

    def _close_oldest(self) -> None:
        count = len(self._open) // 2
        old, self._open = self._open[:count], self._open[count:]
        for key in old:
            # A directory that lost its name is pinned by this descriptor and no longer ours to close.
            if key.fd >= 0 and key.parent is not None:
                os.close(key.fd)
                key.fd = -1

    def _two_dir_fds(self, first: PathKey, second: PathKey) -> tuple[int, int]:
        self._dir_fd(first)
        fd = self._dir_fd(second)
        return self._dir_fd(first), fd  # the second may have pushed the first out of the cache

    def _path(self, key: PathKey) -> bytes:
        """Return a path of two hops for the calls that take no dir_fd. Not to be used on symlinks
        unless the call can refrain from following them, which a pinned key does not allow."""
        if key.parent is None:
            return b"/proc/self/fd/%d" % key.fd
        return b"/proc/self/fd/%d/%s" % (self._above(key), key.name)

    def _pin(self, key: PathKey) -> None:
        """Hold on to an inode whose name is about to go."""
        if key.fd < 0:
            key.fd = self._ways.open(self._above(key), key.name, os.O_PATH)
        elif key in self._open:
            self._open.remove(key)
        self._pinned.add(key)

    # --- reading

    def lookup(self, directory: PathKey, name: bytes) -> tuple[PathKey, Attr] | None:
        check_name(name)
        if isinstance(directory, CoveredKey):
            return None
        fd = directory.fd if directory.fd >= 0 else self._open_dir(directory)
        try:
            attr: Attr = self._ways.stat(fd, name)
        except FileNotFoundError:
            return None
        except OSError as failure:
            if failure.errno != errno.EXDEV:
                raise
            attr = covered(fd, name)
            return CoveredKey(directory, name, attr), attr
        key = PathKey(directory, name)
        return key, attr if self._notes is None else self._notes.shown(key, attr)

    def stat(self, key: PathKey) -> Attr:
        attr = self.plain_stat(key)
        return attr if self._notes is None else self._notes.shown(key, attr)

    def plain_stat(self, key: PathKey) -> Attr:
        """Return the attributes as the filesystem has them, whatever was noted."""
        attr: Attr
        if key.fd >= 0:
            attr = os.fstat(key.fd)
        elif isinstance(key, CoveredKey):
            attr = key.attr
        else:
            attr = self._ways.stat(self._above(key), key.name)
        return attr

    def readdir(self, directory: PathKey) -> list[DirEntry]:
        if isinstance(directory, CoveredKey):
            return []
        fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._dir_fd(directory))
        try:
            with os.scandir(fd) as entries:
                return [DirEntry(os.fsencode(entry.name), _entry_type(entry)) for entry in entries]
        finally:
            os.close(fd)

    def names(self, directory: PathKey) -> list[bytes]:
        if isinstance(directory, CoveredKey):
            return []
        return os.listdir(b"/proc/self/fd/%d" % self._dir_fd(directory))

    def readlink(self, key: PathKey) -> bytes:
        try:
            if key.parent is None:
                return os.readlink(b"", dir_fd=key.fd)
            return os.readlink(key.name, dir_fd=self._above(key))
        except OSError:
            if self._notes is None or not stat.S_ISLNK(self.stat(key).st_mode):
                raise
        with closing(self.open(key, os.O_RDONLY)) as stand_in:
            return stand_in.pread(_PATH_MAX, 0)

    def listxattr(self, key: PathKey) -> list[bytes]:
        if isinstance(key, CoveredKey):
            return []
        names = os.listxattr(self._path(key), follow_symlinks=key.parent is None)
        return [os.fsencode(name) for name in names]

    def getxattr(self, key: PathKey, name: bytes) -> bytes:
        if isinstance(key, CoveredKey):
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA), name)
        return os.getxattr(self._path(key), name, follow_symlinks=key.parent is None)

    def open(self, key: PathKey, flags: int) -> KernelFile:
        flags |= self._noatime
        try:
            return KernelFile(self._open_file(key, flags))
        except PermissionError:
            if not self._noatime:
                raise
            # O_NOATIME is for the owner and root alone (open(2)); another may still read.
            return KernelFile(self._insist(lambda: self._open_file(key, flags & ~os.O_NOATIME), key))

    def _open_file(self, key: PathKey, flags: int) -> int:
        """Open a regular file. ESTALE when it is something else by now: a fifo or a device is not touched."""
        pinned = key.parent is None
        fd = key.fd if pinned else self._ways.open(self._above(key), key.name, os.O_PATH)
        try:
            mode = os.fstat(fd).st_mode
            if not stat.S_ISREG(mode):
                code = errno.EISDIR if stat.S_ISDIR(mode) else errno.ESTALE
                raise OSError(code, os.strerror(code), key.name)
            return os.open(b"/proc/self/fd/%d" % fd, flags)
        finally:
            if not pinned:
                os.close(fd)

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
        if key.parent is None:
            found = files.file_handle(key.fd, b"")
        else:
            found = None if isinstance(key, CoveredKey) else files.file_handle(self._above(key), key.name)
        if found is None:
            return None
        return FileHandle(found[0], found[1], self._filesystem())

    def handle_ino(self, handle: FileHandle) -> int | None:
        return files.inode_of_handle(self._magic, handle) if handle.uuid == self._filesystem() else None

    def _filesystem(self) -> bytes:
        """Return the filesystem's UUID, which file handles are good for."""
        if self._uuid is None:
            fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.root.fd)
            self._uuid = files.filesystem_uuid(fd)
            os.close(fd)
        return self._uuid

    def forget(self, key: PathKey) -> None:
        if key.fd >= 0 and key is not self.root:
            if key.parent is not None:
                self._open.remove(key)
            self._pinned.discard(key)
            os.close(key.fd)
            key.fd = -1

    def close(self) -> None:
        for key in (*self._open, *self._pinned):
            if key.fd >= 0:
                os.close(key.fd)
                key.fd = -1
        self._open.clear()
        self._pinned.clear()
        if self.root.fd >= 0:
            for fd in {self.root.fd, self._given}:
                os.close(fd)
            self.root.fd = -1

    # --- changing

    def create(
        self, directory: PathKey, name: bytes, mode: int, uid: int, gid: int
    ) -> tuple[PathKey, KernelFile]:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_NOATIME
        mode = stat.S_IFREG | stat.S_IMODE(mode)
        added = self._added(mode)
        fd = self._insist(
            lambda: os.open(name, flags, stat.S_IMODE(mode | added), dir_fd=self._place(directory, name)),
            directory,
        )
        file = KernelFile(fd)
        key = PathKey(directory, name)
        self._give(key, os.fstat(fd), uid, gid, added)
        return key, file

    def mkdir(self, directory: PathKey, name: bytes, mode: int, uid: int, gid: int) -> PathKey:
        mode = stat.S_IMODE(mode)
        added = self._added(stat.S_IFDIR | mode)
        self._insist(lambda: os.mkdir(name, mode | added, dir_fd=self._place(directory, name)), directory)
        return self._made(directory, name, uid, gid, added)

    def _added(self, mode: int) -> int:
        """Return the permissions that we need and a new inode is not to have."""
        return 0 if self._notes is None else needed(mode) & ~mode

    def symlink(self, directory: PathKey, name: bytes, target: bytes, uid: int, gid: int) -> PathKey:
        self._insist(lambda: os.symlink(target, name, dir_fd=self._place(directory, name)), directory)
        return self._made(directory, name, uid, gid)

    def mknod(self, directory: PathKey, name: bytes, mode: int, rdev: int, uid: int, gid: int) -> PathKey:
        check_name(name)
        if self._notes is not None and self._notes.special(directory, name, mode, rdev, uid, gid):
            return PathKey(directory, name)
        self._insist(lambda: os.mknod(name, mode, rdev, dir_fd=self._place(directory, name)), directory)
        return self._made(directory, name, uid, gid)

    def _made(self, directory: PathKey, name: bytes, uid: int, gid: int, added: int = 0) -> PathKey:
        key = PathKey(directory, name)
        attr = os.stat(name, dir_fd=self._dir_fd(directory), follow_symlinks=False)
        self._give(key, attr, uid, gid, added)
        return key

    def _give(self, key: PathKey, attr: os.stat_result, uid: int, gid: int, added: int) -> None:
        """Let a new inode belong to *uid* and *gid*, or to its set-group-ID directory's group."""
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
        self.chown(key, uid, gid)
        if attr.st_mode & (stat.S_ISUID | stat.S_ISGID) and not stat.S_ISLNK(attr.st_mode):
            self.chmod(key, attr.st_mode)  # chown(2) has taken these bits away

    def link(self, key: PathKey, directory: PathKey, name: bytes) -> None:
        check_name(name)
        if key.parent is None:
            os.link(
                b"/proc/self/fd/%d" % key.fd, name, dst_dir_fd=self._dir_fd(directory), follow_symlinks=True
            )
            return
        source, target = self._two_dir_fds(key.parent, directory)
        self._insist(
            lambda: os.link(key.name, name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False),
            directory,
        )

    def unlink(self, directory: PathKey, name: bytes, key: PathKey | None) -> None:
        self._remove(directory, name, key, os.unlink)

    def rmdir(self, directory: PathKey, name: bytes, key: PathKey | None) -> None:
        self._remove(directory, name, key, os.rmdir)

    def _remove(
        self, directory: PathKey, name: bytes, key: PathKey | None, call: Callable[..., None]
    ) -> None:
        named = key is not None and key.parent is directory and key.name == name
        fresh = named and key is not None and key.fd < 0
        if named and key is not None:
            self._pin(key)
        try:
            self._insist(lambda: call(name, dir_fd=self._place(directory, name)), directory)
        except OSError:
            if named and key is not None:
                self._unpin(key, fresh)
            raise
        if named and key is not None:
            key.parent = None

    def _unpin(self, key: PathKey, fresh: bool) -> None:
        self._pinned.discard(key)
        if fresh:
            os.close(key.fd)
            key.fd = -1
        else:
            self._open.append(key)

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
        pin = replaced if not exchange and replaced is not None and _stands_at(replaced, target) else None
        fresh = pin is not None and pin.fd < 0
        if pin is not None:
            self._pin(pin)
        source_fd, target_fd = self._two_dir_fds(source[0], target[0])
        try:
            self._insist(
                lambda: files.rename(source_fd, source[1], target_fd, target[1], flags),
                *(key for key in (source[0], target[0], moved, replaced) if key is not None),
            )
        except OSError:
            if pin is not None:
                self._unpin(pin, fresh)
            raise
        if pin is not None:
            pin.parent = None
        moved_here = moved is not None and _stands_at(moved, source)
        if exchange and replaced is not None and _stands_at(replaced, target):
            replaced.parent, replaced.name = source
        if moved is not None and moved_here:
            moved.parent, moved.name = target

    def chmod(self, key: PathKey, mode: int) -> None:
        if self._notes is None:
            self.plain_chmod(key, mode)
        else:
            self._notes.chmod(key, mode)

    def plain_chmod(self, key: PathKey, mode: int) -> None:
        """Change the mode that the filesystem has."""
        if key.parent is None:
            os.chmod(b"/proc/self/fd/%d" % key.fd, mode & 0o7777)
        else:
            fd = self._ways.open(self._above(key), key.name, os.O_PATH)  # fchmodat(2) follows links
            try:
                os.chmod(b"/proc/self/fd/%d" % fd, mode & 0o7777)
            finally:
                os.close(fd)

    def chown(self, key: PathKey, uid: int, gid: int) -> None:
        if self._notes is None:
            self.plain_chown(key, uid, gid)
        else:
            self._notes.chown(key, uid, gid)

    def plain_chown(self, key: PathKey, uid: int, gid: int) -> None:
        """Change the owner that the filesystem has."""
        if key.parent is None:
            os.chown(b"/proc/self/fd/%d" % key.fd, uid, gid)
        else:
            os.chown(key.name, uid, gid, dir_fd=self._above(key), follow_symlinks=False)

    def act_as_root(self, spare: PathKey, *, anew: bool) -> None:
        """Without privilege: hold every owner, mode and device (:meth:`OwnerNotes.act_as_root`)."""
        if self._notes is not None:
            self._notes.act_as_root(spare, anew=anew)

    def place(self, key: PathKey) -> tuple[PathKey, bytes] | None:
        """Return the directory and the name that a key stands for; None when its name is gone."""
        return None if key.parent is None else (key.parent, key.name)

    def plain_write(self, directory: PathKey, name: bytes, content: bytes) -> None:
        """Make a regular file of ours that holds *content*."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with closing(KernelFile(os.open(name, flags, 0o600, dir_fd=self._place(directory, name)))) as file:
            file.pwrite(content, 0)

    def utimens(self, key: PathKey, atime_ns: int, mtime_ns: int) -> None:
        if key.parent is None:
            os.utime(b"/proc/self/fd/%d" % key.fd, ns=(atime_ns, mtime_ns))
        else:
            os.utime(key.name, ns=(atime_ns, mtime_ns), dir_fd=self._above(key), follow_symlinks=False)

    def truncate(self, key: PathKey, size: int) -> None:
        fd = self._insist(lambda: self._open_file(key, os.O_WRONLY), key)
        try:
            os.ftruncate(fd, size)
        finally:
            os.close(fd)

    def setxattr(self, key: PathKey, name: bytes, value: bytes, flags: int = 0) -> None:
        def call() -> None:
            os.setxattr(self._path(key), name, value, flags, follow_symlinks=key.parent is None)

        if self._notes is not None and name == ACCESS:
            self._notes.set_acl(key, lambda: self._insist(call, key))
        else:
            self._insist(call, key)

    def removexattr(self, key: PathKey, name: bytes) -> None:
        self._insist(lambda: os.removexattr(self._path(key), name, follow_symlinks=key.parent is None), key)

    def open_directory(self, key: PathKey) -> KernelFile:
        return KernelFile(os.open(b".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._dir_fd(key)))

    def sync(self) -> None:
        fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.root.fd)
        try:
            files.syncfs(fd)
        finally:
            os.close(fd)

    # --- what only root may do

    def _insist(self, call: Callable[[], R], *keys: PathKey) -> R:
        """Do what the owner of *keys* may not by their modes, but by changing these, for as long as it takes.

        The kernel checked the caller against the modes; the layer must be able to obey, as root is.
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


def _stands_at(key: PathKey, place: tuple[PathKey, bytes]) -> bool:
    return key.parent is place[0] and key.name == place[1]


def _entry_type(entry: os.DirEntry[str]) -> int:
    """The S_IFMT bits, without a system call for the types that scandir(3) has learnt by itself."""
    try:
        if entry.is_symlink():
            return stat.S_IFLNK
        if entry.is_dir(follow_symlinks=False):
            return stat.S_IFDIR
        if entry.is_file(follow_symlinks=False):
            return stat.S_IFREG
    except OSError:
        pass
    return 0


def open_directory(path: str, *, privileged: bool = True) -> DirectoryLayer:
    """Open a directory of the host as a layer. Raises what open(2) does."""
    return DirectoryLayer(
        os.open(path, os.O_PATH | os.O_DIRECTORY), name=os.path.abspath(path), privileged=privileged
    )
