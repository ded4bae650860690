"""Make an ext3 filesystem with mke2fs(8)."""

from __future__ import annotations

from cowfs.errors import StoreError
from cowfs.linux.files import size_of
from cowfs.store.e2fsprogs import tools

# What ext3 was when the kernel's ext3 driver knew it, whatever /etc/mke2fs.conf says.
_FEATURES = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,sparse_super,large_file"

_GROUP = 128 << 20
"""Bytes that one block group covers, with blocks of 4 KiB."""


def format_image(fd: int, path: str, identity: str = "", *, journal: int = 0, keep: bool = False) -> None:
    """Make an empty ext3 filesystem, all of it root's, in the file behind *fd*. Blocks.

    With *keep* the blocks that the file has stay allocated; *journal* is in bytes (0: mke2fs's choice).
    """
    # All block groups have the number of inodes that the first one, however small, was made with. So
    # a small store gets twice as many, or it would run out of them when it is a large one.
    per_inode = "8192" if size_of(fd) >= _GROUP else "4096"
    # 256 bytes an inode have room for nanoseconds and the overlay's xattrs; -m 0: nobody needs blocks
    # that only root may use. nodiscard: else mke2fs gives back all the blocks that the file has.
    extended = ["lazy_itable_init=0", "root_owner=0:0", *(["nodiscard"] if keep else [])]
    done = tools.run(
        [
            *("mke2fs", "-q", "-F", "-t", "ext3", "-O", _FEATURES, "-b", "4096", "-I", "256"),
            *("-m", "0", "-i", per_inode, "-L", "cowfs", "-E", ",".join(extended)),
            *(["-U", identity] if identity else []),
            *(["-J", f"size={journal >> 20}"] if journal else []),
            tools.place(fd),
        ],
        pass_fds=[fd],
        merge=True,
    )
    if done.returncode:
        raise StoreError(f"{path}: mke2fs failed: {tools.last_line(done.stdout)}")
