"""Find the data of a file: its block list, and the fragments.

A file is divided into blocks of the image's block size. They follow each other in the image, and the
inode lists the stored length of each. A length of 0 is a block of zeros, which is not stored.
The rest at the end may be part of a fragment, a block that contains the tails of several files.
Layouts: squashfs_fs.h; use: the kernel's file.c and fragment.c.
"""

from __future__ import annotations

import errno
import struct
import threading
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

from cowfs.formats.squashfs.inodes import NONE, Inode
from cowfs.formats.squashfs.metadata import BLOCK, IndexedTable, Metadata, Table
from cowfs.formats.squashfs.superblock import Superblock

UNCOMPRESSED = 1 << 24
LENGTH = UNCOMPRESSED - 1
"""The bits of a stored length that are the length. Bit 24 is set if the block is not compressed."""

_PER_CHUNK = BLOCK // 4
_FRAGMENT = "QII"  # position, stored length, unused
_FRAGMENT_2 = "II"  # in version 2: position, stored length

BLOCKS_MAX = 1 << 26
"""The limit of the blocks of a file: 8 TiB with the usual block size of 128 KiB."""


class Stored(NamedTuple):
    """The position and stored length of a block."""

    position: int
    word: int
    """Its length as stored: 0 for a hole, with bit 24 set if it is not compressed."""

    @property
    def length(self) -> int:
        """Bytes in the image."""
        return self.word & LENGTH


_Chunk = tuple[tuple[int, ...], list[int]]
"""The stored lengths of up to 2048 blocks, and their positions in the image."""


class BlockMap:
    """The block list of one file, read as far as needed.

    The list of a large file is itself large (4 bytes per block), and the position of a block follows from
    the lengths of all blocks before it. So the list is read in chunks of 2048 blocks. The start of each chunk
    is kept, and the content of the latest chunks.
    """

    __slots__ = ("_chunks", "_inode", "_lock", "_starts", "_superblock", "_table", "_width", "count")

    def __init__(self, table: Table, inode: Inode, count: int, superblock: Superblock) -> None:
        """*table* is the inode table.

        EFBIG over :data:`BLOCKS_MAX`, EIO if the list cannot be there.
        """
        body = inode.body(table)
        self._width = 4 if superblock.version >= (2, 0) else 2
        if count * self._width > table.bound(body):
            raise table.damaged(body, f"lists {count} blocks, more than there can be")
        if count > BLOCKS_MAX:
            raise OSError(errno.EFBIG, f"file {inode.number} of {inode.size} bytes: too large to read")
        self.count = count
        self._table = table
        self._superblock = superblock
        self._inode = inode
        # The start of each chunk: in the table, and in the image.
        self._starts = [(body, inode.start)]
        self._chunks: dict[int, _Chunk] = {}
        self._lock = threading.Lock()

    def __getitem__(self, number: int) -> Stored:
        """Return the position and length of block *number*. May block. EIO."""
        words, positions = self._chunk(number // _PER_CHUNK)
        place = number % _PER_CHUNK
        if place >= len(words):
            raise self._no_length(number)
        return Stored(positions[place], words[place])

    def since(self, number: int) -> Iterator[tuple[int, Stored]]:
        """Yield (number, block) for every block from *number* on that is not a hole. May block. EIO."""
        while number < self.count:
            chunk, first = divmod(number, _PER_CHUNK)
            words, positions = self._chunk(chunk)
            if any(words):
                for index in range(first, len(words)):
                    if words[index]:
                        yield chunk * _PER_CHUNK + index, Stored(positions[index], words[index])
            number = chunk * _PER_CHUNK + len(words)
            if number < self.count and len(words) < _PER_CHUNK:
                raise self._no_length(number)

    def _chunk(self, wanted: int) -> _Chunk:
        found = self._chunks.get(wanted)
        if found is None:
            with self._lock:
                for passed in range(len(self._starts) - 1, wanted):
                    if len(self._load(passed)[0]) < _PER_CHUNK:
                        raise self._no_length(wanted * _PER_CHUNK)
                found = self._load(wanted)
        return found

    def _no_length(self, number: int) -> OSError:
        what = f"(block list of inode {self._inode.number}) has no length for block {number}"
        return self._table.damaged(self._starts[0][0], what)

    def _load(self, number: int) -> _Chunk:
        place, position = self._starts[number]
        size = min(_PER_CHUNK, self.count - number * _PER_CHUNK)
        width = self._width
        data, _ = self._table.upto(place, width * size)
        letter = "I" if width == 4 else "H"
        words = struct.unpack_from(f"{self._superblock.order}{len(data) // width}{letter}", data)
        if width == 2:
            words = tuple(_word_of_1(word) for word in words)
        if words and max(words) > (UNCOMPRESSED | LENGTH):  # the blocks before it are readable
            words = words[: next(at for at, word in enumerate(words) if word > (UNCOMPRESSED | LENGTH))]
        positions = list(accumulate([word & LENGTH for word in words], initial=position))
        if number + 1 == len(self._starts) and len(words) == _PER_CHUNK:
            self._starts.append((self._table.after(place, width * size), positions[-1]))
        if len(self._chunks) >= 4:
            self._chunks.clear()
        chunk = self._chunks[number] = words, positions
        return chunk


def _word_of_1(word: int) -> int:
    """What version 2 has for a block's length in version 1: bit 15 is what bit 24 is, and 0 is 32 KiB."""
    return (word & 0x7FFF or 0x8000) | (UNCOMPRESSED if word & 0x8000 else 0)


def count_blocks(inode: Inode, superblock: Superblock) -> int:
    """Return how many blocks a file has, without a tail in a fragment."""
    count = inode.size >> superblock.block_log
    if inode.fragment == NONE and inode.size & (superblock.block_size - 1):
        count += 1
    return count


class FragmentTable:
    """The fragments of an image."""

    __slots__ = ("_entry", "_table")

    def __init__(self, metadata: Metadata, superblock: Superblock) -> None:
        sb = superblock
        layout, pointer = (_FRAGMENT, 8) if sb.version >= (3, 0) else (_FRAGMENT_2, 4)
        self._entry = struct.Struct(sb.order + layout)
        self._table = IndexedTable(
            metadata, sb.fragment_table, sb.fragments, self._entry.size, "fragment", pointer
        )

    def __getitem__(self, number: int) -> Stored:
        """Return the position and length of fragment *number*. May block. EIO."""
        position, word, *_ = self._entry.unpack(self._table.entry(number))
        return Stored(position, word)

    def first_block(self) -> int:
        """The start of the table, which is the end of the table before it."""
        return self._table.first_block()
