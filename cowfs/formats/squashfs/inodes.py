"""Inodes: a reference -> an :class:`Inode`.

A reference is 48 bits: the position of the metadata block in the inode table, shifted left by 16,
and the offset in the decompressed block. Layouts: squashfs_fs.h; the meaning of the fields: the
kernel's inode.c.
"""

from __future__ import annotations

import stat
import struct
from dataclasses import dataclass

from cowfs.formats.squashfs.metadata import BLOCK, Place, Table

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

MAX_TARGET = 4096
"""The longest target of a symlink in bytes; the kernel's reader refuses longer ones too."""


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
    body: Place
    """What follows: the block list of a file, the target of a symlink, the index of a directory."""
    index_count: int
    """Directory: how many entries its index has."""


class InodeTable:
    """The inode table of an image."""

    __slots__ = ("_ids", "_table")

    def __init__(self, table: Table, ids: tuple[int, ...]) -> None:
        """*ids*: the owner table."""
        self._table = table
        self._ids = ids

    def read(self, ref: int) -> Inode:
        """The inode at *ref*. May block. EIO when there can be none."""
        block, offset = ref >> 16, ref & 0xFFFF
        data = self._table.block(block)
        at = offset
        if offset + _LONGEST > len(data):  # it may go on in the next block, or be the last of all
            if offset >= BLOCK:
                raise self._table.damaged(Place(block, offset), "begins past its block")
            data = self._table.upto(Place(block, offset), _LONGEST)
            at = 0
        kind = data[at] if at < len(data) else 0
        layout = _LAYOUTS.get(kind)
        if layout is None or at + layout.size > len(data):
            raise self._table.damaged(Place(block, offset), f"is no inode (type {kind})")
        fields = layout.unpack_from(data, at)
        if fields[0] != kind or not fields[5]:
            raise self._table.damaged(Place(block, offset), "is no inode")
        try:
            return self._make(ref, kind, fields, Place(block, offset + layout.size))
        except IndexError:
            raise self._table.damaged(Place(block, offset), "has an unknown owner") from None

    def _make(self, ref: int, kind: int, fields: tuple[int, ...], body: Place) -> Inode:
        _, mode, uid, gid, mtime, number = fields[:6]
        nlink, size, rdev, blocks, xattr = 1, 0, 0, 0, NONE
        start, fragment, offset, index_count = 0, NONE, 0, 0
        basic = kind if kind <= EXTENDED else kind - EXTENDED
        if kind == _FILE:
            start, fragment, offset, size = fields[6:]
            blocks = (size + 511) >> 9
        elif kind == _DIRECTORY:
            start, nlink, size, offset, _ = fields[6:]
        elif kind == _FILE + EXTENDED:
            start, size, holes, nlink, fragment, offset, xattr = fields[6:]
            if size >= 1 << 63:
                raise self._table.damaged(body, f"has a size of {size}")
            blocks = max(size - holes + 511, 0) >> 9
        elif kind == _DIRECTORY + EXTENDED:
            nlink, size, start, _, index_count, offset, xattr = fields[6:]
        elif basic == _SYMLINK:
            nlink, size = fields[6:]
            if size > MAX_TARGET:
                raise self._table.damaged(body, f"is a symlink with a target of {size} bytes")
            if kind > EXTENDED:
                raw = self._table.read(Place(body.block, body.offset + size), 4)
                xattr = int.from_bytes(raw, "little")
        elif basic in (_BLOCK, _CHAR):
            nlink, device = fields[6:8]
            # The kernel's new_decode_dev(); the same bits mean the same to makedev(3).
            rdev = device
            xattr = fields[8] if kind > EXTENDED else NONE
        else:
            nlink = fields[6]
            xattr = fields[7] if kind > EXTENDED else NONE
        return Inode(
            ref,
            number,
            FORMATS[basic] | (mode & 0o7777),
            self._ids[uid],
            self._ids[gid],
            mtime,
            nlink,
            size,
            rdev,
            blocks,
            xattr,
            start,
            fragment,
            offset,
            body,
            index_count,
        )

    def target(self, inode: Inode) -> bytes:
        """The target of a symlink, up to its first NUL as the kernel sees it. EIO."""
        return self._table.read(inode.body, inode.size).partition(b"\0")[0]
