"""Directories: their listings, which map names to inodes, and their indexes.

A listing is a sequence of headers, each followed by up to 256 entries whose inodes are in one metadata
block. It should be sorted by name. The index of a large directory has the first name of each metadata
block of the listing. Layouts: squashfs_fs.h; use: the kernel's namei.c and dir.c.

The kernel reads another header while the size in the inode is not used up, and then all of its entries, even
past that size. This module does the same, because some tools store the size of the listing without the
additional 3, or too large a size.
"""

from __future__ import annotations

import errno
import struct
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from cowfs.formats.squashfs.cache import GenerationCache
from cowfs.formats.squashfs.inodes import FORMATS, Inode
from cowfs.formats.squashfs.metadata import BLOCK, Place, Table

_HEADER = struct.Struct("<III")  # entries - 1, block of their inodes, an inode number
_ENTRY = struct.Struct("<HhHH")  # offset of the inode, number relative to the header's, type, name length - 1
_INDEX = struct.Struct("<III")  # offset in the listing, metadata block, name length - 1
_MOST_ENTRIES = 256
_LONGEST_NAME = 256
_SMALLEST = _HEADER.size + _ENTRY.size + 1
"""The smallest size of a header with its entries."""

LISTING_MAX = 64 << 20
"""The longest listing that is read into memory, in bytes: about two million names."""

NOT_STORED = 3
"""How much larger the size of a directory is than its listing, for . and .., which are not stored."""

_MORE = 512
"""How many more bytes than stated are read first, if the listing continues after its stated end."""
_INDEXES, _PARTS = 50_000, 40_000
"""The most entries of indexes, and of parts of listings, that are cached (about 150 bytes each)."""
_LONGEST_PART = 8 * BLOCK
"""The longest part of a listing that is cached, in bytes. mksquashfs makes an index entry for each block."""

_TYPE = 7
"""The bits of a value that are the type."""
_EXTENDED = 7
"""The number that some tools wrongly add to the type of an entry whose inode is an extended one."""
_EMPTY = 0xFFFF_FFFF
"""The count in a header without entries. It is one less than the number of entries."""


class Listing(dict[bytes, int]):
    """Name -> reference of the inode << 3 | its basic type (1 directory, 2 file, ... 7 socket, 0 unknown)."""

    __slots__ = ("problem",)

    def __init__(self) -> None:
        super().__init__()
        self.problem = ""
        """What is wrong with the listing; then it may lack names. "" if nothing is."""


class Damage(Exception):
    """A listing contradicts itself; the message says how. Not raised outside the package."""


class Short(Exception):
    """The data ends before a header that should follow."""


class _Unsorted(OSError):
    """The names or the index are not sorted, so that a search may miss a name."""

    def __init__(self) -> None:
        super().__init__(errno.EFBIG, "a directory that is too large to read completely, and not sorted")


class Found(NamedTuple):
    """The result of a search for one name in a part of a listing."""

    value: int | None
    """A value of a :class:`Listing`; None if the name does not exist."""


class _Index(NamedTuple):
    """The index of a large directory: one element for the start of the listing, and one for each entry."""

    names: list[bytes]
    """The first name of each part of the listing; b"" for the first part, whose name the index lacks."""
    begins: array[int]
    """The offset of each part in the listing, and last the end of the listing."""
    blocks: array[int]
    """The metadata block in which each part begins."""


Fill = Callable[[Listing, bytes, int], None]
"""Adds the entries in the first bytes, as many as given, of data to a listing.

Damage, Short, struct.error.
"""


def parse(data: bytes, size: int, *, ended: bool, fill: Fill | None = None) -> Listing | None:
    """Return all entries of a listing with a stated size of *size* bytes; None if it needs more data.

    *data* is at least that long; *ended*: there is no more. *fill* reads another layout than that of 4.0. Of
    two entries with the same name, the first counts.

    Damaged entries are left out, and described in ``problem``: names that no file can have ("..", "a/b"),
    several names of the same directory (which would make a tree without end), and everything after an invalid
    entry.
    """
    entries = Listing()
    try:
        (fill or _fill)(entries, data, size)
    except struct.error:
        if not ended:
            return None
        entries.problem = "an entry is truncated"
    except Short:
        # Too large a size is not damage: the kernel also stops at the end of the table.
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
            if kind > _TYPE:  # in the kernel, a lookup finds it too, but a listing ends here
                entries.problem = entries.problem or f"an entry is of type {kind}"
                kind = kind - _EXTENDED if kind <= _TYPE + _EXTENDED else 0
            add(data[begin:position], (block | offset) << 3 | kind)


def _check(entries: Listing) -> None:
    """Remove names that lead out of the directory, and all names of a directory that has several."""
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
    """Search for *name* in the start of a listing; None if *data* ends too early to know.

    *first* is the expected first name, if known. :class:`Damage`; :class:`_Unsorted` if the names are not in
    order, so that *name* may be elsewhere.
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
    """The directory table of an image, and the indexes in its inode table."""

    __slots__ = ("_fill", "_indexes", "_inodes", "_parts", "_table")

    def __init__(self, table: Table, inodes: Table, fill: Fill | None = None) -> None:
        """*fill*: see :func:`parse`."""
        self._fill = fill
        self._table = table
        self._inodes = inodes
        self._indexes: GenerationCache[int, _Index] = GenerationCache(_INDEXES, lambda one: len(one.names))
        self._parts: GenerationCache[tuple[int, int], Listing] = GenerationCache(_PARTS, len)

    def read(self, inode: Inode) -> Listing:
        """Return all entries of the directory *inode*. May block. EIO; EFBIG over :data:`LISTING_MAX`."""
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
        """Return the error to raise for a listing with *problem*, and log it."""
        return self._table.damaged(
            Place(inode.start, inode.offset), f"(listing of inode {inode.number}): {problem}"
        )

    def find(self, inode: Inode, name: bytes) -> Found | None:
        """Search for *name* by the index; None if only the complete listing can tell.

        For large directories. May block. EIO.
        """
        left = inode.size - NOT_STORED
        window = 2 * BLOCK
        place = Place(inode.start, inode.offset)
        try:
            index = self._index(inode)
            number = bisect_right(index.names, name) - 1
            part = self._part(inode, index, number)
            if part is not None:
                return Found(part.get(name))
            begin, first = index.begins[number], index.names[number]
            if begin:
                place = Place(index.blocks[number], (place.offset + begin) % BLOCK)
                left -= begin
            # An index entry leads to the right metadata block, so the first window is nearly always enough.
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

    def shrink(self) -> None:
        """Free the caches."""
        self._indexes.clear()
        self._parts.clear()

    def _part(self, inode: Inode, index: _Index, number: int) -> Listing | None:
        """Return all entries from index entry *number* to the next; None if they must be searched instead:
        they are many, or not as they should be."""
        part = self._parts.get((inode.ref, number))
        if part is not None:
            return part
        begin, end = index.begins[number], index.begins[number + 1]
        if not 0 < end - begin <= _LONGEST_PART:
            return None
        place = Place(index.blocks[number], (inode.offset + begin) % BLOCK)
        data, _ = self._table.upto(place, end - begin)
        part = parse(data, end - begin, ended=False)
        if not part or part.problem:
            return None
        names, last = list(part), number + 1 == len(index.names)
        is_as_indexed = names[:1] == index.names[number : number + 1] or number == 0
        if not is_as_indexed or names != sorted(names) or not (last or names[-1] < index.names[number + 1]):
            return None
        self._parts.put((inode.ref, number), part)
        return part

    def _index(self, inode: Inode) -> _Index:
        """Return the index of a directory. OSError if it is damaged."""
        index = self._indexes.get(inode.ref)
        if index is not None:
            return index
        index = _Index([b""], array("Q", [0]), array("Q", [inode.start]))
        at = inode.body(self._inodes)
        for _ in range(inode.index_count):
            raw, at = self._inodes.advance(at, _INDEX.size)
            offset, block, length = _INDEX.unpack(raw)
            if length >= _LONGEST_NAME or not index.begins[-1] <= offset < inode.size - NOT_STORED:
                raise _Unsorted
            entry, at = self._inodes.advance(at, length + 1)
            if entry <= index.names[-1]:
                raise _Unsorted
            index.names.append(entry)
            index.begins.append(offset)
            index.blocks.append(block)
        index.begins.append(inode.size - NOT_STORED)
        self._indexes.put(inode.ref, index)
        return index


def type_of(value: int) -> int:
    """Return the S_IFMT bits of a value of a :class:`Listing`."""
    return FORMATS[value & _TYPE]
