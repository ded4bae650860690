"""Recognise an EROFS image by its superblock. The kernel reads the rest.

Layout: the kernel's fs/erofs/erofs_fs.h, struct erofs_super_block.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from cowfs.errors import LayerError
from cowfs.formats.squashfs.errors import AGAIN

OFFSET = 1024
SIZE = 128
MAGIC = b"\xe2\xe1\xf5\xe0"

# magic, checksum, feature_compat, blkszbits, sb_extslots, root_nid, inos, build_time, build_time_nsec,
# blocks, (meta_blkaddr, xattr_blkaddr, uuid, volume_name), feature_incompat, (compression,) extra_devices
_LAYOUT = struct.Struct("<4sIIBBHQQII40xI2xH")
_DEVICE_TABLE = 0x8


@dataclass(frozen=True, slots=True)
class Superblock:
    """The facts in a superblock."""

    raw: bytes
    inodes: int
    made: int
    """The time of creation, in seconds since the epoch."""
    size: int
    """The size of the image in bytes."""


def is_erofs(start: bytes) -> bool:
    """Whether an image that begins with *start* is an EROFS image."""
    return start[OFFSET : OFFSET + len(MAGIC)] == MAGIC


def parse(start: bytes, name: str, file_size: int) -> Superblock:
    """Read the superblock of an image that begins with *start*. LayerError if it is damaged."""
    raw = start[OFFSET : OFFSET + SIZE]
    if len(raw) < SIZE:
        raise LayerError(f"{name}: truncated EROFS image: {file_size} bytes", AGAIN)
    _, _, _, block_log, _, _, inodes, made, _, blocks, needs, others = _LAYOUT.unpack_from(raw)
    size = blocks << block_log
    if not 9 <= block_log <= 16 or not inodes or not blocks or made >= 1 << 36:
        raise LayerError(f"{name}: damaged EROFS superblock", AGAIN)
    if size > file_size:
        raise LayerError(f"{name}: truncated EROFS image: {file_size} of {size} bytes", AGAIN)
    if needs & _DEVICE_TABLE and others:
        # Linux before 6.4 opens them by the names in the image: it would show any disk (fs/erofs/super.c).
        raise LayerError(
            f"{name}: parts of this EROFS image are on other devices", "make it with mkfs.erofs, in one file"
        )
    return Superblock(raw, inodes, made, size)
