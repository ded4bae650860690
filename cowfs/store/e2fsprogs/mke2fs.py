"""Make an ext3 filesystem with mke2fs(8)."""

from __future__ import annotations

import re

from cowfs.errors import StoreError
from cowfs.linux.files import size_of
from cowfs.store.e2fsprogs import tools

# The features of the kernel's former ext3 driver, independent of /etc/mke2fs.conf.
_FEATURES = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,sparse_super,large_file"

_GROUP = 128 << 20
"""Bytes of one block group, with blocks of 4 KiB."""


_COUNT = re.compile(rb"([0-9]+)/([0-9]+)[\b ]*$")
"""How mke2fs shows at which table of inodes it is. It then moves back over that."""


def format_image(
    fd: int,
    path: str,
    identity: str = "",
    *,
    journal: int = 0,
    keep: bool = False,
    share: tools.Share | None = None,
) -> None:
    """Make an empty ext3 filesystem that root owns, in the file behind *fd*. Blocks.

    With *keep*, the blocks of the file stay allocated. *journal* is in bytes (0: mke2fs's choice). *path* is
    for messages. SystemFailure without mke2fs, StoreError if it fails.
    """
    said = b""

    def show(piece: bytes) -> None:
        nonlocal said
        said += piece
        if share is not None and (found := _COUNT.search(said)) and int(found[2]):
            done = min(int(found[1]) / int(found[2]), 1)
            share(f"mke2fs: {int(100 * done)} %", done)

    # All block groups have as many inodes as the first one, however small that was made. So a small store
    # gets twice as many inodes per byte, or it would run out of them after it has grown.
    per_inode = "8192" if size_of(fd) >= _GROUP else "4096"
    # Inodes of 256 bytes have space for nanoseconds and the overlay's xattrs. -m 0: no blocks are reserved
    # for root. nodiscard: otherwise mke2fs frees all blocks of the file.
    extended = ["lazy_itable_init=0", "root_owner=0:0", *(["nodiscard"] if keep else [])]
    done = tools.run(
        [
            *("mke2fs", "-F", "-t", "ext3", "-O", _FEATURES, "-b", "4096", "-I", "256"),
            *(["-q"] if share is None else []),
            *("-m", "0", "-i", per_inode, "-L", "cowfs", "-E", ",".join(extended)),
            *(["-U", identity] if identity else []),
            *(["-J", f"size={journal >> 20}"] if journal else []),
            tools.place(fd),
        ],
        pass_fds=[fd],
        merge=True,
        show=show,
    )
    if done.returncode:
        raise StoreError(f"{path}: mke2fs failed: {tools.last_line(said + done.stdout)}")
