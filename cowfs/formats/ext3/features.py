"""The features of an ext2/3/4 filesystem: which it has, and what they are called.

Layout: fs/ext4/ext4.h of Linux (struct ext4_super_block), little-endian; the names are mke2fs(8)'s.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import NamedTuple

SUPERBLOCK, SUPERBLOCK_SIZE = 1024, 1024
"""Where the superblock is, and how large."""
MAGIC = 0xEF53
_MAGIC = struct.Struct("<H")  # at 56
_FEATURES = struct.Struct("<III")  # at 92

HAS_JOURNAL = 0x4
"""Of the compatible ones."""
NEEDS_RECOVERY, JOURNAL_DEVICE = 0x4, 0x8
"""Of the incompatible ones."""


class Features(NamedTuple):
    """The three words of a superblock."""

    compatible: int
    """What others need not know of."""
    incompatible: int
    """What one must know to read."""
    read_only: int
    """What one must know to write."""


EXT3 = Features(0x3F, 0x2 | 0x4 | 0x10, 0x1 | 0x2 | 0x4)
"""What the kernel's fs/ext4 accepts under the name ext3 (EXT3_FEATURE_*_SUPP)."""
ENGINE = Features(0x3D, 0x2 | 0x4, 0x1 | 0x2)
"""What our own engine reads and writes: all that mke2fs ever gave an ext3."""

_COMPATIBLE = {
    0x2: "imagic_inodes",
    0x200: "sparse_super2",
    0x400: "fast_commit",
    0x800: "stable_inodes",
    0x1000: "orphan_file",
}
_INCOMPATIBLE = {
    0x1: "compression",
    0x8: "journal_dev",
    0x10: "meta_bg",
    0x40: "extents",
    0x80: "64bit",
    0x100: "mmp",
    0x200: "flex_bg",
    0x400: "ea_inode",
    0x1000: "dirdata",
    0x2000: "metadata_csum_seed",
    0x4000: "large_dir",
    0x8000: "inline_data",
    0x10000: "encrypt",
    0x20000: "casefold",
}
_READ_ONLY = {
    0x4: "btree_dir",
    0x8: "huge_file",
    0x10: "uninit_bg",
    0x20: "dir_nlink",
    0x40: "extra_isize",
    0x100: "quota",
    0x200: "bigalloc",
    0x400: "metadata_csum",
    0x800: "replica",
    0x1000: "read-only",
    0x2000: "project",
    0x4000: "shared_blocks",
    0x8000: "verity",
    0x10000: "orphan_present",
}


def read(superblock: bytes) -> Features | None:
    """Return the features in a superblock; None if it is none of ext2, ext3 or ext4."""
    if len(superblock) < SUPERBLOCK_SIZE or _MAGIC.unpack_from(superblock, 56)[0] != MAGIC:
        return None
    return Features(*_FEATURES.unpack_from(superblock, 92))


def foreign(found: Features, known: Features) -> list[str]:
    """Return the names of the features that are not among the *known*.

    A compatible one without a name is left out: it hurts nobody.
    """
    names = []
    for bits, ours, named in zip(found, known, (_COMPATIBLE, _INCOMPATIBLE, _READ_ONLY), strict=True):
        left = bits & ~ours
        names += [name for bit, name in named.items() if left & bit]
        unnamed = left & ~sum(named)
        if unnamed and named is not _COMPATIBLE:
            names.append(f"unknown feature {unnamed:#x}")
    return names


def check(fd: int, name: str) -> None:
    """Raise OSError unless the engine can read and write the image behind *fd*; *name* is for messages.

    EINVAL: no ext filesystem at all; EOPNOTSUPP: not a mere ext3, with the names of what it has.
    """
    found = read(os.pread(fd, SUPERBLOCK_SIZE, SUPERBLOCK))
    if found is None:
        raise OSError(errno.EINVAL, "no ext3 filesystem", name)
    if names := foreign(found, ENGINE):
        raise OSError(
            errno.EOPNOTSUPP, f"has features that the engine does not know: {', '.join(names)}", name
        )
    if not found.compatible & HAS_JOURNAL:
        raise OSError(errno.EOPNOTSUPP, "has no journal (ext2), so it would not survive a crash", name)
