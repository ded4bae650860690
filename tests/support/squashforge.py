"""Squashfs images written byte by byte: for what no honest tool would write.

Metadata is stored uncompressed, so where everything will be is known beforehand, and an inode may
refer to what is written after it: to its own directory, for instance.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

METADATA = 8192
NONE64 = 0xFFFF_FFFF_FFFF_FFFF
NONE32 = 0xFFFF_FFFF
DIRECTORY, FILE, SYMLINK = 1, 2, 3


def metadata(data: bytes) -> bytes:
    """*data* as uncompressed metadata blocks."""
    parts = [data[start : start + METADATA] for start in range(0, len(data), METADATA)]
    return b"".join(struct.pack("<H", len(part) | 0x8000) + part for part in parts)


def reference(position: int) -> int:
    """The reference of what is at *position* of a table, counted without the blocks' headers."""
    return (position // METADATA * (METADATA + 2)) << 16 | position % METADATA


def place(position: int) -> tuple[int, int]:
    """(block, offset) of what is at *position* of a table."""
    return position // METADATA * (METADATA + 2), position % METADATA


@dataclass
class Entry:
    """A name in a directory."""

    name: bytes
    ref: int
    kind: int = FILE
    number: int = 1
    count: int | None = None
    """What the header before it claims to head, when not one entry."""


@dataclass
class Forge:
    """An image in the making."""

    block_size: int = 4096
    compressor: int = 1
    inodes: bytearray = field(default_factory=bytearray)
    listings: bytearray = field(default_factory=bytearray)
    data: bytearray = field(default_factory=bytearray)
    fragments: list[tuple[int, int]] = field(default_factory=list)
    xattr_keys: bytes | None = None
    xattr_sets: list[tuple[int, int, int]] = field(default_factory=list)
    count: int = 100
    """How many inodes the superblock claims; a number for a new one is not counted."""

    def block(self, data: bytes) -> int:
        """Put bytes where data blocks are; returns where."""
        self.data += data
        return 96 + len(self.data) - len(data)

    def next_ref(self, after: int = 0) -> int:
        """The reference of the inode to be added *after* bytes of inodes from here."""
        return reference(len(self.inodes) + after)

    def inode(self, kind: int, body: bytes, number: int = 1, mode: int = 0o755, owner: int = 0) -> int:
        """Add an inode; returns its reference."""
        ref = self.next_ref()
        self.inodes += struct.pack("<4H2I", kind, mode, owner, 0, 1_600_000_000, number) + body
        return ref

    def file(
        self,
        size: int,
        start: int,
        words: list[int],
        number: int = 1,
        fragment: int = NONE32,
        tail: int = 0,
    ) -> int:
        """Add a basic file."""
        body = struct.pack(f"<IIII{len(words)}I", start, fragment, tail, size, *words)
        return self.inode(FILE, body, number)

    def large_file(
        self,
        size: int,
        start: int,
        words: bytes,
        number: int = 1,
        xattr: int = NONE32,
        fragment: int = NONE32,
        tail: int = 0,
    ) -> int:
        """Add an extended file; *words* is its block list as it is stored."""
        body = struct.pack("<QQQIIII", start, size, 0, 1, fragment, tail, xattr) + words
        return self.inode(9, body, number)

    def listing(self, entries: list[Entry]) -> tuple[int, int, int]:
        """Add a listing; returns (block, offset, size) for the inode."""
        begin = len(self.listings)
        for entry in entries:
            count = 0 if entry.count is None else entry.count
            self.listings += struct.pack("<III", count, entry.ref >> 16, entry.number)
            self.listings += struct.pack("<HhHH", entry.ref & 0xFFFF, 0, entry.kind, len(entry.name) - 1)
            self.listings += entry.name
        return (*place(begin), len(self.listings) - begin + 3)

    def directory(self, entries: list[Entry], number: int = 1, parent: int = 1) -> int:
        """Add a directory with a listing of its own."""
        block, offset, size = self.listing(entries)
        return self.inode(DIRECTORY, struct.pack("<IIHHI", block, 2, size, offset, parent), number)

    def large_directory(
        self,
        block: int,
        offset: int,
        size: int,
        index: list[tuple[int, int, bytes]] | None = None,
        number: int = 1,
    ) -> int:
        """Add an extended directory; *index*: (offset in the listing, block, name)."""
        index = index or []
        body = struct.pack("<IIIIHHI", 2, size, block, 1, len(index), offset, NONE32)
        for where, at, name in index:
            body += struct.pack("<III", where, at, len(name) - 1) + name
        return self.inode(8, body, number)

    def finish(self, root: int, **superblock: int) -> bytes:
        """The image. Any field of the superblock can be given another value."""
        image = bytearray(96) + self.data
        tables = {"inode_table": len(image)}
        image += metadata(bytes(self.inodes))
        tables["directory_table"] = len(image)
        image += metadata(bytes(self.listings) or b"\0")
        tables["fragment_table"] = NONE64
        if self.fragments:
            table = b"".join(struct.pack("<QII", *fragment, 0) for fragment in self.fragments)
            tables["fragment_table"] = self._indexed(image, table)
        tables["id_table"] = self._indexed(image, struct.pack("<I", 0))
        tables["xattr_table"] = NONE64
        if self.xattr_keys is not None:
            start = len(image)
            image += metadata(self.xattr_keys)
            sets = b"".join(struct.pack("<QII", *one) for one in self.xattr_sets)
            blocks = len(image)
            image += metadata(sets)
            tables["xattr_table"] = len(image)
            image += struct.pack("<QIIQ", start, len(self.xattr_sets), 0, blocks)
        values = {
            "magic": 0x73717368,
            "inodes": self.count,
            "mkfs_time": 1_600_000_000,
            "block_size": self.block_size,
            "fragments": len(self.fragments),
            "compressor": self.compressor,
            "block_log": self.block_size.bit_length() - 1,
            "flags": 0,
            "ids": 1,
            "major": 4,
            "minor": 0,
            "root": root,
            "bytes_used": len(image),
            **tables,
            "export_table": NONE64,
        }
        order = (
            "magic inodes mkfs_time block_size fragments compressor block_log flags ids major minor root "
            "bytes_used id_table xattr_table inode_table directory_table fragment_table export_table"
        )
        values.update(superblock)
        image[:96] = struct.pack("<5I6H8Q", *(values[name] for name in order.split()))
        return bytes(image)

    @staticmethod
    def _indexed(image: bytearray, table: bytes) -> int:
        starts = []
        for begin in range(0, len(table), METADATA):
            starts.append(len(image))
            image += metadata(table[begin : begin + METADATA])
        position = len(image)
        image += struct.pack(f"<{len(starts)}Q", *starts)
        return position
