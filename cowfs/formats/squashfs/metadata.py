"""Metadata blocks, and the tables that consist of them.

A metadata block has up to 8192 bytes, stored as a 16-bit header (bit 15: not compressed; the rest: bytes
stored) and the data. An entry may continue in the next block. mksquashfs fills all blocks but the last; other
tools do not, and the kernel accepts that. Source: squashfs.rst section 3, the kernel's block.c and cache.c.
Before version 4 the header is in the image's byte order, and another byte may follow it (squashfs-tools,
unsquashfs.c).
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
"""How many bytes of decompressed metadata of one image are cached."""


class Place(NamedTuple):
    """A place in a table: a block's position from the start of the table, and an offset in the block."""

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
        """*header* is the number of bytes before the data of each block."""
        self.source = source
        self.byteorder = byteorder
        """The byte order of all numbers in the image."""
        self._header = header
        self._decompress = decompress
        self.hits = self.misses = 0
        self._cache: GenerationCache[int, tuple[bytes, int]] = GenerationCache(
            CACHE_BYTES, lambda value: len(value[0])
        )

    def shrink(self) -> None:
        """Free the cache."""
        self._cache.clear()

    def block(self, position: int) -> tuple[bytes, int]:
        """Return the decompressed block at *position*, and the position of the next. May block. EIO."""
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
        # Read header and data at once: the longest possible block, or up to the end of the image.
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
        """Return the data of the block that begins *block* bytes after the start of the table."""
        return self._next(self._start + block)[0]

    def read(self, place: Place, size: int) -> bytes:
        """Return exactly *size* bytes at *place*, which may continue in the next blocks. EIO past the end."""
        return self.advance(place, size)[0]

    def advance(self, place: Place, size: int) -> tuple[bytes, Place]:
        """Return what :meth:`read` returns, and the place after it."""
        if not size:
            return b"", place
        parts: list[bytes] = []
        after = self._collect(place, size, parts)
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        if len(data) != size:
            raise self.damaged(place, f"ends {size - len(data)} bytes too early")
        return data, after

    def after(self, place: Place, size: int) -> Place:
        """Return the place *size* bytes after *place*. EIO past the end."""
        return self.advance(place, size)[1]

    def upto(self, place: Place, size: int) -> tuple[bytes, DamagedImage | None]:
        """Return *size* bytes at *place*; or fewer, and an error, if the table ends or is damaged."""
        parts: list[bytes] = []
        try:
            self._collect(place, size, parts)
        except DamagedImage as error:
            return b"".join(parts), error
        return b"".join(parts), None

    def _collect(self, place: Place, size: int, parts: list[bytes]) -> Place:
        """Add up to *size* bytes at *place* to *parts*; return the place after them."""
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
        """Return an upper bound of the number of bytes from *place* to the end of the table."""
        # A stored block has at least three bytes: a header and one more.
        return ((self._end - self._start - place.block) // 3 + 1) * BLOCK

    def damaged(self, place: Place, problem: str) -> OSError:
        """Log that the entry at *place* has *problem*; return the exception to raise."""
        where = f"{self._start + place.block:#x}+{place.offset}"
        return self._metadata.source.damaged(f"{self._what}: entry at {where} {problem}")


class IndexedTable:
    """A table of *count* entries of *size* bytes each, with a list of the positions of its blocks.

    The tables of owners, of fragments and of xattr sets are such tables. Nothing is read before it is needed.
    """

    __slots__ = ("_count", "_metadata", "_pointer_size", "_pointers", "_position", "_size", "_table", "_what")

    def __init__(
        self, metadata: Metadata, position: int, count: int, size: int, what: str, pointer: int = 8
    ) -> None:
        """The list of block positions, of *pointer* bytes each, is at *position* in the image."""
        self._pointer_size = pointer
        self._metadata = metadata
        self._position = position
        self._count = count
        self._size = size
        self._what = what
        self._table = Table(metadata, 0, position, f"{what} table")
        self._pointers: GenerationCache[int, int] = GenerationCache(4096, lambda _: 1)

    def first_block(self) -> int:
        """Return the position of the first block, which is the end of the table before it."""
        return self._pointer(0)

    def entry(self, number: int) -> bytes:
        """Return the bytes of entry *number*. EIO if it does not exist."""
        source = self._metadata.source
        if not 0 <= number < self._count:
            raise source.damaged(f"{self._what} {number} of {self._count}")
        block, offset = divmod(number * self._size, BLOCK)
        return self._table.read(Place(self._pointer(block), offset), self._size)

    def all(self) -> bytes:
        """Return all entries, one after the other. For tables that cannot be large."""
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
