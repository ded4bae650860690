"""The messages between the kernel and a FUSE daemon, as far as the view of a store needs them.

Numbers and layouts are those of include/uapi/linux/fuse.h, in the machine's byte order. Fields at the end
of a request that do not matter here are left out.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from cowfs.types import Attr

MAJOR, MINOR = 7, 31
ROOT_ID = 1
POSIX_ACL = 1 << 20
"""A flag of fuse_init_*: ACLs are kept by us and judged by the kernel."""
UNKNOWN_INO = 0xFFFFFFFF
"""An inode number of fuse_dirent."""
DIRECT_IO = 1
"""A flag of fuse_open_out: each read(2) is asked for, the page cache is left out."""

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

LOOKUP, FORGET, GETATTR, READLINK, OPEN, READ, STATFS, RELEASE = 1, 2, 3, 5, 14, 15, 17, 18
GETXATTR, LISTXATTR, INIT, OPENDIR, READDIR, RELEASEDIR = 22, 23, 26, 27, 28, 29
INTERRUPT, DESTROY, NOTIFY_REPLY, BATCH_FORGET = 36, 38, 41, 42
CHANGES = frozenset((4, 6, 8, 9, 10, 11, 12, 13, 16, 21, 24, 35, 43, 45, 47, 51))
"""SETATTR SYMLINK MKNOD MKDIR UNLINK RMDIR RENAME LINK WRITE SETXATTR REMOVEXATTR CREATE FALLOCATE RENAME2
COPY_FILE_RANGE TMPFILE."""
NOT_ANSWERED = frozenset((FORGET, BATCH_FORGET, INTERRUPT, NOTIFY_REPLY))


class Request(NamedTuple):
    """A request from the kernel."""

    opcode: int
    unique: int
    nodeid: int
    uid: int
    pid: int
    body: bytes


def attributes(attr: Attr) -> bytes:
    """Return a fuse_attr."""
    times = [divmod(time, 10**9) for time in (attr.st_atime_ns, attr.st_mtime_ns, attr.st_ctime_ns)]
    return ATTR.pack(
        *(attr.st_ino, attr.st_size, attr.st_blocks),
        *(seconds for seconds, _ in times),
        *(nanoseconds for _, nanoseconds in times),
        *(attr.st_mode, attr.st_nlink, attr.st_uid, attr.st_gid),
        *(attr.st_rdev & 0xFFFFFFFF, attr.st_blksize, 0),
    )
