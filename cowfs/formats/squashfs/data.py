"""Read the data of files: decompress each block once for all readers, and ahead of sequential readers.

Several threads may use everything here at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import NamedTuple

from cowfs.formats.squashfs.blocks import UNCOMPRESSED, BlockMap, FragmentTable, Stored, count_blocks
from cowfs.formats.squashfs.cache import GenerationCache, OnceCache
from cowfs.formats.squashfs.codecs import Decompress, starter
from cowfs.formats.squashfs.errors import CodecError
from cowfs.formats.squashfs.inodes import NONE, Inode
from cowfs.formats.squashfs.metadata import Table
from cowfs.formats.squashfs.source import Source
from cowfs.formats.squashfs.superblock import NO_DATA_COMPRESSION, Superblock
from cowfs.formats.squashfs.workers import Workers

RUN = 1 << 20
"""How many bytes are decompressed and written at once when a file is copied."""
_AHEAD = 2 << 20
"""How far ahead of a sequential reader data is decompressed, in bytes; at least two blocks."""
_NEAR = 2
"""How many blocks a read may skip or repeat, and still count as sequential."""
_FEW = 2
"""A file of so many blocks needs no readahead."""
_TASK = 256 << 10
"""How many bytes one task of the readahead decompresses; at least one block."""


_SHORT = {"gzip": 256 << 10, "lzo": 256 << 10, "zstd": 256 << 10, "lz4": 4 << 20}
"""How many bytes each compressor decompresses in half a millisecond; xz and lzma only a few KiB."""
_PAGE_MASK = 4095
"""The offset bits within a page, the smallest unit that the kernel's squashfs reads."""
_STARTED = 4096
"""How many partly decompressed blocks are remembered.

The next request decompresses such a block completely.
"""


class Run(NamedTuple):
    """A part of a file that is stored contiguously: consecutive blocks, or the tail in a fragment."""

    offset: int
    """The offset in the file."""
    blocks: tuple[Stored, ...]
    """The blocks; empty for the tail."""
    size: int
    """The number of bytes of the file."""


class Blocks:
    """Reads the data blocks of an image."""

    def __init__(
        self,
        source: Source,
        superblock: Superblock,
        decompress: Decompress,
        fragments: FragmentTable,
        cache_bytes: int,
    ) -> None:
        """*cache_bytes* is the size of the cache of decompressed blocks; at least four blocks."""
        self._source = source
        self._decompress = decompress
        self._starter = starter(superblock.compression, superblock.block_size)
        self._started: GenerationCache[Stored, bool] = GenerationCache(_STARTED, int)
        self._fragments = fragments
        # The fragment used last. Files in one directory often have their tails in the same one.
        self._last_fragment: tuple[int, Stored] = -1, Stored(0, 0)
        self._cache: OnceCache[Stored] = OnceCache(max(cache_bytes, 4 * superblock.block_size))
        self.superblock = superblock
        self.size = superblock.block_size
        self.workers = Workers()
        self.lock = threading.Lock()
        """Protects what each file records about its readers."""
        self.slow = superblock.compression != "lz4" and not superblock.flags & NO_DATA_COMPRESSION
        """Whether decompressing a block takes longer than handing the work to a thread."""
        self.short = _SHORT.get(superblock.compression, 0)
        """How many bytes may be decompressed while other requests wait."""

    def get(self, stored: Stored, size: int) -> bytes:
        """Return the first *size* bytes of a block, through the cache. May block. EIO.

        If the block contains less, its whole pages can be read, as in the kernel.
        """
        data = self._cache.get(stored, self._read)
        if len(data) < size and size > len(data) & ~_PAGE_MASK:
            raise self._too_short(stored, len(data), size)
        return data if len(data) == size else data[:size]

    def start(self, stored: Stored, size: int) -> bytes | None:
        """Return the first *size* bytes of a block at its first request, or None for any later request.

        A program that reads 4 KiB somewhere seldom reads more of that block. At the second request, it is
        decompressed completely, and cached. Also None if that is not quicker. May block. EIO.
        """
        if not self._starter or stored.word & UNCOMPRESSED or 4 * size > 3 * self.size:
            return None
        if self._cache.peek(stored) is not None or self._started.get(stored):
            return None
        self._started.put(stored, True)
        self._cache.misses += 1
        raw = self._stored(stored)
        try:
            data = self._starter(raw, size)
        except CodecError as error:
            raise self._damaged(stored, error) from error
        return data if len(data) == size else None

    def found(self) -> tuple[int, int]:
        """Return the hits and misses of the cache."""
        return self._cache.hits, self._cache.misses

    def work(self, stored: Stored) -> int:
        """Return how many bytes :meth:`get` must decompress, or wait for."""
        if not stored.word or stored.word & UNCOMPRESSED or self._cache.peek(stored) is not None:
            return 0
        return self.size

    def fragment(self, inode: Inode) -> Stored:
        """Return the fragment with the tail of a file. May block. EIO."""
        number, stored = self._last_fragment
        if number != inode.fragment:
            stored = self._fragments[inode.fragment]
            self._last_fragment = inode.fragment, stored
        return stored

    def tail(self, inode: Inode, size: int) -> bytes:
        """Return the first *size* bytes of a file's tail in a fragment. May block. EIO."""
        stored = self.fragment(inode)
        data = self._cache.get(stored, self._read)
        there = len(data) - inode.offset
        if there < size and size > there & ~_PAGE_MASK:
            raise self._source.damaged(
                f"fragment {inode.fragment} at {stored.position:#x}: ends before the tail of {inode.number}"
            )
        return data[inode.offset : inode.offset + size]

    def run(self, run: Run) -> list[bytes]:
        """Return the data of *run* by blocks, decompressed without the cache. May block. EIO."""
        left = run.size
        for stored in run.blocks:
            self._check_stored(stored)
        length = sum(stored.length for stored in run.blocks)
        raw = memoryview(self._source.pread(length, run.blocks[0].position, "data blocks"))
        parts = []
        at = 0
        for stored in run.blocks:
            size = min(self.size, left)
            data = self._expand(raw[at : at + stored.length], stored)
            if len(data) < size:
                raise self._too_short(stored, len(data), size)
            parts.append(data if len(data) == size else data[:size])
            at += stored.length
            left -= size
        return parts

    def _read(self, stored: Stored) -> bytes:
        return self._expand(self._stored(stored), stored)

    def _stored(self, stored: Stored) -> bytes:
        self._check_stored(stored)
        return self._source.pread(stored.length, stored.position, "data block")

    def _expand(self, raw: bytes | memoryview, stored: Stored) -> bytes:
        if stored.word & UNCOMPRESSED:
            return bytes(raw)
        try:
            return self._decompress(raw, self.size)
        except CodecError as error:
            raise self._damaged(stored, error) from error

    def _check_stored(self, stored: Stored) -> None:
        if not 0 < stored.length <= self.size:
            raise self._damaged(stored, f"{stored.length} bytes stored")

    def _too_short(self, stored: Stored, size: int, wanted: int) -> OSError:
        return self._damaged(stored, f"{size} bytes, not {wanted}")

    def _damaged(self, stored: Stored, what: object) -> OSError:
        return self._source.damaged(f"data block at {stored.position:#x}: {what}")

    def shrink(self) -> None:
        """Free the cache."""
        self._cache.clear()

    def close(self) -> None:
        """Stop the workers, and free the cache."""
        self.workers.close()
        self._cache.clear()


class FileData:
    """The data of one regular file."""

    __slots__ = ("_ahead", "_blocks", "_count", "_map", "_range", "_window", "inode", "size")

    def __init__(self, blocks: Blocks, inodes: Table, inode: Inode) -> None:
        """Reads nothing yet. EFBIG, EIO: see :class:`BlockMap`."""
        self._blocks = blocks
        self.inode = inode
        self._count = count_blocks(inode, blocks.superblock)
        # Most files are small, and have only a tail.
        self._map = BlockMap(inodes, inode, self._count, blocks.superblock) if self._count else None
        self._range = (-1, -1)
        """The blocks of the last read.

        Reading them again, as after try_pread, tells nothing about the pattern.
        """
        self._ahead = 0
        """The first block for which no readahead was started."""
        self._window = 2
        """How many blocks to read ahead."""
        self.size = inode.size

    @property
    def is_small(self) -> bool:
        """Whether the file is too small for readahead."""
        return self._count <= _FEW

    def has_holes(self) -> bool:
        """Whether blocks are not stored, because they are zeros. May block. EIO."""
        return self._map is not None and not all(self._map[number].word for number in range(self._count))

    def try_pread(self, size: int, offset: int) -> bytes | None:
        """Return what :meth:`pread` returns, or None if it must decompress for over half a ms. EIO.

        It waits for less than that, even for another thread, because handing the work over takes as long.
        """
        end = min(offset + size, self.size)
        if 0 <= offset < end:
            log = self._blocks.superblock.block_log
            first, last = offset >> log, (end - 1) >> log
            if (last - first + 1) * self._blocks.size > self._blocks.short and self._is_long(first, last):
                self._read_ahead(first, last)
                return None
        return self.pread(size, offset)

    def pread(self, size: int, offset: int) -> bytes:
        """Return up to *size* bytes at *offset*, fewer only at the end of the file. May block. EIO."""
        end = min(offset + size, self.size)
        if offset < 0 or offset >= end:
            return b""
        log = self._blocks.superblock.block_log
        first, last = offset >> log, (end - 1) >> log
        self._read_ahead(first, last)
        base = first << log
        if first == last:
            data = self._start(first, end - base) or self._block(first, end - base)
            return data if end - offset == len(data) else data[offset - base : end - base]
        size = self._blocks.size
        data = self._block(first, size)
        parts = [data[offset - base :] if offset > base else data]
        parts += [self._block(number, size) for number in range(first + 1, last)]
        parts.append(self._block(last, end - (last << log)))
        return b"".join(parts)

    def _block(self, number: int, size: int) -> bytes:
        """Return the first *size* bytes of block *number*. May block. EIO."""
        if self._map is None or number == self._count:
            return self._blocks.tail(self.inode, size)
        stored = self._map[number]
        return self._blocks.get(stored, size) if stored.word else bytes(size)

    def _start(self, number: int, size: int) -> bytes | None:
        if self._map is None or number == self._count or not (stored := self._map[number]).word:
            return None
        return self._blocks.start(stored, size)

    def _is_long(self, first: int, last: int) -> bool:
        """Whether decompressing the blocks from *first* to *last* takes too long for waiting requests."""
        work = sum(self._blocks.work(self._place(number)) for number in range(first, last + 1))
        return work > self._blocks.short

    def _place(self, number: int) -> Stored:
        """Return where block *number* is, or the fragment with the tail."""
        if self._map is None or number == self._count:
            return self._blocks.fragment(self.inode)
        return self._map[number]

    def _read_ahead(self, first: int, last: int) -> None:
        """Start to decompress what follows, if this read continues the last one."""
        if self._count <= _FEW or not self._blocks.slow or (first, last) == self._range:
            return
        size = self._blocks.size
        with self._blocks.lock:
            before, self._range = self._range[1], (first, last)
            # The kernel's own readahead sends requests that may arrive out of order.
            sequential = abs(first - before) <= _NEAR and last > 0
            if not sequential:
                self._ahead, self._window = 0, 2
                return
            begin = max(self._ahead, last + 1)
            end = min(last + 1 + self._window, self._count)
            step = max(1, _TASK // size)
            if begin >= end or (end - begin < step and end < self._count):
                return
            self._ahead = end
            # Read further ahead each time, as long as the reader continues.
            self._window = min(2 * self._window + step, max(2, _AHEAD // size))
        for number in range(begin, end, step):
            self._blocks.workers.submit(self._load, number, min(number + step, end))

    def _load(self, begin: int, end: int) -> None:
        try:
            for number in range(begin, end):
                self._block(number, min(self._blocks.size, self.size - number * self._blocks.size))
        except OSError:
            return  # a read of the block will fail too, and report it

    def _blocks_stored(self, number: int = 0) -> Iterator[tuple[int, Stored]]:
        return iter(()) if self._map is None else self._map.since(number)

    def segments(self, end: int, after: int = 0) -> Iterator[tuple[int, int]]:
        """Yield ``(start, stop)`` of every run of data below *end*, in bytes. May block. EIO.

        Runs that end before *after* are left out.
        """
        size = self._blocks.size
        end = min(end, self.size)
        start = stop = 0
        for number, _ in self._blocks_stored(after // size):
            begin = number * size
            if begin >= end:
                break
            if begin != stop:
                if stop:
                    yield start, min(stop, end)
                start = begin
            stop = min(begin + size, self.size)
        tail = self._count * size
        if self._has_tail() and tail < end:
            if tail != stop:
                if stop > start:
                    yield start, min(stop, end)
                start = tail
            stop = self.size
        if stop > start:
            yield start, min(stop, end)

    def runs(self) -> Iterator[Run]:
        """Yield the data of the file in pieces of about :data:`RUN` bytes, without the holes between them."""
        size = self._blocks.size
        most = max(1, RUN // size)
        first = 0
        pending: list[Stored] = []
        for number, stored in self._blocks_stored():
            if pending and (number != first + len(pending) or len(pending) == most):
                yield self._run(first, pending)
                pending = []
            if not pending:
                first = number
            pending.append(stored)
        if pending:
            yield self._run(first, pending)
        if self._has_tail():
            offset = self._count * size
            yield Run(offset, (), self.size - offset)

    def _run(self, first: int, blocks: list[Stored]) -> Run:
        offset = first * self._blocks.size
        return Run(offset, tuple(blocks), min(len(blocks) * self._blocks.size, self.size - offset))

    def run(self, run: Run) -> list[bytes]:
        """Return the data of *run*. May block. EIO."""
        return self._blocks.run(run) if run.blocks else [self._blocks.tail(self.inode, run.size)]

    def _has_tail(self) -> bool:
        return self.inode.fragment != NONE and bool(self.size & (self._blocks.size - 1))

    @property
    def workers(self) -> Workers:
        """The threads for work on this file."""
        return self._blocks.workers
