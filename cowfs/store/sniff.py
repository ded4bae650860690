"""Say what a file is that was to be a store, so that an error message can name it."""

from __future__ import annotations

import os

from cowfs.formats.squashfs.recognise import recognise

_HEAD = 69_632
"""How much of a file is looked at: btrfs has its magic at 64 KiB."""

_MAGICS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"hsqs", "a squashfs image"),
    (0, b"sqsh", "a big-endian squashfs image"),
    (0, b"LUKS\xba\xbe", "a LUKS encrypted volume"),
    (3, b"NTFS    ", "an NTFS filesystem"),
    (3, b"EXFAT   ", "an exFAT filesystem"),
    (54, b"FAT", "a FAT filesystem"),
    (82, b"FAT32   ", "a FAT filesystem"),
    (512, b"EFI PART", "a disk image with a GPT partition table"),
    (1024, b"\x10\x20\xf5\xf2", "an f2fs filesystem"),
    (4086, b"SWAPSPACE2", "a swap area"),
    (65_600, b"_BHRfS_M", "a btrfs filesystem"),
)
"""What a disk may hold; archives, programs and the like are known to *recognise*."""


def what_is(fd: int) -> str:
    """Name the content of an open file with its article: ``a text file``. Reads its head only."""
    head = os.pread(fd, _HEAD, 0)
    for offset, magic, name in _MAGICS:
        if head.startswith(magic, offset):
            return name
    return recognise(head) or "a file of unknown kind"
