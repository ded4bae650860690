"""The flags of an inode (chattr(1), ioctl_iflags(2)), its generation and its time of birth."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import struct
import sys

from cowfs.errors import os_error

FS_IOC_GETFLAGS = 0x80086601  # linux/fs.h: _IOR('f', 1, long)
FS_IOC_SETFLAGS = 0x40086602
FS_IOC_GETVERSION = 0x80087601
FS_IOC_FSGETXATTR = 0x801C581F
FS_IOC_FSSETXATTR = 0x401C5820
SYNC, IMMUTABLE, APPEND, NODUMP, NOATIME = 0x8, 0x10, 0x20, 0x40, 0x80
JOURNAL_DATA, DIRSYNC = 0x4000, 0x10000
DAX, PROJINHERIT = 0x2000000, 0x20000000

_WORD = struct.Struct("=I4x")
_AT_EMPTY_PATH = 0x1000
_STATX_BTIME = 0x800
_STATX_SIZE = 256
_BTIME = struct.Struct("=qI")  # struct statx_timestamp
_BTIME_AT = 80  # in struct statx
_NONE = {errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)


def get(fd: int) -> int:
    """Return the flags of an open file or directory; 0 if its filesystem has none."""
    reply = bytearray(_WORD.size)
    try:
        fcntl.ioctl(fd, FS_IOC_GETFLAGS, reply, True)
    except OSError as failure:
        if failure.errno in _NONE:
            return 0
        raise
    return int(_WORD.unpack(reply)[0])


def put(fd: int, flags: int) -> None:
    """Set all flags of an open file or directory. EOPNOTSUPP if its filesystem lacks one, or all; EPERM."""
    try:
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, _WORD.pack(flags))
    except OSError as failure:
        if failure.errno != errno.ENOTTY:
            raise
        raise os_error(errno.EOPNOTSUPP) from None


def version(fd: int) -> int:
    """Return the generation of an open file or directory. ENOTTY."""
    reply = bytearray(_WORD.size)
    fcntl.ioctl(fd, FS_IOC_GETVERSION, reply, True)
    return int(_WORD.unpack(reply)[0])


def birth(fd: int) -> int | None:
    """Return an inode's time of birth in ns since the epoch; None if the filesystem does not record it."""
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    if _libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_BTIME, buffer):
        code = ctypes.get_errno()
        if code == errno.ENOSYS:
            return None
        raise os_error(code)
    if not int.from_bytes(buffer.raw[:4], sys.byteorder) & _STATX_BTIME:
        return None
    seconds, ns = _BTIME.unpack_from(buffer, _BTIME_AT)
    return int(seconds * 10**9 + ns)
