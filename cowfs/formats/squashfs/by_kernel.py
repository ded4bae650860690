"""Whether the kernel that runs mounts an image."""

from __future__ import annotations

import gzip
import os
from contextlib import closing

from cowfs.formats.squashfs.image import open_image

_DEVICE_BLOCK = 1024
"""The kernel's squashfs reads its device in blocks of this many bytes (fs/squashfs/squashfs_fs.h)."""
_SECTOR = 512
_OPTIONS = {"gzip": "ZLIB", "lz4": "LZ4", "lzo": "LZO", "xz": "XZ", "zstd": "ZSTD"}
"""The compressors as Kconfig names them, behind CONFIG_SQUASHFS_."""


def refused(path: str, offset: int = 0) -> tuple[str, str]:
    """Say why the kernel cannot mount the image at *offset* of a file, and what to do; "" twice if it can.

    Blocks. LayerError for what is no image or cannot be read; OSError.
    """
    with closing(open_image(os.path.abspath(path), offset)) as image:
        superblock = image.superblock
        size = image.source.file_size()
    process = "use --engine process"
    if superblock.unlike_the_kernel:
        return f"the kernel does not mount {superblock.unlike_the_kernel}", process
    # A loop device has whole sectors of its file alone; the offset itself needs no alignment
    # (loop_set_status_from_info in drivers/block/loop.c).
    available = (size - offset) // _SECTOR * _SECTOR
    if -(-superblock.bytes_used // _DEVICE_BLOCK) * _DEVICE_BLOCK > available:
        why = "the kernel cannot read the end of the image: the file is not padded to a whole block"
        return why, f"{process}, or pack the image without -nopad"
    if f"# CONFIG_SQUASHFS_{_OPTIONS[superblock.compression]} is not set" in _configuration():
        return f"this kernel cannot read squashfs with {superblock.compression}", process
    return "", ""


def _configuration() -> list[str]:
    """The lines of what the kernel was built with, or none where it is not known."""
    try:
        with gzip.open("/proc/config.gz", "rt") as packed:
            return packed.read().splitlines()
    except OSError:
        pass
    try:
        with open(f"/boot/config-{os.uname().release}", encoding="utf-8") as file:
            return file.read().splitlines()
    except (OSError, ValueError):
        return []
