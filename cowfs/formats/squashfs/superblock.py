"""The superblock: the first 96 bytes of an image, 119 of version 3, 63 of version 2, 51 of version 1.

Layout: squashfs_fs.h, struct squashfs_super_block; the checks are those of the kernel's super.c. The older
ones: squashfs-tools, squashfs_compat.h.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Literal

from cowfs.errors import LayerError
from cowfs.formats.squashfs.errors import AGAIN
from cowfs.formats.squashfs.recognise import (
    LZMA_MAGICS,
    MAGICS,
    Pread,
    advice,
    appended_at,
    image_behind,
    recognise,
)  # fmt: skip

SIZE = 96
NONE = 0xFFFF_FFFF_FFFF_FFFF
"""In place of the position of a table that the image does not have."""

# magic, inodes, mkfs_time, block_size, fragments (u32); compressor, block_log, flags, ids, major,
# minor (u16); root, bytes_used, and the tables: id, xattr, inode, directory, fragment, export (u64)
_LAYOUT = struct.Struct("<5I6H8Q")

# Versions 2 and 3: magic, inodes, size, positions of the tables of version 2: owners, groups, inodes,
# directories (u32); major, minor, block size of version 1, block_log (u16); flags, owners, groups (u8);
# mkfs_time (u32), root (u64); from version 2 on: block_size, fragments, fragment table of version 2 (u32)
_OLDEST = "7I4H3BIQ"
_OLD = _OLDEST + "3I"
# What version 3 has behind it: size and, of the same tables, fragments and export, the positions (u64)
_OLD_3 = "7Q"
SIZES = {
    1: struct.calcsize("<" + _OLDEST),
    2: struct.calcsize("<" + _OLD),
    3: struct.calcsize("<" + _OLD + _OLD_3),
    4: SIZE,
}
"""The size of the superblock of each version in bytes."""
LONGEST = max(SIZES.values())
"""The size of the longest superblock in bytes."""
READ = {(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (4, 0)}
"""The versions that are read."""

ANY = -1
"""In place of a compressor: the superblock does not say which."""
COMPRESSORS = {ANY: "gzip or lzma", 1: "gzip", 2: "lzma", 3: "lzo", 4: "xz", 5: "lz4", 6: "zstd"}

NO_INODE_COMPRESSION = 0x001
NO_DATA_COMPRESSION = 0x002
NO_FRAGMENT_COMPRESSION = 0x008
NO_FRAGMENTS = 0x010
ALWAYS_FRAGMENTS = 0x020
CHECKED = 0x004
"""Flag before version 4: another byte follows the header of each metadata block."""
DUPLICATES_REMOVED = 0x040
EXPORTABLE = 0x080
NO_XATTR_COMPRESSION = 0x100
NO_XATTRS = 0x200
COMPRESSOR_OPTIONS = 0x400
NO_ID_COMPRESSION = 0x800


@dataclass(frozen=True, slots=True)
class Superblock:
    """The superblock of an image. Positions are in bytes from the start of the image."""

    raw: bytes
    inodes: int
    mkfs_time: int
    """Seconds since the epoch."""
    block_size: int
    block_log: int
    fragments: int
    compressor: int
    flags: int
    ids: int
    root: int
    """The reference of the root directory's inode."""
    bytes_used: int
    id_table: int
    xattr_table: int
    inode_table: int
    directory_table: int
    fragment_table: int
    export_table: int
    version: tuple[int, int] = (4, 0)
    order: str = "<"
    """The byte order as in :mod:`struct`: "<" or, only before version 4, ">"."""
    groups: int = 0
    """Before version 4: the number of groups, which are in a table of their own."""
    group_table: int = NONE

    @property
    def is_old(self) -> bool:
        """Whether the version is before 4."""
        return self.version < (4, 0)

    @property
    def unlike_the_kernel(self) -> str:
        """What kind of image it is that no kernel mounts, whatever it was built with; "" if one may."""
        if self.is_old:
            return "squashfs version {}.{}".format(*self.version)
        if self.raw[:4] in LZMA_MAGICS or self.compression == "lzma":
            return "squashfs with LZMA"
        return ""

    @property
    def byteorder(self) -> Literal["little", "big"]:
        """The byte order as in int.from_bytes()."""
        return "big" if self.order == ">" else "little"

    @property
    def last_number(self) -> int:
        """The greatest possible number of an inode. In version 2 that is its position."""
        return self.inodes if self.version >= (3, 0) else 0xFFFF_FFFF

    @property
    def compression(self) -> str:
        """The name of the compressor, as in mksquashfs -comp."""
        return COMPRESSORS[self.compressor]

    @property
    def exportable(self) -> bool:
        """Whether there is a table of inodes by their numbers, which the kernel uses for file handles."""
        return self.export_table != NONE

    @property
    def has_xattrs(self) -> bool:
        """Whether there is a table of xattrs, even if it is empty."""
        return self.xattr_table != NONE


def parse(raw: bytes, name: str, file_size: int, pread: Pread | None = None) -> Superblock:
    """Read a superblock; :class:`LayerError` says why the image *name* cannot be read.

    *raw* is the start of the image: 96 bytes, or more, to recognise another kind of file. *file_size* is the
    number of bytes from the start of the image on. *pread* reads from there, to find an image after a
    program.
    """
    order = _check_magic(raw, name, pread)
    major, minor = struct.unpack_from(order + "28xHH", raw) if len(raw) >= 32 else (4, 0)
    if (major, minor) not in READ or (order == ">" and major == 4):
        _refuse_version(name, major, minor, "big-endian " if order == ">" else "")
    size = SIZES[major]
    if len(raw) < size:
        raise LayerError(f"{name}: truncated: a squashfs image has at least {size} bytes", AGAIN)
    superblock = _parse(raw) if major == 4 else _parse_old(raw, order)
    if raw[:4] in LZMA_MAGICS:
        superblock = replace(superblock, compressor=ANY)
    _check(superblock, name, file_size)
    return superblock


def _parse(raw: bytes) -> Superblock:
    (
        _,
        inodes,
        mkfs_time,
        block_size,
        fragments,
        compressor,
        block_log,
        flags,
        ids,
        _,
        _,
        root,
        bytes_used,
        id_table,
        xattr_table,
        inode_table,
        directory_table,
        fragment_table,
        export_table,
    ) = _LAYOUT.unpack_from(raw)
    return Superblock(
        raw=bytes(raw[:SIZE]),
        inodes=inodes,
        mkfs_time=mkfs_time,
        block_size=block_size,
        block_log=block_log,
        fragments=fragments,
        compressor=compressor,
        flags=flags,
        ids=ids,
        root=root,
        bytes_used=bytes_used,
        id_table=id_table,
        xattr_table=xattr_table,
        inode_table=inode_table,
        directory_table=directory_table,
        fragment_table=fragment_table,
        export_table=export_table,
    )


def _parse_old(raw: bytes, order: str) -> Superblock:
    fields = struct.unpack_from(order + _OLDEST, raw)
    _, inodes, used, owners_at, groups_at, inode_table, directory_table, major, minor, size, log = fields[:11]
    flags, owners, groups, made, root = fields[11:]
    block_size, fragments, fragment_table, export_table = size, 0, NONE, NONE
    if major >= 2:
        block_size, fragments, fragment_table = struct.unpack_from(order + "3I", raw, SIZES[1])
    if major == 3:
        new = struct.unpack_from(order + _OLD_3, raw, SIZES[2])
        used, owners_at, groups_at, inode_table, directory_table, fragment_table, export_table = new
    return Superblock(
        raw=bytes(raw[: SIZES[major]]),
        inodes=inodes,
        mkfs_time=made,
        block_size=block_size,
        block_log=log,
        fragments=fragments,
        compressor=ANY,
        flags=flags,
        ids=owners,
        root=root,
        bytes_used=used,
        id_table=owners_at,
        xattr_table=NONE,
        inode_table=inode_table,
        directory_table=directory_table,
        fragment_table=fragment_table,
        # 3.0 has another field in its place.
        export_table=export_table if (major, minor) >= (3, 1) else NONE,
        version=(major, minor),
        order=order,
        groups=groups,
        group_table=groups_at if groups else NONE,
    )


def _check_magic(raw: bytes, name: str, pread: Pread | None) -> str:
    """Return the byte order, as in :mod:`struct`."""
    magic = raw[:4]
    order = MAGICS.get(magic)
    if order:
        return order
    what = recognise(raw)
    hint = advice(raw) or "if one begins later in the file, use -o offset=auto"
    end = appended_at(raw) if pread is None else image_behind(raw, pread)
    if end is not None:
        hint = f"if this is an AppImage, try -o offset={end}"
    raise LayerError(f"{name}: not a squashfs image" + (f" but {what}" if what else ""), hint)


def _refuse_version(name: str, major: int, minor: int, order: str = "") -> None:
    if order and major >= 4:
        raise LayerError(
            f"{name}: claims to be a {order}squashfs version {major}.{minor}, but that is never big-endian",
            "the image is damaged: copy it again",
        )
    raise LayerError(
        f"{name}: {order}squashfs version {major}.{minor} is not supported, only 1.0 to 4.0",
        "unpack it and make a new one: unsquashfs -d DIR FILE, mksquashfs DIR NEW"
        if major < 4
        else "the image is newer than this reader, or damaged",
    )


def _check(sb: Superblock, name: str, file_size: int) -> None:
    """:class:`LayerError` for a superblock that contradicts itself or the size of the file."""
    problem = ""
    if sb.compressor not in COMPRESSORS:
        problem = f"unknown compressor {sb.compressor}"
    elif not (12 if sb.version >= (2, 0) else 9) <= sb.block_log <= 20 or sb.block_size != 1 << sb.block_log:
        problem = f"block size {sb.block_size} with logarithm {sb.block_log}"
    elif sb.bytes_used > file_size:
        raise LayerError(f"{name}: truncated squashfs image: {file_size} of {sb.bytes_used} bytes", AGAIN)
    elif not sb.ids:
        problem = "no owners"
    elif not SIZES[sb.version[0]] <= sb.inode_table < sb.directory_table < sb.bytes_used:
        problem = f"inode table at {sb.inode_table:#x}, directory table at {sb.directory_table:#x}"
    elif not sb.directory_table < sb.id_table < sb.bytes_used:
        problem = f"owner table at {sb.id_table:#x}"
    elif sb.is_old and sb.id_table + 4 * sb.ids > sb.bytes_used:
        problem = f"{sb.ids} owners at {sb.id_table:#x}"
    elif sb.groups and not sb.directory_table < sb.group_table <= sb.bytes_used - 4 * sb.groups:
        problem = f"group table at {sb.group_table:#x}"
    elif sb.fragments and not sb.directory_table < sb.fragment_table < sb.bytes_used:
        problem = f"fragment table at {sb.fragment_table:#x}"
    elif sb.has_xattrs and not sb.directory_table < sb.xattr_table < sb.bytes_used:
        problem = f"attribute table at {sb.xattr_table:#x}"
    elif sb.exportable and not sb.directory_table < sb.export_table < sb.bytes_used:
        problem = f"export table at {sb.export_table:#x}"
    elif sb.root & 0xFFFF >= 8192:
        problem = f"root inode {sb.root:#x}"
    if problem:
        raise LayerError(f"{name}: damaged squashfs superblock: {problem}", AGAIN)
