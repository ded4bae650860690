"""Write squashfs images byte by byte, to make images that no normal tool would write.

Metadata is stored uncompressed (except with ``pack``), so all positions are known in advance, and an inode
can refer to something that is written later, for example to its own directory.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

METADATA = 8192
NONE64 = 0xFFFF_FFFF_FFFF_FFFF
NONE32 = 0xFFFF_FFFF
DIRECTORY, FILE = 1, 2

Pack = Callable[[bytes], bytes]


def metadata(data: bytes, chunk: int = METADATA, pack: Pack | None = None) -> bytes:
    """Return *data* as metadata blocks of *chunk* bytes, compressed by *pack* or uncompressed."""
    parts = [data[start : start + chunk] for start in range(0, len(data), chunk)]
    if pack is None:
        return b"".join(struct.pack("<H", len(part) | 0x8000) + part for part in parts)
    return b"".join(struct.pack("<H", len(packed)) + packed for packed in map(pack, parts))


def place(position: int, chunk: int = METADATA) -> tuple[int, int]:
    """Return the (block, offset) of *position* in a table, which does not count the blocks' headers."""
    return position // chunk * (chunk + 2), position % chunk


@dataclass
class Entry:
    """A name in a directory."""

    name: bytes
    ref: int
    kind: int = FILE
    number: int = 1
    count: int | None = None
    """The number of entries that the header before it claims, if not one."""


@dataclass
class Forge:
    """A forged image, before it is written."""

    block_size: int = 4096
    compressor: int = 1
    inodes: bytearray = field(default_factory=bytearray)
    listings: bytearray = field(default_factory=bytearray)
    data: bytearray = field(default_factory=bytearray)
    fragments: list[tuple[int, int]] = field(default_factory=list)
    xattr_keys: bytes | None = None
    xattr_sets: list[tuple[int, int, int]] = field(default_factory=list)
    count: int = 100
    """The number of inodes in the superblock. New inodes do not change it."""
    owners: list[int] = field(default_factory=lambda: [0])
    options: bytes | None = None
    """The stored options of the compressor. If set, the superblock says that there are some."""
    chunk: int = METADATA
    """Bytes in a metadata block of inodes, listings and attributes; normally a whole block."""
    pack: Pack | None = None
    """A function that compresses metadata. There may be only one block of inodes and one of listings."""
    export: list[int] | None = None
    """The references of the inodes by number, from 1."""
    order: tuple[str, ...] = ("fragment", "export", "id", "xattr")
    """The order of the tables after the directories. The kernel accepts only this one."""
    gap: bytes = b""
    """Data between two tables."""
    padding: bytes = b""
    """Data at the end of the blocks of the tables of owners and fragments."""

    def __post_init__(self) -> None:
        if self.options is not None:
            self.data += metadata(self.options)

    def block(self, data: bytes) -> int:
        """Add data; return its position."""
        self.data += data
        return 96 + len(self.data) - len(data)

    def next_ref(self, after: int = 0) -> int:
        """Return the reference of the inode that is added after *after* more bytes of inodes."""
        block, offset = place(len(self.inodes) + after, self.chunk)
        return block << 16 | offset

    def inode(
        self,
        kind: int,
        body: bytes,
        number: int = 1,
        mode: int = 0o755,
        owner: int = 0,
        group: int = 0,
        mtime: int = 1_600_000_000,
    ) -> int:
        """Add an inode; return its reference."""
        ref = self.next_ref()
        self.inodes += struct.pack("<4H2I", kind, mode, owner, group, mtime, number) + body
        return ref

    def small(self, content: bytes, number: int = 1, **base: int) -> int:
        """Add a basic file with one uncompressed block; return its reference."""
        word = len(content) | 1 << 24 if content else 0
        body = struct.pack("<IIIII", self.block(content), NONE32, 0, len(content), word)
        return self.inode(FILE, body if content else body[:-4], number, **base)

    def file(
        self,
        size: int,
        start: int,
        words: list[int],
        number: int = 1,
        fragment: int = NONE32,
        tail: int = 0,
    ) -> int:
        """Add a basic file; return its reference."""
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
        """Add an extended file; *words* is its stored block list. Return its reference."""
        body = struct.pack("<QQQIIII", start, size, 0, 1, fragment, tail, xattr) + words
        return self.inode(9, body, number)

    def listing(self, entries: list[Entry]) -> tuple[int, int, int]:
        """Add a listing with a header for each entry; return (block, offset, size) for the inode."""
        begin = len(self.listings)
        for entry in entries:
            count = 0 if entry.count is None else entry.count
            self.listings += struct.pack("<III", count, entry.ref >> 16, entry.number)
            self.listings += struct.pack("<HhHH", entry.ref & 0xFFFF, 0, entry.kind, len(entry.name) - 1)
            self.listings += entry.name
        return (*place(begin, self.chunk), len(self.listings) - begin + 3)

    def group(self, entries: list[Entry], count: int | None = None) -> None:
        """Add entries with one header to the current listing; the header claims *count* entries."""
        first = entries[0]
        count = len(entries) if count is None else count
        self.listings += struct.pack("<III", (count - 1) & NONE32, first.ref >> 16, first.number)
        for entry in entries:
            number = entry.number - first.number
            self.listings += struct.pack("<HhHH", entry.ref & 0xFFFF, number, entry.kind, len(entry.name) - 1)
            self.listings += entry.name

    def directory(
        self, entries: list[Entry], number: int = 1, parent: int = 1, more: int = 0, **base: int
    ) -> int:
        """Add a directory and its listing, with a size that is *more* bytes too large."""
        block, offset, size = self.listing(entries)
        body = struct.pack("<IIHHI", block, 2, size + more, offset, parent)
        return self.inode(DIRECTORY, body, number, **base)

    def large_directory(
        self,
        block: int,
        offset: int,
        size: int,
        index: list[tuple[int, int, bytes]] | None = None,
        number: int = 1,
    ) -> int:
        """Add an extended directory; *index* has (offset in the listing, block, name)."""
        index = index or []
        body = struct.pack("<IIIIHHI", 2, size, block, 1, len(index), offset, NONE32)
        for where, at, name in index:
            body += struct.pack("<III", where, at, len(name) - 1) + name
        return self.inode(8, body, number)

    def finish(self, root: int, **superblock: int) -> bytes:
        """Return the image, with any fields of the superblock replaced."""
        image = bytearray(96) + self.data
        tables = {"inode_table": len(image)}
        image += metadata(bytes(self.inodes), self.chunk, self.pack) + self.gap
        tables["directory_table"] = len(image)
        image += metadata(bytes(self.listings) or b"\0", self.chunk, self.pack) + self.gap
        for name in self.order:
            tables[f"{name}_table"] = self._table(name, image)
        values = {
            "magic": 0x73717368,
            "inodes": self.count,
            "mkfs_time": 1_600_000_000,
            "block_size": self.block_size,
            "fragments": len(self.fragments),
            "compressor": self.compressor,
            "block_log": self.block_size.bit_length() - 1,
            "flags": 0 if self.options is None else 0x400,
            "ids": len(self.owners),
            "major": 4,
            "minor": 0,
            "root": root,
            "bytes_used": len(image),
            **tables,
        }
        order = (
            "magic inodes mkfs_time block_size fragments compressor block_log flags ids major minor root "
            "bytes_used id_table xattr_table inode_table directory_table fragment_table export_table"
        )
        values.update(superblock)
        image[:96] = struct.pack("<5I6H8Q", *(values[name] for name in order.split()))
        return bytes(image)

    def _table(self, name: str, image: bytearray) -> int:
        """Add a table after the directories, if there is one; return its position for the superblock."""
        if name == "id":
            return self._indexed(image, struct.pack(f"<{len(self.owners)}I", *self.owners))
        if name == "export" and self.export is not None:
            return self._indexed(image, struct.pack(f"<{len(self.export)}Q", *self.export))
        if name == "fragment" and self.fragments:
            table = b"".join(struct.pack("<QII", *fragment, 0) for fragment in self.fragments)
            position = self._indexed(image, table)
            image += self.gap
            return position
        if name == "xattr" and self.xattr_keys is not None:
            return self._attributes(image, self.xattr_keys)
        return NONE64

    def _attributes(self, image: bytearray, keys: bytes) -> int:
        start = len(image)
        image += metadata(keys, self.chunk, self.pack)
        sets = b"".join(struct.pack("<QII", *one) for one in self.xattr_sets)
        blocks = len(image)
        image += metadata(sets, pack=self.pack)
        position = len(image)
        image += struct.pack("<QII", start, len(self.xattr_sets), 0)
        if sets:
            image += struct.pack("<Q", blocks)
        return position

    def _indexed(self, image: bytearray, table: bytes) -> int:
        starts = []
        for begin in range(0, len(table), METADATA):
            starts.append(len(image))
            part = table[begin : begin + METADATA]
            image += metadata(part + self.padding[: METADATA - len(part)], pack=self.pack)
        position = len(image)
        image += struct.pack(f"<{len(starts)}Q", *starts)
        return position
