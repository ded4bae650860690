"""The superblock of an ext3 image: is this a store's filesystem, and is it clean?

Layout: include/uapi and fs/ext4/ext4.h of Linux (struct ext4_super_block), little-endian, at byte 1024.
"""

from __future__ import annotations

import os
import struct
import uuid
from dataclasses import dataclass

from cowfs.errors import StoreError
from cowfs.store.sizes import SMALLEST, format_size
from cowfs.store.sniff import what_is

_OFFSET = 1024
_SIZE = 1024
_MAGIC = 0xEF53
# inodes, blocks, reserved, free blocks, free inodes, first data block, log2(block size / 1024)
_COUNTS = struct.Struct("<7I")
_STATE = struct.Struct("<HHH")  # at 56: magic, state, errors behaviour
_FEATURES = struct.Struct("<III16s")  # at 92: compatible, incompatible, read-only compatible, UUID
_VALID, _ERRORS = 1, 2

_HAS_JOURNAL = 0x4
_NEEDS_RECOVERY = 0x4
_JOURNAL_DEVICE = 0x8

# What fs/ext4 itself accepts under the name ext3 (EXT3_FEATURE_*_SUPP); all else is listed by name,
# the names being those of mke2fs(8).
_NOT_EXT3: tuple[dict[int, str], dict[int, str], dict[int, str]] = (
    {0x200: "sparse_super2", 0x400: "fast_commit", 0x800: "stable_inodes", 0x1000: "orphan_file"},
    {
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
    },
    {
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
    },
)
_EXT3 = (0x3F, 0x4 | 0x2 | 0x10, 0x1 | 0x2 | 0x4)


@dataclass(frozen=True, slots=True)
class Superblock:
    """What of an ext3 superblock a store is judged by. Sizes are bytes."""

    block_size: int
    blocks: int
    free_blocks: int
    inodes: int
    free_inodes: int
    needs_recovery: bool
    """The journal holds what is not yet in place: it was not unmounted, or it is mounted now."""
    has_errors: bool
    """The kernel has found it damaged, or it was never cleanly unmounted."""
    uuid: str

    @property
    def size(self) -> int:
        """The size of the filesystem, which may be less than that of its file."""
        return self.blocks * self.block_size

    @property
    def state(self) -> str:
        """``clean``, ``needs recovery`` or ``has errors``."""
        if self.has_errors:
            return "has errors"
        return "needs recovery" if self.needs_recovery else "clean"


def read_superblock(fd: int, path: str, *, smallest: int = SMALLEST) -> Superblock:
    """Read and judge the superblock of the image open as *fd*.

    Raises StoreError, naming what the file is, unless it is a whole ext3 filesystem of *smallest*
    bytes or more.
    """
    length = os.fstat(fd).st_size
    data = os.pread(fd, _SIZE, _OFFSET)
    if len(data) < _SIZE or _STATE.unpack_from(data, 56)[0] != _MAGIC:
        raise StoreError(f"{path}: not a store but {what_is(fd)}", "cowfs create makes a store")
    inodes, blocks, _, free_blocks, free_inodes, _, log_size = _COUNTS.unpack_from(data)
    _, state, _ = _STATE.unpack_from(data, 56)
    compatible, incompatible, read_only, identity = _FEATURES.unpack_from(data, 92)
    _check_features(path, (compatible, incompatible, read_only))
    if log_size > 6 or blocks == 0 or inodes == 0 or free_blocks > blocks or free_inodes > inodes:
        raise StoreError(f"{path}: the ext3 superblock is damaged", f"make a copy, then try: e2fsck {path}")
    block_size = 1024 << log_size
    if length < blocks * block_size:
        raise StoreError(
            f"{path}: the image is truncated: {format_size(length)} of "
            f"{format_size(blocks * block_size)} are there",
            "copy it again from where it came from",
        )
    if blocks * block_size < smallest:
        raise StoreError(
            f"{path}: {format_size(blocks * block_size)} is too small for a store",
            f"cowfs grow makes it larger, to at least {format_size(SMALLEST)}",
        )
    return Superblock(
        block_size=block_size,
        blocks=blocks,
        free_blocks=free_blocks,
        inodes=inodes,
        free_inodes=free_inodes,
        needs_recovery=bool(incompatible & _NEEDS_RECOVERY),
        has_errors=bool(state & _ERRORS) or not state & _VALID,
        uuid=str(uuid.UUID(bytes=identity)),
    )


def _check_features(path: str, found: tuple[int, int, int]) -> None:
    if found[1] & _JOURNAL_DEVICE:
        raise StoreError(f"{path}: an external ext3 journal, not a store")
    names = []
    for bits, known, not_ext3 in zip(found, _EXT3, _NOT_EXT3, strict=True):
        left = bits & ~known
        names += [name for bit, name in not_ext3.items() if left & bit]
        unnamed = left & ~sum(not_ext3)
        # Unknown compatible features hurt nobody; of the others the kernel would refuse the mount.
        if unnamed and bits is not found[0]:
            names.append(f"unknown feature {unnamed:#x}")
    if names:
        raise StoreError(
            f"{path}: an ext4 filesystem ({', '.join(names)}), but a store is a mere ext3",
            "cowfs create makes a store; copy upper/, work/ and cowfs/ into it",
        )
    if not found[0] & _HAS_JOURNAL:
        raise StoreError(
            f"{path}: an ext2 filesystem: it has no journal and would not survive a crash",
            f"tune2fs -j {path} makes it ext3",
        )
