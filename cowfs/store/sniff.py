"""Say what a file is that is not what was wanted, so that an error message can name it."""

from __future__ import annotations

import os

_HEAD = 69_632
"""How much of a file is looked at: btrfs has its magic at 64 KiB, iso9660 at 32 KiB."""

_MAGICS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"hsqs", "a squashfs image"),
    (0, b"sqsh", "a big-endian squashfs image"),
    (0, b"shsq", "an lzma-squashfs image (unofficial)"),
    (0, b"\x7fELF", "an ELF program"),
    (0, b"#!", "a script"),
    (0, b"\x1f\x8b", "gzip data"),
    (0, b"\xfd7zXZ\x00", "xz data"),
    (0, b"\x28\xb5\x2f\xfd", "zstd data"),
    (0, b"\x04\x22\x4d\x18", "lz4 data"),
    (0, b"BZh", "bzip2 data"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (0, b"QFI\xfb", "a qcow2 disk image"),
    (0, b"LUKS\xba\xbe", "a LUKS encrypted volume"),
    (0, b"XFSB", "an xfs filesystem"),
    (3, b"NTFS    ", "an NTFS filesystem"),
    (3, b"EXFAT   ", "an exFAT filesystem"),
    (54, b"FAT", "a FAT filesystem"),
    (82, b"FAT32   ", "a FAT filesystem"),
    (257, b"ustar", "a tar archive"),
    (512, b"EFI PART", "a disk image with a GPT partition table"),
    (1024, b"\x10\x20\xf5\xf2", "an f2fs filesystem"),
    (1024, b"\xe2\xe1\xf5\xe0", "an erofs image"),
    (1024 + 56, b"\x53\xef", "an ext2, ext3 or ext4 filesystem"),
    (4086, b"SWAPSPACE2", "a swap area"),
    (32_769, b"CD001", "an ISO 9660 image (a CD)"),
    (65_600, b"_BHRfS_M", "a btrfs filesystem"),
    (510, b"\x55\xaa", "a disk image with a partition table"),  # also at the end of FAT and NTFS boot sectors
)


def what_is(fd: int) -> str:
    """Name the content of an open file with its article: ``a text file``. Reads its head only."""
    head = os.pread(fd, _HEAD, 0)
    if not head:
        return "an empty file"
    for offset, magic, name in _MAGICS:
        if head.startswith(magic, offset):
            return name
    if not head.strip(b"\0"):
        return "a file of zeros"
    return "a text file" if _is_text(head) else "a file of unknown kind"


def _is_text(head: bytes) -> bool:
    if b"\0" in head:
        return False
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.start >= len(head) - 4 and len(head) == _HEAD  # a character cut in two by our limit
    return True
