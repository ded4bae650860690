"""System calls on files: renameat2(2), name_to_handle_at(2), reflinks and in-kernel copies."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from cowfs.errors import SystemFailure, os_error
from cowfs.linux import filesystems
from cowfs.types import FileHandle

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4
PUNCH_HOLE = 3
"""FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE: the kernel accepts the first only with the second."""

LACK_OF_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""The errnos of a filesystem that has no space left, or none for this user or file."""

_AT_EMPTY_PATH = 0x1000
_MAX_HANDLE_SZ = 128
_SYS_OPENAT2 = 437  # the same on all architectures: include/uapi/asm-generic/unistd.h
_OPEN_HOW = struct.Struct("=QQQ")  # linux/openat2.h: struct open_how { flags, mode, resolve }
_RESOLVE_NO_XDEV, _RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 1, 2, 4, 8
_RESOLVE = _RESOLVE_NO_XDEV | _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH
_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
_FS_IOC_GETFSUUID = 0x80111500  # linux/fs.h: _IOR(0x15, 0, struct fsuuid2), 17 bytes; Linux 6.9
_ZEROS = 1 << 20
"""How many bytes one write(2) zeroes on a filesystem without fallocate(2)."""
_HANDLE_HEAD = struct.Struct("=Ii")  # struct file_handle: handle_bytes, handle_type

_libc = ctypes.CDLL(None, use_errno=True)
_libc.renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_libc.name_to_handle_at.argtypes = (
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_int),
    ctypes.c_int,
)
_libc.syncfs.argtypes = (ctypes.c_int,)
_libc.syscall.restype = ctypes.c_long
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def absolute(path: str) -> str:
    """Return an absolute path, without following links. SystemFailure if the current directory is gone."""
    try:
        return os.path.abspath(path)
    except FileNotFoundError:
        raise SystemFailure(
            "the current directory has been removed", "change to another one, or give absolute paths"
        ) from None


def _raise() -> None:
    raise os_error(ctypes.get_errno())


def renameat2(source_fd: int, source: bytes, target_fd: int, target: bytes, flags: int) -> None:
    """Rename with flags (renameat2(2)): RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT.

    Raises EINVAL where the filesystem does not know the flag.
    """
    if _libc.renameat2(source_fd, source, target_fd, target, flags):
        _raise()


def rename(source_fd: int, source: bytes, target_fd: int, target: bytes, flags: int) -> None:
    """Rename with or without flags, by the cheaper call."""
    if flags:
        renameat2(source_fd, source, target_fd, target, flags)
    else:
        os.rename(source, target, src_dir_fd=source_fd, dst_dir_fd=target_fd)


def rename_new(directory: int, temporary: str, name: str) -> None:
    """Rename a finished file or directory within *directory*. FileExistsError if *name* exists.

    On a filesystem without RENAME_NOREPLACE it may replace a file that appears at the same moment.
    """
    try:
        renameat2(directory, os.fsencode(temporary), directory, os.fsencode(name), RENAME_NOREPLACE)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOSYS}:
            raise
        with suppress(FileNotFoundError):
            os.stat(name, dir_fd=directory, follow_symlinks=False)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name) from None
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)


_ORDINARY = {stat.S_IFREG, stat.S_IFDIR, stat.S_IFBLK}


def open_ordinary(path: str | bytes | os.PathLike[str], flags: int) -> int:
    """Open a file, directory or block device at a path that another user may have chosen.

    Opening anything else can have effects: a fifo blocks, a watchdog starts, a tape rewinds. For those the
    descriptor is O_PATH, good only for fstat(2). Does not wait for a lease to be released: EAGAIN.
    """
    found = os.open(path, os.O_PATH | os.O_CLOEXEC)
    if stat.S_IFMT(os.fstat(found).st_mode) not in _ORDINARY:
        return found
    try:
        return os.open(f"/proc/self/fd/{found}", flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(found)


def open_beneath(dir_fd: int, name: bytes, flags: int) -> int:
    """Open *name* beneath a directory, through no symbolic link, ``..`` or mountpoint (openat2(2)).

    O_PATH | O_NOFOLLOW opens a symbolic link itself. EXDEV for a mountpoint; the filesystem mounted there,
    which may be waiting for this process, is not asked.
    """
    how = _OPEN_HOW.pack(flags | os.O_CLOEXEC, 0, _RESOLVE)
    fd = _libc.syscall(_SYS_OPENAT2, dir_fd, name, how, _OPEN_HOW.size)
    if fd < 0:
        raise os_error(ctypes.get_errno(), name)
    return int(fd)


def stat_beneath(dir_fd: int, name: bytes) -> os.stat_result:
    """Return the attributes of *name* in a directory; EXDEV if something is mounted on it."""
    fd = open_beneath(dir_fd, name, os.O_PATH | os.O_NOFOLLOW)
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def syncfs(fd: int) -> None:
    """Write back the whole filesystem that *fd* is on (syncfs(2)). Blocks; releases the GIL."""
    if _libc.syncfs(fd):
        _raise()


def size_of(fd: int) -> int:
    """Return the size of a file or block device in bytes."""
    info = os.fstat(fd)
    return os.lseek(fd, 0, os.SEEK_END) if stat.S_ISBLK(info.st_mode) else info.st_size


def is_read_only_device(info: os.stat_result) -> bool:
    """Whether an inode is a block device that the kernel lets nobody write to, though it may be opened."""
    if not stat.S_ISBLK(info.st_mode):
        return False
    number = f"{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}"
    try:
        return Path(f"/sys/dev/block/{number}/ro").read_text().strip() == "1"
    except OSError:
        return False


def is_image(path: str) -> bool:
    """Whether *path* is a regular file or a block device, which can hold an image."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def is_device(path: str) -> bool:
    """Whether *path* is a block device."""
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def fallocate(fd: int, offset: int, length: int, mode: int = 0) -> None:
    """Allocate a range of bytes of a file, or do what *mode* says (fallocate(2)).

    On a filesystem that cannot, it raises EOPNOTSUPP; posix_fallocate(3) would write to the file instead.
    """
    if _libc.fallocate(fd, mode, offset, length):
        _raise()


def make_room(
    fd: int, start: int, end: int, *, alone: bool, tick: Callable[[int], object] = lambda _: None
) -> None:
    """Allocate all blocks of a range of a file, which may reach beyond its end. Its content stays the same.

    Blocks. Uses fallocate(2). On filesystems without it (ext3, exFAT, NFS 3) it writes zeros: beyond the end
    of the file and, if *alone*, into its holes. *alone* means that no other process writes to the file.
    (posix_fallocate(3) rewrites bytes that others may be changing.) *tick* gets the number of bytes written,
    often. OSError; blocks allocated before it stay.
    """
    try:
        fallocate(fd, start, end - start)
    except OSError as error:
        if error.errno not in {errno.EOPNOTSUPP, errno.ENOSYS}:
            raise
        length = os.fstat(fd).st_size
        for hole, stop in list(holes(fd, start, min(end, length))) if alone else []:
            _write_zeros(fd, hole, stop, tick)
        _write_zeros(fd, max(start, length), end, tick)


def _write_zeros(fd: int, start: int, end: int, tick: Callable[[int], object]) -> None:
    zeros = bytes(_ZEROS)
    while start < end:
        written = os.pwrite(fd, zeros[: end - start], start)
        start += written
        tick(written)


def file_handle(dir_fd: int, name: bytes) -> tuple[int, bytes] | None:
    """Return the type and the bytes of a file's handle (name_to_handle_at(2)).

    An empty *name* means *dir_fd* itself. None if the filesystem has no handles.
    """
    buffer = ctypes.create_string_buffer(_HANDLE_HEAD.size + _MAX_HANDLE_SZ)
    _HANDLE_HEAD.pack_into(buffer, 0, _MAX_HANDLE_SZ, 0)
    mount_id = ctypes.c_int()
    flags = 0 if name else _AT_EMPTY_PATH
    if _libc.name_to_handle_at(dir_fd, name, buffer, ctypes.byref(mount_id), flags):
        code = ctypes.get_errno()
        if code in {errno.EOPNOTSUPP, errno.ENOSYS, errno.EOVERFLOW, errno.EPERM}:
            return None
        raise os_error(code, name)
    size, kind = _HANDLE_HEAD.unpack_from(buffer, 0)
    return kind, buffer.raw[_HANDLE_HEAD.size : _HANDLE_HEAD.size + size]


def filesystem_uuid(fd: int) -> bytes:
    """Return the 16 bytes of the filesystem's UUID; zeros if it has none or does not report it."""
    reply = bytearray(17)  # struct fsuuid2 { __u8 len; __u8 uuid[16]; }
    try:
        fcntl.ioctl(fd, _FS_IOC_GETFSUUID, reply, True)
    except OSError:
        return bytes(16)
    return bytes(reply[1 : 1 + reply[0]]).ljust(16, b"\0")


def inode_of_handle(magic: int, handle: FileHandle) -> int | None:
    """Return the inode number in a handle of a filesystem with statfs(2)'s f_type *magic*.

    The layouts are those of each filesystem's encode_fh: fs/libfs.c (generic, 32 bit inode and
    generation), mm/shmem.c, fs/btrfs/export.c, fs/xfs/xfs_export.c, fs/erofs/super.c. None for an unknown
    layout.
    """
    kind, data = handle.type, handle.data
    if magic == filesystems.TMPFS and kind == 1 and len(data) >= 12:
        _, low, high = struct.unpack_from("=III", data)
        return int(low | high << 32)
    if magic == filesystems.BTRFS and kind in {0x4D, 0x4E, 0x4F} and len(data) >= 8:
        return int(struct.unpack_from("=Q", data)[0])
    if magic == filesystems.XFS and kind in {0x81, 0x82} and len(data) >= 8:
        return int(struct.unpack_from("=Q", data)[0])
    if magic == filesystems.EROFS and kind in {0x81, 0x82} and len(data) >= 8:
        high, low = struct.unpack_from("=II", data)
        return int(low | high << 32)
    if magic in _INO32 and kind in {1, 2} and len(data) >= 4:
        return int(struct.unpack_from("=I", data)[0])
    return None


_INO32 = {filesystems.XFS, filesystems.EXT, filesystems.SQUASHFS, filesystems.F2FS, filesystems.EROFS}


def matching(directory: str | os.PathLike[str], pattern: str) -> list[Path]:
    """Return the paths below a directory of /proc or /sys that match a pattern, sorted.

    Ignores entries that vanish meanwhile, as processes and devices do. (pathlib's glob raises for them up
    to Python 3.12.)
    """
    return [
        Path(name) for name in sorted(glob.iglob(os.path.join(glob.escape(os.fspath(directory)), pattern)))
    ]


def fs_magic(fd: int) -> int:
    """Return f_type of statfs(2): the kind of filesystem."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.fstatfs(fd, buffer):
        _raise()
    return int(struct.unpack_from("=q", buffer)[0]) & 0xFFFFFFFF


def reflink(source_fd: int, target_fd: int) -> bool:
    """Share all of the source's blocks with the target (FICLONE); False if that is not possible."""
    try:
        fcntl.ioctl(target_fd, _FICLONE, source_fd)
    except OSError:
        return False
    return True


def segments(fd: int, end: int, position: int = 0) -> Iterator[tuple[int, int]]:
    """Yield ``(start, stop)`` of every run of data from *position* to *end*, in bytes.

    A filesystem that does not report holes yields one run.
    """
    while position < end:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
            if start >= end:
                return
            stop = min(os.lseek(fd, start, os.SEEK_HOLE), end)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole follows
                return
            if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:
                raise
            start, stop = position, end
        yield start, stop
        position = stop


def holes(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield ``(start, stop)`` of every hole in a range; none if the filesystem does not report holes."""
    for data, stop in segments(fd, end, start):
        if start < data:
            yield start, data
        start = stop
    if start < end:
        yield start, end


def copy_range(source_fd: int, target_fd: int, start: int, stop: int) -> None:
    """Copy bytes ``start..stop`` to the same offset, inside the kernel (sendfile(2)). Blocks.

    If *start* is 0, the target's file offset must be 0; the call moves it. EIO if the source ends early.
    """
    if start:
        os.lseek(target_fd, start, os.SEEK_SET)
    while start < stop:
        copied = os.sendfile(target_fd, source_fd, start, min(stop - start, 8 << 20))
        if copied == 0:
            raise OSError(errno.EIO, "the source is shorter than its attributes say")
        start += copied


def fgetxattr(fd: int, name: str) -> bytes:
    """Return an xattr of an open file. ENODATA."""
    return os.getxattr(fd, name)


def fsetxattr(fd: int, name: str, value: bytes) -> None:
    """Set an xattr of an open file. ENOSPC, ENOTSUP."""
    os.setxattr(fd, name, value)


def fremovexattr(fd: int, name: str) -> None:
    """Remove an xattr of an open file. ENODATA."""
    os.removexattr(fd, name)
