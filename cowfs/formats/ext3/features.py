"""Read the features of an ext2/3/4 filesystem, and name them.

Layout: fs/ext4/ext4.h of Linux (struct ext4_super_block), little-endian. The names are those of mke2fs(8).
"""

from __future__ import annotations

import errno
import os
import struct
from typing import NamedTuple

SUPERBLOCK, SUPERBLOCK_SIZE = 1024, 1024
"""Offset and size of the superblock in bytes."""
MAGIC = 0xEF53
_MAGIC = struct.Struct("<H")  # at 56
_FEATURES = struct.Struct("<III")  # at 92
_REVISION = struct.Struct("<I")  # at 76
_JOURNAL_INODE = struct.Struct("<I")  # at 224

HAS_JOURNAL, SPARSE_SUPER2 = 0x4, 0x200
"""Compatible features."""
NEEDS_RECOVERY, JOURNAL_DEVICE = 0x4, 0x8
"""Incompatible features."""


class Features(NamedTuple):
    """The three words of features in a superblock."""

    compatible: int
    """Features that a driver need not support."""
    incompatible: int
    """Features that a driver must support to read."""
    read_only: int
    """Features that a driver must support to write."""


EXT3 = Features(0x23F, 0x2 | 0x4 | 0x10, 0x1 | 0x2 | 0x4)
"""The supported features: those that the kernel's fs/ext4 accepts as ext3 (EXT3_FEATURE_*_SUPP), and
sparse_super2, which it ignores."""

_COMPATIBLE = {
    0x40: "lazy_bg",
    0x80: "exclude_inode",
    0x100: "exclude_bitmap",
    0x400: "fast_commit",
    0x800: "stable_inodes",
    0x1000: "orphan_file",
}
_INCOMPATIBLE = {
    0x1: "compression",
    0x8: "journal_dev",
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
    """Return the features in a superblock; None if it is not one of ext2, ext3 or ext4."""
    if len(superblock) < SUPERBLOCK_SIZE or _MAGIC.unpack_from(superblock, 56)[0] != MAGIC:
        return None
    return Features(*_FEATURES.unpack_from(superblock, 92))


def foreign(found: Features) -> list[str]:
    """Return the names of the features that are not among those of EXT3."""
    names = []
    for bits, ours, named in zip(found, EXT3, (_COMPATIBLE, _INCOMPATIBLE, _READ_ONLY), strict=True):
        left = bits & ~ours
        names += [name for bit, name in named.items() if left & bit]
        unnamed = left & ~sum(named)
        if unnamed:
            names.append(f"unknown feature {unnamed:#x}")
    return names


def obstacle(superblock: bytes, name: str) -> tuple[str, str] | None:
    """Return why the engine does not support the filesystem of a superblock, and a hint; None if it does.

    The hint calls the image *name*.
    """
    found = read(superblock)
    if found is None:
        return "not an ext3 filesystem", ""
    if found.incompatible & JOURNAL_DEVICE:
        return "an external ext3 journal, not a filesystem", ""
    if names := foreign(found):
        return (
            f"an ext4 filesystem ({', '.join(names)}), but a store is a plain ext3 filesystem",
            f"if a store is in it: mount -o loop {name} DIR, and give DIR; cowfs create creates a new one",
        )
    (revision,) = _REVISION.unpack_from(superblock, 76)
    if revision > 1:
        return f"an ext filesystem of unknown revision {revision}", ""
    if not found.compatible & HAS_JOURNAL:
        return (
            "an ext2 filesystem: it has no journal and would not survive a crash",
            f"copy the file, then run on the copy: tune2fs -j {name}",
        )
    if not _JOURNAL_INODE.unpack_from(superblock, 224)[0]:
        return (
            "its journal is on another device, but a store must be a single file",
            f"unmount it on the machine with that device; copy the file, then run on the copy:"
            f" tune2fs -O ^has_journal {name} and tune2fs -j {name}",
        )
    return None


def check(fd: int, name: str) -> None:
    """OSError unless the engine can read and write the image *fd*; *name* is for messages.

    EINVAL if it is not an ext filesystem; EOPNOTSUPP, with the names of the features, if not a plain ext3.
    """
    superblock = os.pread(fd, SUPERBLOCK_SIZE, SUPERBLOCK)
    if why := obstacle(superblock, name):
        raise OSError(errno.EOPNOTSUPP if read(superblock) else errno.EINVAL, why[0], name)
