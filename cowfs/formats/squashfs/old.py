"""Inodes and listings of versions 1 to 3, in either byte order.

Their fields are runs of bits, one after the other. An image of a little-endian machine has the first field
in the lowest bits of the number that the bytes are, one of a big-endian machine in the highest: so one list
of widths does for both. Layouts: squashfs-tools, squashfs_compat.h; use: its unsquash-1.c to -3.c.

The data that an inode refers to is as in version 4: block lists, fragments, targets. The index of a directory
is not used, because listings are short enough to read completely (see LISTING_MAX).
"""

from __future__ import annotations

import stat
import struct
from typing import Literal

from cowfs.formats.squashfs.directory import NOT_STORED, Fill, Listing, Short
from cowfs.formats.squashfs.inodes import FORMATS, MAX_TARGET, NONE, Inode, InodeTable
from cowfs.formats.squashfs.metadata import Place, Table
from cowfs.formats.squashfs.superblock import Superblock

_IPC, _DIRECTORY, _FILE, _SYMLINK, _BLOCK, _CHAR, _FIFO, _SOCKET, _LARGE_DIRECTORY, _LARGE_FILE = range(10)


class _Layout:
    """A record's fields: their names and widths in bits, in stored order."""

    def __init__(self, widths: dict[str, int], byteorder: Literal["little", "big"]) -> None:
        total = sum(widths.values())
        self.size = total // 8
        """The size of the record in bytes."""
        self._byteorder = byteorder
        self._fields: list[tuple[str, int, int]] = []
        begin = 0
        for name, width in widths.items():
            shift = begin if byteorder == "little" else total - begin - width
            self._fields.append((name, shift, (1 << width) - 1))
            begin += width

    def unpack(self, data: bytes) -> dict[str, int]:
        """Return the fields in *data*, which has exactly :attr:`size` bytes."""
        number = int.from_bytes(data, self._byteorder)
        return {name: number >> shift & mask for name, shift, mask in self._fields}


_BASE_3 = {"type": 4, "mode": 12, "uid": 8, "gid": 8, "mtime": 32, "number": 32}
_BASE_2 = {"type": 4, "mode": 12, "uid": 8, "gid": 8}
_BASE_1 = {"type": 4, "mode": 12, "uid": 4, "gid": 4}
_LAYOUTS_3 = {
    _DIRECTORY: {"nlink": 32, "size": 19, "offset": 13, "start": 32, "parent": 32},
    _FILE: {"start": 64, "fragment": 32, "offset": 32, "size": 32},
    _SYMLINK: {"nlink": 32, "size": 16},
    _BLOCK: {"nlink": 32, "rdev": 16},
    _CHAR: {"nlink": 32, "rdev": 16},
    _FIFO: {"nlink": 32},
    _SOCKET: {"nlink": 32},
    _LARGE_DIRECTORY: {"nlink": 32, "size": 27, "offset": 13, "start": 32, "indexes": 16, "parent": 32},
    _LARGE_FILE: {"nlink": 32, "start": 64, "fragment": 32, "offset": 32, "size": 64},
}
_LAYOUTS_2: dict[int, dict[str, int]] = {
    _DIRECTORY: {"size": 19, "offset": 13, "mtime": 32, "start": 24},
    _FILE: {"mtime": 32, "start": 32, "fragment": 32, "offset": 32, "size": 32},
    _SYMLINK: {"size": 16},
    _BLOCK: {"rdev": 16},
    _CHAR: {"rdev": 16},
    _FIFO: {},
    _SOCKET: {},
    _LARGE_DIRECTORY: {"size": 27, "offset": 13, "mtime": 32, "start": 24, "indexes": 16},
}
_LAYOUTS_1: dict[int, dict[str, int]] = {
    _IPC: {"kind": 4, "bank": 4},
    _DIRECTORY: _LAYOUTS_2[_DIRECTORY],
    _FILE: {"mtime": 32, "start": 32, "size": 32},
    _SYMLINK: {"size": 16},
    _BLOCK: {"rdev": 16},
    _CHAR: {"rdev": 16},
}
_TYPES_1 = 5
"""The number of types in version 1, except _IPC. Larger numbers are the same types with other owners."""
_BANK = 16
"""The number of owners for each of these types."""
_TYPES = (*FORMATS, stat.S_IFDIR, stat.S_IFREG)
"""The S_IFMT bits of each type."""


class OldInodeTable(InodeTable):
    """The inode table of an image of version 1, 2 or 3."""

    __slots__ = ("_base", "_first", "_layouts", "_made", "_numbered", "_own_group", "_owners")

    def __init__(self, table: Table, ids: tuple[int, ...], superblock: Superblock) -> None:
        """*ids* are the owners, followed by the groups."""
        super().__init__(table, ids)
        order = superblock.byteorder
        self._numbered = superblock.version >= (3, 0)
        self._first = superblock.version < (2, 0)
        # In place of a group: its number is the owner's.
        self._own_group = 15 if self._first else 255
        base, layouts = (_BASE_3, _LAYOUTS_3) if self._numbered else (_BASE_2, _LAYOUTS_2)
        if self._first:
            base, layouts = _BASE_1, _LAYOUTS_1
        self._base = _Layout(base, order)
        self._layouts = {kind: _Layout(base | fields, order) for kind, fields in layouts.items()}
        self._owners = superblock.ids
        self._made = superblock.mkfs_time

    def read(self, ref: int) -> Inode:
        """Return the inode at *ref*. May block. EIO if there is none."""
        inode = self._inode
        if inode.ref == ref:
            return inode
        begin = Place(ref >> 16, ref & 0xFFFF)
        stored = self._base.unpack(self._table.read(begin, self._base.size))["type"]
        kind, bank = self._kind_of_1(stored) if self._first else (stored, 0)
        layout = self._layouts.get(kind)
        if layout is None:
            raise self._no_inode(ref, stored)
        fields = layout.unpack(self._table.read(begin, layout.size))
        if kind == _IPC:
            kind, bank = _SOCKET if fields["kind"] == _SOCKET else _FIFO, fields["bank"]
        # As the kernel numbered those before version 3, which have no number: by their places.
        number = fields["number"] if self._numbered else ((begin.block << 8) + (begin.offset >> 2) + 1) & NONE
        if not number:
            raise self._no_inode(ref, kind)
        size, is_file = fields.get("size", 0), kind in (_FILE, _LARGE_FILE)
        if size >= 1 << 63:
            raise self._table.damaged(begin, f"has a size of {size}")
        if kind == _SYMLINK and size > MAX_TARGET:
            raise self._table.damaged(begin, f"is a symlink with a target of {size} bytes")
        if kind in (_DIRECTORY, _LARGE_DIRECTORY) and not self._numbered:
            size += NOT_STORED
        uid, gid = self._owner(begin, fields["uid"] + _BANK * bank, fields["gid"])
        inode = Inode(
            ref=ref,
            number=number,
            mode=_TYPES[kind] | fields["mode"],
            uid=uid,
            gid=gid,
            mtime=fields.get("mtime", self._made),
            nlink=fields.get("nlink", 1),
            size=size,
            rdev=fields.get("rdev", 0),
            blocks=(size + 511) >> 9 if is_file else 0,
            xattr=NONE,
            start=fields.get("start", 0),
            fragment=fields.get("fragment", NONE) if is_file else NONE,
            offset=fields.get("offset", 0),
            end=begin.offset + layout.size,
            index_count=0,
        )
        self._inode = inode
        return inode

    @staticmethod
    def _kind_of_1(stored: int) -> tuple[int, int]:
        """The type of an inode of version 1, and in which bank its owner is."""
        if stored == _IPC:
            return _IPC, 0
        return (stored - 1) % _TYPES_1 + 1, (stored - 1) // _TYPES_1

    def _owner(self, begin: Place, owner: int, group: int) -> tuple[int, int]:
        place = owner if group == self._own_group else self._owners + group
        if owner >= self._owners or place >= len(self._ids):
            raise self._table.damaged(begin, "has an unknown owner")
        return self._ids[owner], self._ids[place]


def old_listing(superblock: Superblock) -> Fill:
    """Return what reads the listings of an image of version 1, 2 or 3."""
    order, big = superblock.order, superblock.order == ">"
    numbered = superblock.version >= (3, 0)
    # Entries - 1, block of their inodes and, in version 3, an inode number; before it, two in one.
    header = struct.Struct(order + ("BII" if numbered else "I"))
    # Offset of the inode and type, name length - 1 and, in version 3, a number relative to the header's.
    entry = struct.Struct(order + ("HBh" if numbered else "HB"))

    def fill(entries: Listing, data: bytes, size: int) -> None:
        position, end = 0, len(data)
        while position < size:
            if position + header.size > end:
                raise Short
            first, *rest = header.unpack_from(data, position)
            if numbered:
                count, block = first, rest[0]
            else:
                count, block = (first >> 24, first & 0xFF_FFFF) if big else (first & 0xFF, first >> 8)
            position += header.size
            for _ in range(count + 1):
                word, length, *_ = entry.unpack_from(data, position)
                offset, kind = (word >> 3, word & 7) if big else (word & 0x1FFF, word >> 13)
                begin = position + entry.size
                position = begin + length + 1
                if position > end:
                    raise struct.error
                entries.setdefault(data[begin:position], (block << 16 | offset) << 3 | kind)

    return fill
