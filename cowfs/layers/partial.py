"""A file of the upper that has some of its data, and a lower the rest: a hole is what was not copied yet.

The block pointers of the upper file are the map, and there is no other: a block of it is the file's from the
moment when it is there, whole, and until then what the lower has in its place is. So an upper whose files
have holes only where nothing was ever written can do this, and only that.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Protocol, cast

from cowfs.layers.base import Allocatable, File
from cowfs.types import Attr

_PIECE = 256 << 10
"""Bytes that are copied at a time: a request that needs the upper at that moment waits."""


class Fillable(File, Protocol):
    """A file whose holes can be filled while others write to it."""

    def fill(self, data: bytes, offset: int) -> None:
        """Write *data* where there are holes, and change nothing else: neither blocks, nor size, nor times.

        *offset* is a multiple of the layer's ``fill_unit`` (without one nobody may write meanwhile). What is
        missing of the last block is zero. Each block is a hole or has all of its data, after a crash too.
        ENOSPC. May block.
        """
        ...


class Part:
    """How much of a lower file shows through an upper one: what all who have it open share."""

    __slots__ = ("changing", "end", "is_whole", "is_wrong", "unit")

    def __init__(self, end: int, unit: int) -> None:
        self.end = end
        """Up to this byte the lower shows through the holes of the upper; beyond it they are zeros."""
        self.unit = unit
        """Bytes that the upper makes out of a hole at once."""
        self.is_whole = False
        """Whether nothing of the lower shows any more: a hole is a hole."""
        self.is_wrong = False
        """Whether the *end* could not be written to the store: then the file must not become longer."""
        self.changing = threading.Lock()
        """Held by who changes *end*, and by who fills holes below it."""


class PartialFile:
    """An open file of this kind: a :class:`File`. Who makes it opens *target* and *source* for it."""

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
        """Yield which file has what of a range: ``(file, length, offset)``."""
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
        """Return this many bytes that the holes show, read by *read*. EIO if the lower is shorter now."""
        there = min(size, max(self._part.end - offset, 0))
        data = read(there, offset) if there else b""
        if data is not None and len(data) != there:
            raise OSError(errno.EIO, "the lower file is shorter than it was")
        return data if data is None or there == size else data + bytes(size - there)

    def needs_the_lower(self, size: int, offset: int) -> bool:
        """Whether a write has to read from the lower first, which may take a while."""
        return any(map(self._is_missing, self._edges(size, offset)))

    def _edges(self, size: int, offset: int) -> list[int]:
        """Return where the blocks begin that a write changes in part."""
        unit = self._part.unit
        return sorted({edge - edge % unit for edge in (offset, offset + size) if edge % unit})

    def _is_missing(self, block: int) -> bool:
        if self._part.is_whole or block >= self._part.end:
            return False
        return self._start_of_data(block, block + 1) is None

    def _start_of_data(self, position: int, end: int) -> tuple[int, int] | None:
        return next((run for run in self._target.segments(end, position) if run[1] > position), None)

    def pwrite(self, data: bytes, offset: int) -> int:
        """Write. Blocks that it changes in part come up first: as they were, so a crash is no matter."""
        if self._part.is_wrong and offset + len(data) > self._part.end:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        for block in self._edges(len(data), offset):
            if self._is_missing(block):
                self._copy(block, block + self._part.unit)
        return self._target.pwrite(data, offset)

    def _copy(self, start: int, stop: int) -> int:
        """Fill the holes of a range of whole blocks; return where that has ended."""
        stop = min(stop, self._part.end)
        if start >= stop:
            return stop
        data = self.below(stop - start, start, self._source.pread)
        with self._part.changing:
            if not self._part.is_whole and self._part.end >= stop and data is not None:
                cast(Fillable, self._target).fill(data, start)
        return stop

    def copy_steps(self, size: int | None = None) -> Iterator[int]:
        """Copy what shows of the lower in the first *size* bytes, or in all.

        Blocks, and yields after each piece how much it was. After the end nothing of it is missing.
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
        """About how many bytes of the lower's data are not here yet."""
        whole = min(self._part.end, self._source.stat().st_blocks * 512)
        return 0 if self._part.is_whole else max(whole - self.stat().st_blocks * 512, 0)

    def cut(self, size: int) -> None:
        """Set a size that is less than it was, after the data up to there was copied. Blocks."""
        with self._part.changing:
            self._target.truncate(size)
            self._part.end = min(self._part.end, size)

    def truncate(self, size: int) -> None:
        """EIO unless the file is complete: the caller copies the remaining data before it sets a size."""
        if not self._part.is_whole:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._target.truncate(size)

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        """EIO unless the file is complete: a hole shows the lower."""
        if not self._part.is_whole:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        cast(Allocatable, self._target).fallocate(mode, offset, length)

    def fsync(self, datasync: bool) -> None:
        """Return when the upper's data is on disk. The rest is in the lower."""
        self._target.fsync(datasync)

    def stat(self) -> Attr:
        return self._target.stat()

    def segments(self, end: int, start: int = 0) -> Iterator[tuple[int, int]]:
        """The runs where the upper has data, or the lower shows."""
        if self._part.is_whole:
            return self._target.segments(end, start)
        return either(
            self._target.segments(end, start), self._source.segments(min(end, self._part.end), start)
        )

    def fileno(self) -> int:
        """-1: nobody may go past this file."""
        return -1

    def descriptor(self) -> int:
        """The descriptor that the lower's file has, to be counted; -1 if it has none."""
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
    """What shows in the holes of a partial file: as much of a :class:`File` as reading needs."""

    __slots__ = ("_file",)

    def __init__(self, file: PartialFile) -> None:
        self._file = file

    def pread(self, size: int, offset: int) -> bytes:
        return self._file.below(size, offset, self._file._source.pread) or b""

    def try_pread(self, size: int, offset: int) -> bytes | None:
        return self._file.below(size, offset, self._file._source.try_pread)


def either(one: Iterator[tuple[int, int]], other: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the runs, in order and each byte once, that at least one of two has."""
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
