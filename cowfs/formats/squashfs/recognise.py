"""Recognise what a file is that is not a squashfs image, for messages."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import NamedTuple


class _Magic(NamedTuple):
    offset: int
    magic: bytes
    what: str
    advice: str = ""
    """How to use its content as a lower."""


MAGIC, MAGIC_BIG_ENDIAN = b"hsqs", b"sqsh"
"""How a squashfs image begins; the other one before version 4."""
LZMA_MAGICS = {b"shsq": "<", b"qshs": ">", b"sqlz": ">"}
"""How images begin whose blocks may be LZMA (sqlzma), with their byte order as struct has it."""
MAGICS = {MAGIC: "<", MAGIC_BIG_ENDIAN: ">"} | LZMA_MAGICS
"""All that an image may begin with."""

SAMPLE = 0x9008
"""How many bytes from the start :func:`recognise` needs."""

EXT_MAGIC = (1080, b"\x53\xef")
"""Offset and value of the magic of an ext2, ext3 or ext4 filesystem."""

_DECOMPRESS = "decompress it first: {} FILE"
_UNPACK = "unpack it, and mount the directory, or make an image of that with mksquashfs: {}"
_ARCHIVE = "it can be a lower, from the start of its file, but no module: those are squashfs images"
_LOOP = "mount it, and mount the directory as the lower: mount -o loop,ro FILE DIR"
VENDOR = "unpack it with sasquatch, then make an image of that with mksquashfs"

_MAGICS = (
    _Magic(0, b"\x1f\x8b", "gzip-compressed data", _DECOMPRESS.format("gunzip")),
    _Magic(0, b"\xfd7zXZ\0", "xz-compressed data", _DECOMPRESS.format("unxz")),
    _Magic(0, b"\x28\xb5\x2f\xfd", "zstd-compressed data", _DECOMPRESS.format("unzstd")),
    _Magic(0, b"\x04\x22\x4d\x18", "lz4-compressed data", _DECOMPRESS.format("unlz4")),
    _Magic(0, b"BZh", "bzip2-compressed data", _DECOMPRESS.format("bunzip2")),
    _Magic(0, b"PK\x03\x04", "a zip archive", _ARCHIVE),
    _Magic(0, b"7z\xbc\xaf\x27\x1c", "a 7-zip archive", _UNPACK.format("7z x FILE -oDIR")),
    _Magic(0, b"Rar!\x1a\x07", "a RAR archive", _UNPACK.format("unrar x FILE DIR/")),
    _Magic(0, b"QFI\xfb", "a qcow2 disk image", "make it a raw one first: qemu-img convert FILE RAW"),
    _Magic(0, b"KDMV", "a VMDK disk image", "make it a raw one first: qemu-img convert FILE RAW"),
    _Magic(0, b"vhdxfile", "a VHDX disk image", "make it a raw one first: qemu-img convert FILE RAW"),
    _Magic(0, b"tqsh", "a squashfs image of DD-WRT", VENDOR),
    _Magic(0, b"hsqt", "a squashfs image of DD-WRT", VENDOR),
    _Magic(0, b"\x45\x3d\xcd\x28", "a cramfs image", _LOOP),
    _Magic(0, b"\x28\xcd\x3d\x45", "a big-endian cramfs image", _UNPACK.format("cramfsck -x DIR FILE")),
    _Magic(0, b"-rom1fs-", "a romfs image", _LOOP),
    _Magic(0, b"XFSB", "an XFS filesystem", _LOOP),
    _Magic(0, b"070701", "a cpio archive", _UNPACK.format("cpio -id -D DIR <FILE")),
    _Magic(0, b"070702", "a cpio archive", _UNPACK.format("cpio -id -D DIR <FILE")),
    _Magic(0, b"!<arch>\n", "an ar archive or a Debian package", _UNPACK.format("dpkg-deb -x FILE DIR")),
    _Magic(0, b"\xed\xab\xee\xdb", "an RPM package", _UNPACK.format("rpm2cpio FILE | cpio -id -D DIR")),
    _Magic(0, b"#!", "a script"),
    _Magic(257, b"ustar", "a tar archive", _ARCHIVE),
    _Magic(1024, b"\xe2\xe1\xf5\xe0", "an EROFS image", "root can mount it, from a file: --engine kernel"),
    _Magic(
        *EXT_MAGIC, "an ext2, ext3 or ext4 filesystem", f"give a store with --store; if it is none: {_LOOP}"
    ),
    _Magic(0x8001, b"CD001", "an ISO 9660 image", f"{_ARCHIVE}; if it holds a squashfs: -o offset=auto"),
)


_OLD_TAR = _Magic(0, b"", "a tar archive", _ARCHIVE)


def advice(start: bytes) -> str:
    """Return how to use the content of a file that begins with *start* as a lower; "" if unknown."""
    found = _found(start)
    return "" if found is None else found.advice


def recognise(start: bytes) -> str:
    """Return what a file is that begins with *start*, in a few words; "" if unknown."""
    found = _found(start)
    if found is not None:
        return found.what
    if not start:
        return "an empty file"
    if start[:4] == b"\x7fELF":
        return "an ELF program"
    if start[510:512] == b"\x55\xaa":
        return "a disk image with partitions, or a boot sector"
    if not start.strip(b"\0"):
        return "a file that begins with zeros"
    return "a text file" if _is_text(start) else ""


def _found(start: bytes) -> _Magic | None:
    for known in _MAGICS:
        if start[known.offset : known.offset + len(known.magic)] == known.magic:
            return known
    return _OLD_TAR if is_old_tar(start) else None


def is_old_tar(start: bytes) -> bool:
    """Whether a file that begins with *start* is a tar archive without a magic, as V7's tar wrote them.

    Its first header has a name, octal numbers, and the right checksum (tar(5)).
    """
    header = start[:512]
    numbers = (
        header[start:end].strip(b" \0") for start, end in ((100, 108), (124, 136), (136, 148), (148, 156))
    )
    if len(header) < 512 or not header[0] or header[156] not in b"\0" + b"01234567":
        return False
    if not all(re.fullmatch(b"[0-7]+", number) for number in numbers):
        return False
    wanted = int(header[148:156].strip(b" \0"), 8)
    summed = header[:148] + b" " * 8 + header[156:]
    return wanted in {sum(summed), sum(memoryview(summed).cast("b"))}


def _is_text(start: bytes) -> bool:
    if b"\0" in start:
        return False
    try:
        start.decode()
    except UnicodeDecodeError as error:
        # The sample may end within a character.
        return error.start >= len(start) - 3 and len(start) >= SAMPLE
    return True


Pread = Callable[[int, int], bytes]
"""Like os.pread() for one file: takes size and offset."""
_SEARCHED = 16 << 20
"""How many bytes after a program are searched for an image."""
_SQUASHFS = struct.Struct("<4s8xI6xH4xHH")  # magic, block_size, block_log, major, minor
_LOAD = 1  # PT_LOAD
_NO_FILE = 1 << 62
"""Longer than any file, but some MiB more still fit into off_t."""


def appended_at(start: bytes, size: int = _NO_FILE) -> int | None:
    """Where an ELF program ends and what is appended to it begins (as in an AppImage), or None (elf(5)).

    The section headers are the last thing in it: e_shoff + e_shentsize * e_shnum. Without any, or if they
    end beyond the *size* of the file, what is loaded from it is.
    """
    if start[:6] == b"\x7fELF\x02\x01" and len(start) >= 64:
        programs, table, program, count, each, sections = struct.unpack_from("<32xQQ6xHHHH", start)
        load = struct.Struct("<I4xQ16xQ")  # p_type, p_offset, p_filesz
    elif start[:6] == b"\x7fELF\x01\x01" and len(start) >= 52:
        programs, table, program, count, each, sections = struct.unpack_from("<28xII6xHHHH", start)
        load = struct.Struct("<II8xI")
    else:
        return None
    if table and each * sections and table + each * sections <= size:
        return int(table + each * sections)
    ends = [0]
    for number in range(count):
        at = programs + number * program
        if at + load.size > len(start):
            break
        kind, offset, length = load.unpack_from(start, at)
        if kind == _LOAD:
            ends.append(offset + length)
    return max(ends) or None if max(ends) < _NO_FILE else None


def image_behind(start: bytes, pread: Pread) -> int | None:
    """Return where a squashfs image begins after an ELF program, or where the program ends if none is found.

    None if it is not such a program. *start* is its beginning. Reads at most a few MiB. OSError.
    """
    end = appended_at(start)
    if end and not pread(1, end - 1):  # the section headers lie
        end = appended_at(start, 0)
    if end is None:
        return None
    at = end
    while at < end + _SEARCHED and (piece := pread(1 << 20, at)):
        found = piece.find(MAGIC)
        while found >= 0:
            if _may_be_squashfs(pread(_SQUASHFS.size, at + found)):
                return at + found
            found = piece.find(MAGIC, found + 1)
        at += max(len(piece) - 3, 1)
    return end


def _may_be_squashfs(start: bytes) -> bool:
    if len(start) < _SQUASHFS.size:
        return False
    _, block_size, block_log, major, minor = _SQUASHFS.unpack(start)
    return (major, minor) == (4, 0) and block_log <= 20 and block_size == 1 << block_log
