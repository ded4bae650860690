"""The messages between the kernel and a FUSE daemon: the opcodes, and what the view of a store needs.

Numbers and layouts are those of include/uapi/linux/fuse.h, in the machine's byte order. Fields at the end
of a request that do not matter here are left out.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from cowfs.types import Attr

MAJOR, MINOR = 7, 31
ROOT_ID = 1
POSIX_ACL = 1 << 20
"""A flag of fuse_init_*: cowfs stores ACLs, and the kernel checks them."""
UNKNOWN_INO = 0xFFFFFFFF
"""An inode number of fuse_dirent."""
DIRECT_IO = 1
"""A flag of fuse_open_out: each read(2) sends a request, and the page cache is not used."""

IN = struct.Struct("=IIQQIIII")  # fuse_in_header: len, opcode, unique, nodeid, uid, gid, pid, padding
OUT = struct.Struct("=IiQ")  # fuse_out_header: len, error (negated), unique
INIT_IN = struct.Struct("=4I")  # fuse_init_in: major, minor, max_readahead, flags; more since 7.36
# fuse_init_out: major, minor, max_readahead, flags, max_background, congestion_threshold, max_write,
# time_gran, max_pages, map_alignment, flags2, unused[7]
INIT_OUT = struct.Struct("=4I2H2I2HI28x")
# fuse_attr: ino, size, blocks; atime, mtime, ctime; the three's nanoseconds, mode, nlink, uid, gid, rdev,
# blksize, flags
ATTR = struct.Struct("=3Q3q10I")
ENTRY_OUT = struct.Struct("=4Q2I")  # fuse_entry_out: nodeid, generation, four validity times
ATTR_OUT = struct.Struct("=Q2I")  # fuse_attr_out: two validity times, dummy; attr
FORGET_IN = struct.Struct("=Q")  # fuse_forget_in: nlookup
BATCH_FORGET_IN = struct.Struct("=I4x")  # fuse_batch_forget_in: count; then as many of:
FORGET_ONE = struct.Struct("=QQ")  # fuse_forget_one: nodeid, nlookup
OPEN_IN = struct.Struct("=II")  # fuse_open_in: flags, open_flags
OPEN_OUT = struct.Struct("=QI4x")  # fuse_open_out: fh, open_flags
READ_IN = struct.Struct("=QQI")  # fuse_read_in: fh, offset, size; more that does not matter here
RELEASE_IN = struct.Struct("=Q")  # fuse_release_in: fh; more
DIRENT = struct.Struct("=QQII")  # fuse_dirent: ino, off (of the next), namelen, type; name, padded to 8
GETXATTR_IN = struct.Struct("=I4x")  # fuse_getxattr_in: size; for GETXATTR the name
GETXATTR_OUT = struct.Struct("=I4x")  # fuse_getxattr_out: size, if the request was for the size
# fuse_kstatfs: blocks, bfree, bavail, files, ffree; bsize, namelen, frsize, padding, spare[6]
STATFS_OUT = struct.Struct("=5Q3I28x")


class Opcode(IntEnum):
    """enum fuse_opcode: the kinds of requests."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


CHANGES = frozenset(
    (
        *(Opcode.SETATTR, Opcode.SYMLINK, Opcode.MKNOD, Opcode.MKDIR, Opcode.UNLINK, Opcode.RMDIR),
        *(Opcode.RENAME, Opcode.LINK, Opcode.WRITE, Opcode.SETXATTR, Opcode.REMOVEXATTR, Opcode.CREATE),
        *(Opcode.FALLOCATE, Opcode.RENAME2, Opcode.COPY_FILE_RANGE, Opcode.TMPFILE),
    )
)
NOT_ANSWERED = frozenset((Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, Opcode.NOTIFY_REPLY))


class Request(NamedTuple):
    """A request from the kernel."""

    opcode: int
    unique: int
    nodeid: int
    uid: int
    pid: int
    body: bytes


def attributes(attr: Attr) -> bytes:
    times = [divmod(time, 10**9) for time in (attr.st_atime_ns, attr.st_mtime_ns, attr.st_ctime_ns)]
    return ATTR.pack(
        *(attr.st_ino, attr.st_size, attr.st_blocks),
        *(seconds for seconds, _ in times),
        *(nanoseconds for _, nanoseconds in times),
        *(attr.st_mode, attr.st_nlink, attr.st_uid, attr.st_gid),
        *(attr.st_rdev & 0xFFFFFFFF, attr.st_blksize, 0),
    )
