"""Read the inode of a reference.

A reference has 48 bits: the position of the metadata block in the inode table, shifted left by 16, and the
offset in the decompressed block. The layouts are those of squashfs_fs.h, with the meaning of the fields in
the kernel's inode.c.
"""

from __future__ import annotations

import stat
import struct
from dataclasses import dataclass

from cowfs.formats.squashfs.metadata import Place, Table

NONE = 0xFFFF_FFFF
"""In place of the number of a fragment, or of a set of xattrs, if there is none."""

_DIRECTORY, _FILE, _SYMLINK, _BLOCK, _CHAR, _FIFO, _SOCKET = range(1, 8)
EXTENDED = 7
"""The difference of the type of an extended inode and the basic type."""

FORMATS = (
    0,
    stat.S_IFDIR,
    stat.S_IFREG,
    stat.S_IFLNK,
    stat.S_IFBLK,
    stat.S_IFCHR,
    stat.S_IFIFO,
    stat.S_IFSOCK,
)
"""The S_IFMT bits of each basic type."""

# All begin with: type, mode, uid index, gid index (u16), mtime, inode number (u32). Then:
_LAYOUTS = {
    # listing block, nlink (u32), listing size, offset (u16), parent (u32)
    1: struct.Struct("<4H2I IIHHI"),
    # data start, fragment, offset in it, size (u32)
    2: struct.Struct("<4H2I IIII"),
    # nlink, length of the target (u32)
    3: struct.Struct("<4H2I II"),
    # nlink, rdev (u32)
    4: struct.Struct("<4H2I II"),
    5: struct.Struct("<4H2I II"),
    # nlink (u32)
    6: struct.Struct("<4H2I I"),
    7: struct.Struct("<4H2I I"),
    # nlink, listing size, listing block, parent (u32), index count, offset (u16), xattr (u32)
    8: struct.Struct("<4H2I IIIIHHI"),
    # data start, size, bytes that are holes (u64), nlink, fragment, offset in it, xattr (u32)
    9: struct.Struct("<4H2I QQQIIII"),
    # as the basic one; the xattr follows the target
    10: struct.Struct("<4H2I II"),
    # nlink, rdev, xattr (u32)
    11: struct.Struct("<4H2I III"),
    12: struct.Struct("<4H2I III"),
    # nlink, xattr (u32)
    13: struct.Struct("<4H2I II"),
    14: struct.Struct("<4H2I II"),
}
_LONGEST = max(layout.size for layout in _LAYOUTS.values())
_unpack_file = _LAYOUTS[_FILE].unpack_from
_unpack_directory = _LAYOUTS[_DIRECTORY].unpack_from
_MODES = FORMATS + FORMATS[1:]
"""The S_IFMT bits of each type, also of extended ones."""

MAX_TARGET = 4096
"""The limit of a symbolic link's target in bytes, as in the kernel."""


@dataclass(slots=True)
class Inode:
    """An inode, without the part of variable length."""

    ref: int
    number: int
    mode: int
    """With the S_IFMT bits."""
    uid: int
    gid: int
    mtime: int
    """Seconds since the epoch. The format has no other times."""
    nlink: int
    size: int
    """The st_size. That of a directory is the length of its listing plus 3."""
    rdev: int
    blocks: int
    """The st_blocks, in units of 512 bytes, without the blocks of xattrs."""
    xattr: int
    """The number of its set of xattrs, or NONE."""
    start: int
    """File: the position of its data in the image. Directory: the block of its listing."""
    fragment: int
    """File: the number of the fragment with its tail, or NONE."""
    offset: int
    """File: the offset of the tail in the fragment. Directory: the offset of the listing in its block."""
    end: int
    """The end of the fixed part, in bytes from the start of the metadata block where it begins."""
    index_count: int
    """Directory: the number of entries of its index."""

    def body(self, table: Table) -> Place:
        """Return the place of the variable part: a block list, the target of a symbolic link, or an index.

        May block. EIO.
        """
        begin = Place(self.ref >> 16, self.ref & 0xFFFF)
        return table.after(begin, self.end - begin.offset)


_NONE_YET = Inode(*[-1] * 16)


class InodeTable:
    """The inode table of an image."""

    __slots__ = ("_ids", "_inode", "_last", "_table")

    def __init__(self, table: Table, ids: tuple[int, ...]) -> None:
        """*ids*: the owner table."""
        self._table = table
        self._ids = ids
        # The block used last, because the inodes of a directory are mostly in one.
        self._last = (-1, b"")
        # The inode read last, because a copy-up or a removal reads it several times.
        self._inode = _NONE_YET

    def read(self, ref: int) -> Inode:
        """Return the inode at *ref*. May block. EIO if there is none."""
        inode = self._inode
        if inode.ref == ref:
            return inode
        block = ref >> 16
        at = offset = ref & 0xFFFF
        last, data = self._last
        if block != last:
            data = self._table.block(block)
            self._last = block, data
        if offset + _LONGEST > len(data):  # it may continue in the next block, or be the last inode
            data, at = self._read_fixed_part(Place(block, offset)), 0
        kind = data[at]
        fields: tuple[int, ...]
        try:
            if kind == _FILE:
                _, mode, uid, gid, mtime, number, start, fragment, tail, size = _unpack_file(data, at)
                fields = (1, size, 0, (size + 511) >> 9, NONE, start, fragment, tail, offset + 32, 0)
            elif kind == _DIRECTORY:
                _, mode, uid, gid, mtime, number, start, nlink, size, tail, _ = _unpack_directory(data, at)
                fields = (nlink, size, 0, 0, NONE, start, NONE, tail, offset + 32, 0)
            else:
                _, mode, uid, gid, mtime, number, *rest = _LAYOUTS[kind].unpack_from(data, at)
                fields = self._others(kind, Place(block, offset), rest)
            if not number or data[at + 1]:
                raise self._no_inode(ref, kind)
            inode = Inode(
                ref,
                number,
                _MODES[kind] | (mode & 0o7777),
                self._ids[uid],
                self._ids[gid],
                mtime,
                *fields,
            )
        except (KeyError, struct.error):
            raise self._no_inode(ref, kind) from None
        except IndexError:
            raise self._table.damaged(Place(block, offset), "has an unknown owner") from None
        self._inode = inode
        return inode

    def _others(self, kind: int, begin: Place, rest: list[int]) -> tuple[int, ...]:
        """Return the fields from nlink on for the rarer types. *rest* has the fields of the layout."""
        length = _LAYOUTS[kind].size
        start, fragment, offset, index_count = 0, NONE, 0, 0
        size, rdev, blocks, xattr = 0, 0, 0, NONE
        basic = kind if kind <= EXTENDED else kind - EXTENDED
        if basic == _FILE:
            start, size, holes, nlink, fragment, offset, xattr = rest
            if size >= 1 << 63:
                raise self._table.damaged(begin, f"has a size of {size}")
            blocks = max(size - holes + 511, 0) >> 9
        elif basic == _DIRECTORY:
            nlink, size, start, _, index_count, offset, xattr = rest
        elif basic == _SYMLINK:
            nlink, size = rest
            if size > MAX_TARGET:
                raise self._table.damaged(begin, f"is a symlink with a target of {size} bytes")
            if kind > EXTENDED:
                raw = self._table.read(self._table.after(begin, length + size), 4)
                xattr = int.from_bytes(raw, "little")
        else:
            nlink = rest[0]
            if basic in (_BLOCK, _CHAR):
                rdev = rest[1]  # the kernel's new_encode_dev(), the same as makedev(3)
            if kind > EXTENDED:
                xattr = rest[-1]
        return nlink, size, rdev, blocks, xattr, start, fragment, offset, begin.offset + length, index_count

    def _read_fixed_part(self, place: Place) -> bytes:
        """Return the fixed part of an inode, and read no more, because the table may end there."""
        kind = int.from_bytes(self._table.read(place, 2), "little")
        return self._table.read(place, _LAYOUTS[kind].size if kind in _LAYOUTS else 2)

    def _no_inode(self, ref: int, kind: int) -> OSError:
        return self._table.damaged(Place(ref >> 16, ref & 0xFFFF), f"is not an inode (type {kind})")

    def target(self, inode: Inode) -> bytes:
        """Return the target of a symbolic link, up to its first NUL, as the kernel does. EIO."""
        return self._table.read(inode.body(self._table), inode.size).partition(b"\0")[0][: MAX_TARGET - 1]
