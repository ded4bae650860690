"""Keep a directory layer inside its directory, whoever made its contents or changes them.

A layer is walked one name at a time, relative to a descriptor of the directory above, and no link is ever
followed. That leaves two ways out: an invalid name, and a mount. If permitted, the layer is in a mount of
its own, on which nobody can mount anything (:func:`cowfs.linux.mounts.private_clone`). Otherwise the kernel
is told to refuse mounts, which costs two more system calls. A directory with a mount on it then appears
empty, because nobody can see its contents. Entering the mount could deadlock if it is cowfs's own.

The owner of a directory can replace the inode of a name at any moment, between any two calls. So a name is
resolved once, to a descriptor (O_PATH, which opens nothing: no fifo waits, no device acts). If the inode has
the type and number that were looked up (:func:`marker`), all operations use this descriptor. Calls that need
a name (mkdir, rename, unlink) act on the entry itself and follow nothing. All calls of layers that take
names are in this file; tests/security/test_swaps.py checks that.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cowfs.errors import os_error
from cowfs.linux import files, filesystems, limits, mounts, override
from cowfs.types import Attr, AttrData, DirEntry

log = logging.getLogger(__name__)

NO_NAMES = {b"", b".", b".."}


def shared(way: Sequence[tuple[Any, ...]], names: Sequence[bytes]) -> int:
    """Return how many directories the steps of a way, each of which begins with a name, share with a path."""
    same = 0
    while same < min(len(names), len(way)) and way[same][0] == names[same]:
        same += 1
    return same


def check_name(name: bytes) -> None:
    """EINVAL for anything but a single name, because images and overlay attributes may contain anything."""
    if name in NO_NAMES or b"/" in name or b"\0" in name:
        raise OSError(errno.EINVAL, "no name in a directory", name)


@dataclass(frozen=True, slots=True)
class Ways:
    """The calls that access the entries of a directory. EXDEV for a name that something is mounted on."""

    stat: Callable[[int, bytes], os.stat_result]
    """fstatat(2) without following."""
    open: Callable[[int, bytes, int], int]
    """openat(2) without following."""


def _stat(dir_fd: int, name: bytes) -> os.stat_result:
    try:
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except PermissionError:
        return _attributes(override.open_at(dir_fd, name, os.O_PATH | os.O_NOFOLLOW, beneath=False))


def _open(dir_fd: int, name: bytes, flags: int) -> int:
    flags |= os.O_NOFOLLOW
    try:
        return os.open(name, flags, dir_fd=dir_fd)
    except PermissionError:
        return override.open_at(dir_fd, name, flags, beneath=False)


def _stat_beneath(dir_fd: int, name: bytes) -> os.stat_result:
    try:
        return files.stat_beneath(dir_fd, name)
    except PermissionError:
        return _attributes(override.open_at(dir_fd, name, os.O_PATH | os.O_NOFOLLOW, beneath=True))


def _open_beneath(dir_fd: int, name: bytes, flags: int) -> int:
    flags |= os.O_NOFOLLOW
    try:
        return files.open_beneath(dir_fd, name, flags)
    except PermissionError:
        return override.open_at(dir_fd, name, flags, beneath=True)


def _attributes(fd: int) -> os.stat_result:
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


PLAIN = Ways(_stat, _open)
"""Where nothing is mounted."""
_GUARDED = Ways(_stat_beneath, _open_beneath)


def enclosed(root: int) -> tuple[int, Ways]:
    """Return a descriptor (O_PATH) to use instead of the directory *root*, and the calls to use with it.

    It may be *root* itself. If not, keep *root* open as long, so that others can see that its filesystem is
    in use.
    """
    with suppress(OSError):
        return mounts.private_clone(root), PLAIN
    return root, guarded(root)


def guarded(root: int) -> Ways:
    """Return the calls to use below the directory *root* itself, on which something may be mounted."""
    try:
        os.close(files.open_beneath(root, b".", os.O_PATH))
    except OSError:  # a sandbox without openat2(2)
        return PLAIN
    return _GUARDED


# --- whether an inode is the one that was looked up

Mark = Callable[[Attr], int]
"""From attributes to what an inode is known by; the four lowest bits are its type."""

REGULAR, DIRECTORY, LINK = stat.S_IFREG >> 12, stat.S_IFDIR >> 12, stat.S_IFLNK >> 12
"""Types, as in a mark."""

FLEETING = {filesystems.FAT, filesystems.EXFAT, filesystems.FUSE, filesystems.CIFS, filesystems.SMB2}
"""Filesystems that renumber an inode once they have forgotten it: there the type must do. They have no hard
links, or their server can claim anything."""

_CLOCK_REALTIME_COARSE = 5  # linux/time.h
_OUR_CLOCK = {
    *(filesystems.EXT, filesystems.XFS, filesystems.BTRFS, filesystems.TMPFS, filesystems.F2FS),
}
_WITHOUT_OWNERS = {
    *(filesystems.FAT, filesystems.EXFAT, filesystems.CIFS, filesystems.SMB2),
}
"""Filesystems where every file belongs to the mount's user, and nobody can make links."""
_SQUASHED = {filesystems.NFS: (65534,)}
"""The user to whom a server may map root: exports(5)."""
_WITHIN = {filesystems.BTRFS, filesystems.BCACHEFS, filesystems.NFS}
"""Filesystems that contain others which are not mounts, so that st_dev must be checked, too."""


def marker(magic: int, dev: int) -> Mark:
    """Return the function that tells inodes of a filesystem apart. *magic* is statfs(2)'s f_type."""

    def plain(attr: Attr) -> int:
        return attr.st_ino << 4 | attr.st_mode >> 12

    def full(attr: Attr) -> int:
        return plain(attr) if attr.st_dev == dev else plain(attr) | attr.st_dev << 68

    def of_type(attr: Attr) -> int:
        return attr.st_mode >> 12

    def of_overlay(attr: Attr) -> int:  # its directories' numbers may change: xino=off
        return of_type(attr) if attr.st_mode >> 12 == DIRECTORY else full(attr)

    if magic in FLEETING:
        return of_type
    if magic == filesystems.OVERLAYFS:
        return of_overlay
    return full if magic in _WITHIN else plain


def stale(name: bytes) -> OSError:
    """Return ESTALE for a name that now has another inode, so that the kernel looks it up again."""
    return os_error(errno.ESTALE, name)


def open_given(path: str, flags: int = os.O_PATH | os.O_DIRECTORY) -> int:
    """Open a path that a user gave, and follow links in it."""
    return os.open(path, flags | os.O_NONBLOCK)


# --- operations on a descriptor, which may be O_PATH, even of a link


def _way(fd: int) -> bytes:
    """Return the path in /proc of the file that a descriptor refers to (proc(5))."""
    return b"/proc/self/fd/%d" % fd


def reopen(fd: int, flags: int) -> int:
    """Open the regular file of *fd*. EAGAIN, without waiting, if another process has a lease on it
    (fcntl(2))."""
    flags |= os.O_NONBLOCK
    try:
        return os.open(_way(fd), flags)
    except PermissionError:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise
        return override.reopen(fd, flags)


def open_directory(fd: int, flags: int = 0) -> int:
    """Open the directory of *fd* to read or sync it; without O_NOATIME if that is not permitted (open(2))."""
    flags |= os.O_RDONLY | os.O_DIRECTORY
    try:
        return os.open(b".", flags, dir_fd=fd)
    except PermissionError:
        if flags & os.O_NOATIME:
            return open_directory(fd, flags & ~os.O_NOATIME)
        return override.reopen(fd, flags)


_MANY = 8192
"""How many names are read at once: some milliseconds."""
_A_NAME = 100
"""Bytes that a name takes besides its own."""
_PART = 32
_LEAST = 64 << 20


def most_listed() -> int:
    """Return how many bytes the names of one directory may take, if a server or a program lists it.

    It could do so without end.
    """
    return max(limits.memory() // _PART, _LEAST)


def entries(fd: int, flags: int = 0, most: int = sys.maxsize) -> list[DirEntry]:
    """Return the entries of a directory, with the types that the filesystem reports. *flags*: O_NOATIME.

    EUCLEAN if they take more than *most* bytes.
    """
    return [*itertools.chain.from_iterable(pieces(fd, flags, most))]


def pieces(fd: int, flags: int = 0, most: int = sys.maxsize) -> Iterator[list[DirEntry]]:
    """Yield the same entries, some at a time. They may or may not contain names that change meanwhile."""
    here = open_directory(fd, flags)
    try:
        with os.scandir(here) as found:
            while some := [
                DirEntry(os.fsencode(entry.name), _entry_type(entry))
                for entry in itertools.islice(found, _MANY)
            ]:
                most = _left(most, [entry.name for entry in some])
                yield some
    finally:
        os.close(here)


def _left(most: int, some: list[bytes]) -> int:
    """Return what is left of *most* bytes after *some* names. EUCLEAN if that is nothing."""
    most -= sum(map(len, some)) + len(some) * _A_NAME
    if most < 0:
        log.warning("a directory of a lower has more names than the memory has room for")
        raise os_error(errno.EUCLEAN)
    return most


def names(fd: int, flags: int = 0, most: int = sys.maxsize) -> list[bytes] | Callable[[], list[bytes]]:
    """Return the names in a directory; if there are very many, a function that reads the rest and returns
    all.

    *flags*: O_NOATIME. EUCLEAN from that function if they take more than *most* bytes.
    """
    if not flags:
        with suppress(PermissionError):
            plain = os.scandir(_way(fd))
            first = [entry.name for entry in itertools.islice(plain, _MANY)]
            return first if len(first) < _MANY else _Rest(first, plain, most)
    here = open_directory(fd, flags)
    try:
        found = os.scandir(here)
    finally:
        os.close(here)
    first = [os.fsencode(entry.name) for entry in itertools.islice(found, _MANY)]
    return first if len(first) < _MANY else _Rest(first, found, most)


def note_listing(fd: int) -> None:
    """Make the kernel update the atime of a directory, if a read does so now."""
    with os.scandir(_way(fd)) as found:
        next(found, None)


class _Rest:
    """The rest of a directory that is being read."""

    __slots__ = ("_first", "_found", "_most")

    def __init__(
        self, first: list[bytes], found: Iterator[os.DirEntry[bytes] | os.DirEntry[str]], most: int
    ) -> None:
        self._first = first
        self._found = found
        self._most = most

    def __call__(self) -> list[bytes]:
        left = _left(self._most, self._first)
        while some := [os.fsencode(entry.name) for entry in itertools.islice(self._found, _MANY)]:
            left = _left(left, some)
            self._first += some
        return self._first

    def __del__(self) -> None:
        self._found.close()  # type: ignore[attr-defined]


def readlink(fd: int) -> bytes:
    return os.readlink(b"", dir_fd=fd)


def chmod(fd: int, mode: int) -> None:
    os.chmod(_way(fd), mode & 0o7777)


def chown(fd: int, uid: int, gid: int) -> None:
    os.chown(_way(fd), uid, gid)


def utimens(fd: int, atime_ns: int, mtime_ns: int) -> None:
    os.utime(_way(fd), ns=(atime_ns, mtime_ns))


def may_change(fd: int) -> bool:
    """Whether this process may change names in the directory of *fd*, or write to the file."""
    how = os.W_OK | (os.X_OK if stat.S_ISDIR(os.fstat(fd).st_mode) else 0)
    return os.access(_way(fd), how, effective_ids=True)


def listxattr(fd: int) -> list[bytes]:
    try:
        return [os.fsencode(name) for name in os.listxattr(_way(fd))]
    except PermissionError:
        return override.listxattr(fd)


def getxattr(fd: int, name: bytes) -> bytes:
    try:
        return os.getxattr(_way(fd), name)
    except PermissionError:
        return override.getxattr(fd, name)


def setxattr(fd: int, name: bytes, value: bytes, flags: int) -> None:
    os.setxattr(_way(fd), name, value, flags)


def removexattr(fd: int, name: bytes) -> None:
    os.removexattr(_way(fd), name)


def handle(fd: int) -> tuple[int, bytes] | None:
    """Return the kernel's file handle; None if the filesystem has none (name_to_handle_at(2))."""
    return files.file_handle(fd, b"")


# --- operations on a directory entry, which is not followed


def make_file(dir_fd: int, name: bytes, mode: int) -> int:
    """Create a regular file; return a descriptor for reading and writing."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_NOATIME
    return os.open(name, flags, mode, dir_fd=dir_fd)


def make_directory(dir_fd: int, name: bytes, mode: int) -> None:
    os.mkdir(name, mode, dir_fd=dir_fd)


def make_symlink(dir_fd: int, name: bytes, target: bytes) -> None:
    if b"\0" in target:
        raise os_error(errno.EINVAL, name)
    os.symlink(target, name, dir_fd=dir_fd)


def make_node(dir_fd: int, name: bytes, mode: int, rdev: int) -> None:
    os.mknod(name, mode, rdev, dir_fd=dir_fd)


def link(fd: int, dir_fd: int, name: bytes) -> None:
    """Give the file of *fd* another name."""
    os.link(_way(fd), name, dst_dir_fd=dir_fd, follow_symlinks=True)


def unlink(dir_fd: int, name: bytes) -> None:
    os.unlink(name, dir_fd=dir_fd)


def rmdir(dir_fd: int, name: bytes) -> None:
    os.rmdir(name, dir_fd=dir_fd)


def remove_tree(parent: int, name: bytes, ways: Ways = PLAIN) -> None:
    """Remove a name and everything below it; follow no links. Blocks; OSError.

    Uses one descriptor for each level of directories.
    """
    levels = [(os.dup(parent), [name])]
    names = [name]
    try:
        while levels:
            directory, waiting = levels[-1]
            if not waiting:
                os.close(levels.pop()[0])
                if levels:
                    rmdir(levels[-1][0], names.pop())
                continue
            each = waiting.pop()
            try:
                unlink(directory, each)
            except IsADirectoryError:
                fd = ways.open(directory, each, os.O_RDONLY | os.O_DIRECTORY)
                names.append(each)
                levels.append((fd, [os.fsencode(below) for below in os.listdir(fd)]))
    finally:
        for directory, _ in levels:
            os.close(directory)


def now() -> int:
    """Return the time, in ns, that a file created now would get."""
    return time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)


def is_new(fd: int, info: os.stat_result, since: int, magic: int) -> bool:
    """Whether the inode found under a name can be the one that this process created there after *since*.

    It must have this process's owner and not be older. A file must have no other name, a directory must be
    empty.
    Times only count if this machine's clock sets them.
    """
    if magic in _OUR_CLOCK:
        whole = info.st_mtime_ns % 10**9 == 0  # some inodes have only whole seconds
        if info.st_mtime_ns < since - (since % 10**9 if whole else 0):
            return False
    if magic not in _WITHOUT_OWNERS and info.st_uid not in {os.geteuid(), *_SQUASHED.get(magic, ())}:
        return False
    return not names(fd) if stat.S_ISDIR(info.st_mode) else info.st_nlink == 1


def _entry_type(entry: os.DirEntry[str]) -> int:
    """Return the S_IFMT bits, without a system call for the types that scandir(3) reports."""
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


# --- directories with a mount on them


def covered(directory: int, name: bytes) -> Attr:
    """Return the attributes to show for a directory with a mount on it.

    EXDEV if it is not a directory: then there are no true attributes to show.
    """
    above = os.fstat(directory)
    here = open_directory(directory)
    try:
        with os.scandir(here) as found:
            for entry in found:
                if os.fsencode(entry.name) == name:
                    if entry.is_dir(follow_symlinks=False):
                        return _like(above, entry.inode())
                    break
    finally:
        os.close(here)
    raise os_error(errno.EXDEV, name)


def _like(above: os.stat_result, ino: int) -> Attr:
    return AttrData(
        st_mode=stat.S_IFDIR | 0o755,
        st_ino=ino,
        st_dev=above.st_dev,
        st_nlink=2,
        st_uid=above.st_uid,
        st_gid=above.st_gid,
        st_rdev=0,
        st_size=0,
        st_blocks=0,
        st_blksize=above.st_blksize,
        st_atime_ns=above.st_mtime_ns,
        st_mtime_ns=above.st_mtime_ns,
        st_ctime_ns=above.st_ctime_ns,
    )
