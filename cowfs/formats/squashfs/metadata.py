"""Metadata blocks, and the tables made of them.

A metadata block is up to 8192 bytes, stored as a 16-bit header (bit 15: not compressed; the rest:
bytes stored) and the data. What does not fit goes on at the start of the following block. mksquashfs
fills all blocks but the last; others do not, and the kernel's reader does not mind. Source:
squashfs.rst section 3, the kernel's block.c and cache.c. Before version 4 the header is in the image's
byte order, and one byte more may follow it (squashfs-tools, unsquashfs.c).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from cowfs.formats.squashfs.cache import GenerationCache
from cowfs.formats.squashfs.codecs import Decompress
from cowfs.formats.squashfs.errors import CodecError, DamagedImage
from cowfs.formats.squashfs.source import Source

BLOCK = 8192
_UNCOMPRESSED = 0x8000

CACHE_BYTES = 16 << 20
"""How much decompressed metadata of one image is kept."""


class Place(NamedTuple):
    """Where something is in a table: a block's position from the table's start, an offset into it."""

    block: int
    offset: int


class Metadata:
    """The metadata blocks of an image, by their position in it."""

    __slots__ = ("_cache", "_decompress", "_header", "byteorder", "hits", "misses", "source")

    def __init__(
        self,
        source: Source,
        decompress: Decompress,
        byteorder: Literal["little", "big"] = "little",
        header: int = 2,
    ) -> None:
        """*header*: bytes before the data of each block."""
        self.source = source
        self.byteorder = byteorder
        """Of all numbers of the image."""
        self._header = header
        self._decompress = decompress
        self.hits = self.misses = 0
        self._cache: GenerationCache[int, tuple[bytes, int]] = GenerationCache(
            CACHE_BYTES, lambda value: len(value[0])
        )

    def shrink(self) -> None:
        """Forget the blocks that were read."""
        self._cache.clear()

    def block(self, position: int) -> tuple[bytes, int]:
        """The decompressed block at *position*, and the position of the next; may block, EIO."""
        found = self._cache.get(position)
        if found is None:
            self.misses += 1
            found = self._load(position)
            self._cache.put(position, found)
        else:
            self.hits += 1
        return found

    def _load(self, position: int) -> tuple[bytes, int]:
        source = self.source
        # Header and data in one read: the longest that the block may be, or what there is.
        before = self._header
        raw = source.pread(
            min(BLOCK + before, max(source.size - position, before)), position, "metadata block"
        )
        header = int.from_bytes(raw[:2], self.byteorder)
        length = header & ~_UNCOMPRESSED
        if not 0 < length <= BLOCK or length + before > len(raw):
            raise source.damaged(f"metadata block at {position:#x}: {length} bytes long")
        data = raw[before : before + length]
        if not header & _UNCOMPRESSED:
            try:
                data = self._decompress(data, BLOCK)
            except CodecError as error:
                raise source.damaged(f"metadata block at {position:#x}: {error}") from error
            if not data:
                raise source.damaged(f"metadata block at {position:#x}: empty")
        return data, position + before + length


class Table:
    """A run of metadata blocks from *start* to *end* of the image."""

    __slots__ = ("_end", "_metadata", "_start", "_what")

    def __init__(self, metadata: Metadata, start: int, end: int, what: str) -> None:
        """*what* names the table in messages."""
        self._metadata = metadata
        self._start = start
        self._end = end
        self._what = what

    def block(self, block: int) -> bytes:
        """The data of the block that begins *block* bytes after the table's start."""
        return self._next(self._start + block)[0]

    def read(self, place: Place, size: int) -> bytes:
        """Exactly *size* bytes at *place*, going on into the following blocks. EIO past the end."""
        return self.advance(place, size)[0]

    def advance(self, place: Place, size: int) -> tuple[bytes, Place]:
        """Like :meth:`read`, and also the place after what was read."""
        if not size:
            return b"", place
        parts: list[bytes] = []
        after = self._collect(place, size, parts)
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        if len(data) != size:
            raise self.damaged(place, f"ends {size - len(data)} bytes too early")
        return data, after

    def after(self, place: Place, size: int) -> Place:
        """The place *size* bytes after *place*. EIO past the end."""
        return self.advance(place, size)[1]

    def upto(self, place: Place, size: int) -> tuple[bytes, DamagedImage | None]:
        """*size* bytes at *place*, or fewer where the table ends or is damaged, and that error."""
        parts: list[bytes] = []
        try:
            self._collect(place, size, parts)
        except DamagedImage as error:
            return b"".join(parts), error
        return b"".join(parts), None

    def _collect(self, place: Place, size: int, parts: list[bytes]) -> Place:
        """Add up to *size* bytes at *place* to *parts*; returns the place after them."""
        position, offset = self._start + place.block, place.offset
        data, following = self._next(position)
        if offset >= len(data):
            raise self.damaged(place, "begins past its block")
        while True:
            part = data[offset : offset + size]
            parts.append(part)
            size -= len(part)
            offset += len(part)
            if offset == len(data):
                position, offset = following, 0
            if not size or position >= self._end:
                return Place(position - self._start, offset)
            data, following = self._next(position)

    def _next(self, position: int) -> tuple[bytes, int]:
        if position >= self._end:
            raise self._metadata.source.damaged(f"{self._what}: block at {position:#x} is outside")
        return self._metadata.block(position)

    def bound(self, place: Place) -> int:
        """An upper bound of the number of bytes from *place* to the end of the table."""
        # A stored block is at least three bytes, a header and one more.
        return ((self._end - self._start - place.block) // 3 + 1) * BLOCK

    def damaged(self, place: Place, problem: str) -> OSError:
        """Log that what is at *place* has *problem*; return the exception to raise."""
        where = f"{self._start + place.block:#x}+{place.offset}"
        return self._metadata.source.damaged(f"{self._what}: entry at {where} {problem}")


class IndexedTable:
    """A table of *count* entries of *size* bytes each, reached through a list of block positions.

    So are the owners, the fragments, the attribute identifiers. Nothing is read before it is asked for.
    """

    __slots__ = ("_count", "_metadata", "_pointer_size", "_pointers", "_position", "_size", "_table", "_what")

    def __init__(
        self, metadata: Metadata, position: int, count: int, size: int, what: str, pointer: int = 8
    ) -> None:
        """The list of block positions, of *pointer* bytes each, is at *position* of the image."""
        self._pointer_size = pointer
        self._metadata = metadata
        self._position = position
        self._count = count
        self._size = size
        self._what = what
        self._table = Table(metadata, 0, position, f"{what} table")
        self._pointers: GenerationCache[int, int] = GenerationCache(4096, lambda _: 1)

    def first_block(self) -> int:
        """Where the first block of entries begins: the end of the table before it."""
        return self._pointer(0)

    def entry(self, number: int) -> bytes:
        """The bytes of entry *number*. EIO when there is no such entry."""
        source = self._metadata.source
        if not 0 <= number < self._count:
            raise source.damaged(f"{self._what} {number} of {self._count}")
        block, offset = divmod(number * self._size, BLOCK)
        return self._table.read(Place(self._pointer(block), offset), self._size)

    def all(self) -> bytes:
        """All entries, one after the other. For tables that cannot be large."""
        total = self._count * self._size
        return b"".join(
            self._table.read(Place(self._pointer(start // BLOCK), 0), min(BLOCK, total - start))
            for start in range(0, total, BLOCK)
        )

    def _pointer(self, number: int) -> int:
        position = self._pointers.get(number)
        if position is None:
            source = self._metadata.source
            size = self._pointer_size
            raw = source.pread(size, self._position + number * size, f"{self._what} table")
            position = int.from_bytes(raw, self._metadata.byteorder)
            if position >= self._position:
                raise source.damaged(f"{self._what} table: block {number} at {position:#x} is outside")
            self._pointers.put(number, position)
        return position
