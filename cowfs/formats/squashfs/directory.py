"""Directories: a listing -> {name: where its inode is}; the directory index.

A listing is a run of headers, each followed by up to 256 entries whose inodes are in one metadata
block. It is sorted by name. The index of a large directory says at which name each metadata block
of the listing begins. Layouts: squashfs_fs.h; use: the kernel's namei.c and dir.c.
"""

from __future__ import annotations

import errno
import struct
from typing import NamedTuple

from cowfs.formats.squashfs.inodes import FORMATS, Inode
from cowfs.formats.squashfs.metadata import BLOCK, Place, Table

_HEADER = struct.Struct("<III")  # entries - 1, block of their inodes, an inode number
_ENTRY = struct.Struct("<HhHH")  # offset of the inode, number relative to the header's, type, name length - 1
_INDEX = struct.Struct("<III")  # offset in the listing, metadata block, name length - 1
_MOST_ENTRIES = 256
_LONGEST_NAME = 256

LISTING_MAX = 64 << 20
"""The longest listing, in bytes, that is taken into memory: some two million names."""

NOT_STORED = 3
"""How much larger the size of a directory is than its listing: for . and .., which are not stored."""

Listing = dict[bytes, int]
"""Name -> reference of the inode << 3 | its basic type (1 directory, 2 file, ... 7 socket)."""


class Damage(Exception):
    """A listing contradicts itself; the message says how. Never leaves the package."""


class Found(NamedTuple):
    """What a search for one name in a part of a listing came to."""

    value: int | None
    """As the values of a :data:`Listing`."""


def parse(data: bytes) -> Listing:
    """All entries of a listing.

    Raises :class:`Damage` where the listing is damaged or has a name that no file can have ("..",
    "a/b"), or twice the same directory (a tree of which would have no end).
    """
    entries: Listing = {}
    header, entry = _HEADER.unpack_from, _ENTRY.unpack_from
    position, end = 0, len(data)
    try:
        while position < end:
            count, start, _ = header(data, position)
            if count >= _MOST_ENTRIES:
                raise Damage(f"a header counts {count + 1} entries")
            position += 12
            block = start << 16
            for _ in range(count + 1):
                offset, _, kind, length = entry(data, position)
                if length >= _LONGEST_NAME or kind > 7 or not kind:
                    raise Damage(f"an entry of type {kind} has a name of {length + 1} bytes")
                begin = position + 8
                position = begin + length + 1
                entries[data[begin:position]] = (block | offset) << 3 | kind
    except struct.error:
        raise Damage("an entry is cut off") from None
    if position != end:
        raise Damage("the last entry is cut off")
    _check(entries)
    return entries


def _check(entries: Listing) -> None:
    names = b"/".join(entries)
    if names.count(b"/") >= max(len(entries), 1) or b"\0" in names or b"." in entries or b".." in entries:
        raise Damage("a name has a slash or a NUL in it, or is '.' or '..'")
    directories = [value for value in entries.values() if value & 7 == 1]
    if len(set(directories)) != len(directories):
        raise Damage("two names mean the same directory")


def search(data: bytes, name: bytes) -> Found | None:
    """Look for *name* in the start of a listing; None: *data* ends before that is known.

    Raises :class:`Damage`.
    """
    position, end = 0, len(data)
    while position + 12 <= end:
        count, start, _ = _HEADER.unpack_from(data, position)
        if count >= _MOST_ENTRIES:
            raise Damage(f"a header counts {count + 1} entries")
        position += 12
        for _ in range(count + 1):
            if position + 8 > end:
                return None
            offset, _, kind, length = _ENTRY.unpack_from(data, position)
            if length >= _LONGEST_NAME or kind > 7 or not kind:
                raise Damage(f"an entry of type {kind} has a name of {length + 1} bytes")
            begin = position + 8
            position = begin + length + 1
            found = data[begin:position]
            if found == name and position <= end:
                return Found((start << 16 | offset) << 3 | kind)
            if found > name:
                return Found(None)
    return None


class DirectoryTable:
    """The directory table of an image, and the indexes, which are in the inode table."""

    __slots__ = ("_inodes", "_table")

    def __init__(self, table: Table, inodes: Table) -> None:
        self._table = table
        self._inodes = inodes

    def read(self, inode: Inode) -> Listing:
        """All entries of the directory *inode*. May block. EIO; EFBIG over :data:`LISTING_MAX`."""
        size = inode.size - NOT_STORED
        if size <= 0:
            return {}
        if size > LISTING_MAX:
            raise OSError(errno.EFBIG, f"directory {inode.number}: too many entries to list")
        place = self._place(inode)
        try:
            return parse(self._table.read(place, size))
        except Damage as damage:
            raise self._table.damaged(place, f"(listing of inode {inode.number}): {damage}") from None

    def find(self, inode: Inode, name: bytes) -> int | None:
        """The value of *name* as in a :data:`Listing`, by way of the index; None when not there.

        For directories that are not worth being read whole. May block. EIO.
        """
        place = self._place(inode)
        left = inode.size - NOT_STORED
        begin, block = self._indexed(inode, name)
        if begin:
            place = Place(block, (place.offset + begin) % BLOCK)
            left -= begin
        window = 2 * BLOCK
        try:
            # An index entry leads into the right metadata block, so the first window nearly always does.
            while left > 0 and window <= LISTING_MAX:
                data = self._table.read(place, min(window, left))
                found = search(data, name)
                if found is not None:
                    return found.value
                if len(data) == left:
                    return None
                window *= 4
        except Damage as damage:
            raise self._table.damaged(place, f"(listing of inode {inode.number}): {damage}") from None
        if left > 0:
            raise OSError(errno.EFBIG, f"directory {inode.number}: too many entries to search")
        return None

    def _indexed(self, inode: Inode, name: bytes) -> tuple[int, int]:
        """(offset in the listing, metadata block) of the last index entry that is not after *name*."""
        best = (0, inode.start)
        at = inode.body
        for _ in range(inode.index_count):
            raw, at = self._inodes.advance(at, _INDEX.size)
            offset, block, length = _INDEX.unpack(raw)
            if length >= _LONGEST_NAME or offset >= inode.size:
                raise self._inodes.damaged(at, f"of the index of directory {inode.number} is damaged")
            entry, at = self._inodes.advance(at, length + 1)
            if entry > name:
                break
            best = (offset, block)
        return best

    def _place(self, inode: Inode) -> Place:
        place = Place(inode.start, inode.offset)
        if inode.offset >= BLOCK:
            raise self._table.damaged(place, f"(listing of inode {inode.number}) begins past its block")
        return place


def type_of(value: int) -> int:
    """The S_IFMT bits of a value of a :data:`Listing`."""
    return FORMATS[value & 7]
