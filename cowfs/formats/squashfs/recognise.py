"""What a file that is no squashfs is instead: for messages."""

from __future__ import annotations

import struct
from typing import NamedTuple


class _Magic(NamedTuple):
    offset: int
    magic: bytes
    what: str


SAMPLE = 0x9008
"""How many bytes from the start :func:`recognise` wants to see."""

_MAGICS = (
    _Magic(0, b"\x1f\x8b", "gzip-compressed data"),
    _Magic(0, b"\xfd7zXZ\0", "xz-compressed data"),
    _Magic(0, b"\x28\xb5\x2f\xfd", "zstd-compressed data"),
    _Magic(0, b"BZh", "bzip2-compressed data"),
    _Magic(0, b"PK\x03\x04", "a zip archive"),
    _Magic(0, b"7z\xbc\xaf\x27\x1c", "a 7-zip archive"),
    _Magic(0, b"QFI\xfb", "a qcow2 disk image"),
    _Magic(0, b"KDMV", "a VMDK disk image"),
    _Magic(0, b"shsq", "a squashfs 3 image with LZMA compression"),
    _Magic(0, b"qshs", "a squashfs 3 image with LZMA compression"),
    _Magic(0, b"\x45\x3d\xcd\x28", "a cramfs image"),
    _Magic(0, b"-rom1fs-", "a romfs image"),
    _Magic(0, b"XFSB", "an XFS filesystem"),
    _Magic(0, b"070701", "a cpio archive"),
    _Magic(0, b"!<arch>\n", "an ar archive or a Debian package"),
    _Magic(0, b"#!", "a script"),
    _Magic(257, b"ustar", "a tar archive"),
    _Magic(1024, b"\xe2\xe1\xf5\xe0", "an EROFS image"),
    _Magic(1080, b"\x53\xef", "an ext2, ext3 or ext4 filesystem"),
    _Magic(0x8001, b"CD001", "an ISO 9660 image"),
)


def recognise(start: bytes) -> str:
    """Say what a file is that begins with *start*, in a few words; "" when nothing is known of it."""
    for offset, magic, what in _MAGICS:
        if start[offset : offset + len(magic)] == magic:
            return what
    if not start:
        return "an empty file"
    if start[:4] == b"\x7fELF":
        return "an ELF program"
    if start[510:512] == b"\x55\xaa":
        return "a disk image with partitions, or a boot sector"
    if not start.strip(b"\0"):
        return "a file that begins with zeros"
    return "a text file" if _is_text(start) else ""


def _is_text(start: bytes) -> bool:
    if b"\0" in start:
        return False
    try:
        start.decode()
    except UnicodeDecodeError as error:
        # The end of what was read may cut a character in two.
        return error.start >= len(start) - 3 and len(start) >= SAMPLE
    return True


def appended_at(start: bytes) -> int | None:
    """Where an ELF program ends and what is appended to it begins (as in an AppImage), or None.

    The section headers are the last thing in an ELF file (elf(5)): e_shoff + e_shentsize * e_shnum.
    """
    if start[:6] == b"\x7fELF\x02\x01" and len(start) >= 64:
        table, size, count = struct.unpack_from("<40xQ10xHH", start)
    elif start[:6] == b"\x7fELF\x01\x01" and len(start) >= 52:
        table, size, count = struct.unpack_from("<32xI10xHH", start)
    else:
        return None
    end = int(table) + int(size) * int(count)
    return end if end > 0 else None
