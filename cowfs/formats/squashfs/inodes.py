"""Inodes: a reference -> an :class:`Inode`.

A reference is 48 bits: the position of the metadata block in the inode table, shifted left by 16,
and the offset in the decompressed block. Layouts: squashfs_fs.h; the meaning of the fields: the
kernel's inode.c.
"""

from __future__ import annotations

import stat
import struct
from dataclasses import dataclass

from cowfs.formats.squashfs.metadata import Place, Table

NONE = 0xFFFF_FFFF
"""In place of a fragment, or of extended attributes: there are none."""

_DIRECTORY, _FILE, _SYMLINK, _BLOCK, _CHAR, _FIFO, _SOCKET = range(1, 8)
EXTENDED = 7
"""What is added to a type where the inode is an extended one."""

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
"""The S_IFMT bits of each type, the extended ones too."""

MAX_TARGET = 4096
"""The longest that a symlink may say that it is; the kernel's reader refuses longer ones too."""


@dataclass(slots=True)
class Inode:
    """An inode, without what is of variable length."""

    ref: int
    number: int
    mode: int
    """With the S_IFMT bits."""
    uid: int
    gid: int
    mtime: int
    """Seconds since the epoch; the format has no other times."""
    nlink: int
    size: int
    """As st_size: of a directory, the length of its listing plus 3."""
    rdev: int
    blocks: int
    """As st_blocks, in units of 512 bytes, but for the blocks of extended attributes."""
    xattr: int
    """Which set of extended attributes, or NONE."""
    start: int
    """File: where its data begins in the image. Directory: the block of its listing."""
    fragment: int
    """File: which fragment has its tail, or NONE."""
    offset: int
    """File: where in the fragment the tail is. Directory: where in its block the listing begins."""
    end: int
    """Where the fixed part ends, in bytes from the start of the metadata block that it begins in."""
    index_count: int
    """Directory: how many entries its index has."""

    def body(self, table: Table) -> Place:
        """Where in the inode table is what follows: a block list, the target of a symlink, an index.

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
        # The block that was used last: the inodes of a directory are mostly in one.
        self._last = (-1, b"")
        # The inode that was read last: a copy-up, or a removal, does so several times.
        self._inode = _NONE_YET

    def read(self, ref: int) -> Inode:
        """The inode at *ref*. May block. EIO when there can be none."""
        inode = self._inode
        if inode.ref == ref:
            return inode
        block = ref >> 16
        at = offset = ref & 0xFFFF
        last, data = self._last
        if block != last:
            data = self._table.block(block)
            self._last = block, data
        if offset + _LONGEST > len(data):  # it may go on in the next block, or be the last of all
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
        """The fields from nlink on, for the types that are not frequent; *rest* is as in the layout."""
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
                rdev = rest[1]  # the kernel's new_encode_dev(), which is what makedev(3) gives
            if kind > EXTENDED:
                xattr = rest[-1]
        return nlink, size, rdev, blocks, xattr, start, fragment, offset, begin.offset + length, index_count

    def _read_fixed_part(self, place: Place) -> bytes:
        """The fixed part of an inode and not a byte more: it may be the last that there is."""
        kind = int.from_bytes(self._table.read(place, 2), "little")
        return self._table.read(place, _LAYOUTS[kind].size if kind in _LAYOUTS else 2)

    def _no_inode(self, ref: int, kind: int) -> OSError:
        return self._table.damaged(Place(ref >> 16, ref & 0xFFFF), f"is not an inode (type {kind})")

    def target(self, inode: Inode) -> bytes:
        """The target of a symlink, up to its first NUL as the kernel sees it. EIO."""
        return self._table.read(inode.body(self._table), inode.size).partition(b"\0")[0][: MAX_TARGET - 1]
