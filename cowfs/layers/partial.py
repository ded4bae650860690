"""A file with some of its data in the upper and the rest in a lower: a hole is data not copied yet.

The block pointers of the upper file are the only map. From the moment when a block exists, it is complete
and belongs to the upper file; until then, the lower's data shows. So this only works for an upper whose
files have holes only where nothing was ever written.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Protocol, cast

from cowfs.errors import NoRoom, os_error
from cowfs.layers.base import Allocatable, File
from cowfs.types import Attr

_PIECE = 256 << 10
"""Bytes that are copied at a time: a request that needs the upper at that moment waits."""


class Fillable(File, Protocol):
    """A file whose holes can be filled while others write to it."""

    def fill(self, data: bytes, offset: int) -> None:
        """Write *data* where there are holes, and change nothing else: neither blocks, nor size, nor times.

        *offset* is a multiple of the layer's ``fill_unit`` (if it has none, nobody may write meanwhile). The
        missing rest of the last block becomes zeros. Each block is a hole or complete, even after a crash.
        ENOSPC. May block.
        """
        ...


class Part:
    """How much of a lower file shows through an upper one. All its open files share this."""

    __slots__ = ("changing", "end", "is_whole", "is_wrong", "unit")

    def __init__(self, end: int, unit: int) -> None:
        self.end = end
        """Up to this byte the lower shows through the holes of the upper; beyond it they are zeros."""
        self.unit = unit
        """The unit, in bytes, in which the upper fills a hole."""
        self.is_whole = False
        """Whether nothing of the lower shows any more: a hole is a hole."""
        self.is_wrong = False
        """Whether the *end* could not be written to the store: then the file must not become longer."""
        self.changing = threading.Lock()
        """Held by who changes *end*, and by who fills holes below it."""


class PartialFile:
    """An open partial file: a :class:`File`. Its creator opens *target* and *source* for it."""

    __slots__ = ("_part", "_source", "_target")

    def __init__(self, part: Part, target: File, source: File) -> None:
        self._part = part
        self._target = target
        self._source = source

    def pread(self, size: int, offset: int) -> bytes:
        pieces = (file.pread(length, at) for file, length, at in self._pieces(size, offset))
        return b"".join(pieces)

    def try_pread(self, size: int, offset: int) -> bytes | None:
        pieces = []
        for file, length, at in self._pieces(size, offset):
            piece = file.try_pread(length, at)
            if piece is None:
                return None
            pieces.append(piece)
        return b"".join(pieces)

    def _pieces(self, size: int, offset: int) -> Iterator[tuple[File | _Below, int, int]]:
        """Yield which file has which part of a range: ``(file, length, offset)``."""
        if self._part.is_whole:
            yield self._target, size, offset
            return
        end = min(offset + size, self._target.stat().st_size)
        position = offset
        for start, stop in self._target.segments(end, offset):
            if start > position:
                yield _Below(self), start - position, position
            start = max(start, position)
            if start < stop:
                yield self._target, stop - start, start
                position = stop
        if position < end:
            yield _Below(self), end - position, position

    def below(self, size: int, offset: int, read: Callable[[int, int], bytes | None]) -> bytes | None:
        """Return *size* bytes that show through holes, using *read*. EIO if the lower is shorter now."""
        there = min(size, max(self._part.end - offset, 0))
        data = read(there, offset) if there else b""
        if data is not None and len(data) != there:
            raise OSError(errno.EIO, "the lower file is shorter than it was")
        return data if data is None or there == size else data + bytes(size - there)

    def needs_the_lower(self, size: int, offset: int) -> bool:
        """Whether a write must first read from the lower, which may take long."""
        return any(map(self._is_missing, self._edges(size, offset)))

    def _edges(self, size: int, offset: int) -> list[int]:
        """Return the offsets of the blocks that a write changes only in part."""
        unit = self._part.unit
        return sorted({edge - edge % unit for edge in (offset, offset + size) if edge % unit})

    def _is_missing(self, block: int) -> bool:
        if self._part.is_whole or block >= self._part.end:
            return False
        return self._start_of_data(block, block + 1) is None

    def _start_of_data(self, position: int, end: int) -> tuple[int, int] | None:
        return next((run for run in self._target.segments(end, position) if run[1] > position), None)

    def pwrite(self, data: bytes, offset: int) -> int:
        """Write. First copy up, unchanged, the blocks that it changes in part, so that a crash does no
        harm."""
        return self._write(self._target.pwrite, data, offset)

    def write_back(self, data: bytes, offset: int) -> int:
        """Write what was changed through mmap(2)."""
        return self._write(getattr(self._target, "write_back", self._target.pwrite), data, offset)

    def _write(self, write: Callable[[bytes, int], int], data: bytes, offset: int) -> int:
        if self._part.is_wrong and offset + len(data) > self._part.end:
            raise os_error(errno.EIO)
        for block in self._edges(len(data), offset):
            if self._is_missing(block):
                self._copy(block, block + self._part.unit)
        return write(data, offset)

    def _copy(self, start: int, stop: int) -> int:
        """Fill the holes in a range of whole blocks; return where it ended."""
        stop = min(stop, self._part.end)
        if start >= stop:
            return stop
        data = self.below(stop - start, start, self._source.pread)
        with self._part.changing:
            if not self._part.is_whole and self._part.end >= stop and data is not None:
                try:
                    cast(Fillable, self._target).fill(data, start)
                except NoRoom as failure:
                    failure.written = 0  # this is not the writer's data
                    raise
        return stop

    def copy_steps(self, size: int | None = None) -> Iterator[int]:
        """Copy the lower's data that shows in the first *size* bytes, or in the whole file.

        Blocks. Yields the size of each piece after copying it. When it ends, nothing is missing.
        """
        part, unit, done = self._part, self._part.unit, 0
        end = part.end if size is None else min(size, part.end)
        for start, stop in self._source.segments(end):
            position = max(start - start % unit, done)
            while position < stop and not part.is_whole:
                there = self._start_of_data(position, stop)
                if there is not None and there[0] <= position:
                    position = there[1]
                    continue
                until = min(position + _PIECE - position % unit, stop if there is None else there[0])
                until = -(-until // unit) * unit
                self._copy(position, until)
                yield until - position
                position = until
            done = max(done, position)

    def missing(self) -> int:
        """Return about how many bytes are still only in the lower."""
        whole = min(self._part.end, self._source.stat().st_blocks * 512)
        return 0 if self._part.is_whole else max(whole - self.stat().st_blocks * 512, 0)

    def cut(self, size: int) -> None:
        """Reduce the size, after copying the data up to it. Blocks."""
        with self._part.changing:
            self._target.truncate(size)
            self._part.end = min(self._part.end, size)

    def truncate(self, size: int) -> None:
        """Set the size. EIO unless the file is complete: the caller copies the remaining data first."""
        if not self._part.is_whole:
            raise os_error(errno.EIO)
        self._target.truncate(size)

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        """Allocate space. EIO unless the file is complete: a hole would show the lower."""
        if not self._part.is_whole:
            raise os_error(errno.EIO)
        cast(Allocatable, self._target).fallocate(mode, offset, length)

    def fsync(self, datasync: bool) -> None:
        """Return when the upper's data is on disk. The rest is in the lower."""
        self._target.fsync(datasync)

    def stat(self) -> Attr:
        return self._target.stat()

    def segments(self, end: int, start: int = 0) -> Iterator[tuple[int, int]]:
        """Yield the runs of data in the upper, or in the lower where it shows."""
        if self._part.is_whole:
            return self._target.segments(end, start)
        return either(
            self._target.segments(end, start), self._source.segments(min(end, self._part.end), start)
        )

    def fileno(self) -> int:
        """Return -1: all access must go through this object."""
        return -1

    def descriptor(self) -> int:
        """Return the descriptor of the lower's file, for counting; -1 if it has none."""
        return self._source.fileno()

    def copy_to(self, target: File, size: int | None = None) -> None:
        """Copy the first *size* bytes, or all, to a new file; holes stay holes. Blocks."""
        whole = self.stat().st_size
        size = whole if size is None else min(size, whole)
        target.truncate(size)
        for start, stop in self.segments(size):
            for position in range(start, stop, _PIECE):
                target.pwrite(self.pread(min(_PIECE, stop - position), position), position)

    def close(self) -> None:
        with closing(self._target):
            self._source.close()


class _Below:
    """The lower data that shows in a partial file's holes: the part of :class:`File` that reading needs."""

    __slots__ = ("_file",)

    def __init__(self, file: PartialFile) -> None:
        self._file = file

    def pread(self, size: int, offset: int) -> bytes:
        return self._file.below(size, offset, self._file._source.pread) or b""

    def try_pread(self, size: int, offset: int) -> bytes | None:
        return self._file.below(size, offset, self._file._source.try_pread)


def either(one: Iterator[tuple[int, int]], other: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the union of two sequences of runs, in order, each byte once."""
    runs = [one, other]
    nexts = [next(run, None) for run in runs]
    position = 0
    while True:
        waiting = [(run, number) for number, run in enumerate(nexts) if run is not None]
        if not waiting:
            return
        (start, stop), number = min(waiting)
        nexts[number] = next(runs[number], None)
        start = max(start, position)
        if start < stop:
            yield start, stop
            position = stop
