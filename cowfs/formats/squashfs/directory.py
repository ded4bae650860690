"""Directories: a listing -> {name: where its inode is}; the directory index.

A listing is a run of headers, each followed by up to 256 entries whose inodes are in one metadata
block. It should be sorted by name. The index of a large directory says at which name each metadata
block of the listing begins. Layouts: squashfs_fs.h; use: the kernel's namei.c and dir.c.

The kernel reads a header as long as the size that the inode states is not used up, and then all of its
entries, even past that size. So does this: there are makers that state the size of the listing without
the 3 that belong to it, or a size that is too large.
"""

from __future__ import annotations

import errno
import struct
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from cowfs.formats.squashfs.inodes import FORMATS, Inode
from cowfs.formats.squashfs.metadata import BLOCK, Place, Table

_HEADER = struct.Struct("<III")  # entries - 1, block of their inodes, an inode number
_ENTRY = struct.Struct("<HhHH")  # offset of the inode, number relative to the header's, type, name length - 1
_INDEX = struct.Struct("<III")  # offset in the listing, metadata block, name length - 1
_MOST_ENTRIES = 256
_LONGEST_NAME = 256
_SMALLEST = _HEADER.size + _ENTRY.size + 1
"""The least bytes that a header and its entries take: what is less cannot be missing."""

LISTING_MAX = 64 << 20
"""The longest listing, in bytes, that is taken into memory: some two million names."""

NOT_STORED = 3
"""How much larger the size of a directory is than its listing: for . and .., which are not stored."""

_MORE = 512
"""By how many bytes more than stated a listing is read at first, if it goes on there."""
_TYPE = 7
"""The bits of a value that are the type."""
_EXTENDED = 7
"""What a maker adds to the type of an entry whose inode is an extended one, and should not."""
_EMPTY = 0xFFFF_FFFF
"""What a header of no entries counts: one less than it has."""


class Listing(dict[bytes, int]):
    """Name -> reference of the inode << 3 | its basic type (1 directory, 2 file, ... 7 socket, 0 unknown)."""

    __slots__ = ("problem",)

    def __init__(self) -> None:
        super().__init__()
        self.problem = ""
        """What is wrong with the listing: it has more names than these, or others."""


class Damage(Exception):
    """A listing contradicts itself; the message says how. Never leaves the package."""


class Short(Exception):
    """There should be one more header behind the data."""


class _Unsorted(OSError):
    """The index, or the order of the names, is not what makes a search find a name."""

    def __init__(self) -> None:
        super().__init__(errno.EFBIG, "a directory too large to be read whole, and not sorted")


class Found(NamedTuple):
    """What a search for one name in a part of a listing came to."""

    value: int | None
    """As the values of a :data:`Listing`."""


Fill = Callable[[Listing, bytes, int], None]
"""Adds to a listing what data has in its first so many bytes. Damage, Short, struct.error."""


def parse(data: bytes, size: int, *, ended: bool, fill: Fill | None = None) -> Listing | None:
    """All entries of a listing that is stated to be *size* bytes long. *fill*: for another layout than 4.0's.

    *data* is of that length, or longer; None: more of it is needed. *ended*: there is no more.

    Of two entries with one name the first counts. What is damaged is left out, and told in ``problem``:
    names that no file can have ("..", "a/b"), names of the same directory (a tree of which would have
    no end), and everything from an entry on that cannot be.
    """
    entries = Listing()
    try:
        (fill or _fill)(entries, data, size)
    except struct.error:
        if not ended:
            return None
        entries.problem = "an entry is truncated"
    except Short:
        # A size that is too large is not damage: the kernel takes the end of the table for the end too.
        if not ended:
            return None
    except Damage as damage:
        entries.problem = str(damage)
    _check(entries)
    return entries


def _fill(entries: Listing, data: bytes, size: int) -> None:
    header, entry, add = _HEADER.unpack_from, _ENTRY.unpack_from, entries.setdefault
    position, end = 0, len(data)
    while position < size:
        if position + _HEADER.size > end:
            raise Short
        count, start, _ = header(data, position)
        position += _HEADER.size
        if count >= _MOST_ENTRIES:
            if count == _EMPTY:
                continue
            raise Damage(f"a header counts {count + 1} entries")
        block = start << 16
        for _ in range(count + 1):
            offset, _, kind, length = entry(data, position)
            if length >= _LONGEST_NAME:
                raise Damage(f"an entry has a name of {length + 1} bytes")
            begin = position + _ENTRY.size
            position = begin + length + 1
            if position > end:
                raise struct.error
            if kind > _TYPE:  # a lookup finds it, in the kernel too; a listing of the kernel's ends here
                entries.problem = entries.problem or f"an entry is of type {kind}"
                kind = kind - _EXTENDED if kind <= _TYPE + _EXTENDED else 0
            add(data[begin:position], (block | offset) << 3 | kind)


def _check(entries: Listing) -> None:
    """Leave out what leads out of the directory, or to the same directory twice."""
    names = b"/".join(entries)
    if names.count(b"/") >= max(len(entries), 1) or b"\0" in names or b"." in entries or b".." in entries:
        entries.problem = "a name contains a slash or a NUL, or is '.' or '..'"
        for name in [name for name in entries if b"/" in name or b"\0" in name or name in {b".", b".."}]:
            del entries[name]
    directories = [value for value in entries.values() if value & _TYPE == 1]
    if len(set(directories)) != len(directories):
        entries.problem = "two names refer to the same directory"
        count = Counter(directories)
        for name in [name for name, value in entries.items() if count[value] > 1]:
            del entries[name]


def search(data: bytes, name: bytes, first: bytes = b"") -> Found | None:
    """Look for *name* in the start of a listing; None: *data* ends before that is known.

    *first*: what the first name should be, if that is known. Raises :class:`Damage`; :class:`_Unsorted`
    where the names are not in order, so that *name* may be elsewhere.
    """
    position, end = 0, len(data)
    before = first
    while position + _HEADER.size <= end:
        count, start, _ = _HEADER.unpack_from(data, position)
        position += _HEADER.size
        if count >= _MOST_ENTRIES:
            if count == _EMPTY:
                continue
            raise Damage(f"a header counts {count + 1} entries")
        for _ in range(count + 1):
            if position + _ENTRY.size > end:
                return None
            offset, _, kind, length = _ENTRY.unpack_from(data, position)
            if length >= _LONGEST_NAME:
                raise Damage(f"an entry has a name of {length + 1} bytes")
            begin = position + _ENTRY.size
            position = begin + length + 1
            if position > end:
                return None
            found = data[begin:position]
            if found < before or (first and found != first):
                raise _Unsorted
            if found == name:
                return Found((start << 16 | offset) << 3 | (kind if kind <= _TYPE else 0))
            if found > name:
                return Found(None)
            before, first = found, b""
    return None


class DirectoryTable:
    """The directory table of an image, and the indexes, which are in the inode table."""

    __slots__ = ("_fill", "_inodes", "_table")

    def __init__(self, table: Table, inodes: Table, fill: Fill | None = None) -> None:
        """*fill*: see :func:`parse`."""
        self._fill = fill
        self._table = table
        self._inodes = inodes

    def read(self, inode: Inode) -> Listing:
        """All entries of the directory *inode*. May block. EIO; EFBIG over :data:`LISTING_MAX`."""
        size = inode.size - NOT_STORED
        if size <= 0:
            return Listing()
        if size > LISTING_MAX:
            raise OSError(errno.EFBIG, f"directory {inode.number}: too many entries to list")
        place = Place(inode.start, inode.offset)
        data, error = self._table.upto(place, size)
        listing, more = parse(data, size, ended=len(data) < size, fill=self._fill), _MORE
        while listing is None:
            data, error = self._table.upto(place, size + more)
            ended = len(data) < size + more
            listing, more = parse(data, size, ended=ended, fill=self._fill), 2 * more
        if error is not None and len(data) + _SMALLEST <= size:
            listing.problem = listing.problem or str(error.strerror)
        return listing

    def damaged(self, inode: Inode, problem: str) -> OSError:
        """The error to raise for a listing with *problem*."""
        return self._table.damaged(
            Place(inode.start, inode.offset), f"(listing of inode {inode.number}): {problem}"
        )

    def find(self, inode: Inode, name: bytes) -> Found | None:
        """What *name* is, by way of the index; None where only the whole listing can tell.

        For directories that are not worth being read whole. May block. EIO.
        """
        left = inode.size - NOT_STORED
        window = 2 * BLOCK
        place = Place(inode.start, inode.offset)
        try:
            begin, block, first = self._indexed(inode, name)
            if begin:
                place = Place(block, (place.offset + begin) % BLOCK)
                left -= begin
            # An index entry leads into the right metadata block, so the first window nearly always does.
            while left > 0 and window <= LISTING_MAX:
                data = self._table.read(place, min(window, left))
                found = search(data, name, first)
                if found is not None:
                    return found
                if len(data) == left:
                    return Found(None)
                window *= 4
        except Damage as damage:
            raise self.damaged(inode, str(damage)) from None
        except OSError:
            if left > LISTING_MAX:
                raise
            return None
        return None

    def _indexed(self, inode: Inode, name: bytes) -> tuple[int, int, bytes]:
        """The last index entry that is not after *name*: offset in the listing, metadata block, name."""
        best = (0, inode.start, b"")
        at = inode.body(self._inodes)
        for _ in range(inode.index_count):
            raw, at = self._inodes.advance(at, _INDEX.size)
            offset, block, length = _INDEX.unpack(raw)
            if length >= _LONGEST_NAME or offset >= inode.size:
                raise _Unsorted
            entry, at = self._inodes.advance(at, length + 1)
            if entry > name:
                break
            best = (offset, block, entry)
        return best


def type_of(value: int) -> int:
    """The S_IFMT bits of a value of a :data:`Listing`."""
    return FORMATS[value & _TYPE]
