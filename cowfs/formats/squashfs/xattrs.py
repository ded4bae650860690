"""Extended attributes.

An inode has the number of a set. The entry of the set has the position of its first xattr in the table of
keys and values, and their number. A value may be elsewhere in that table (out of line), if several inodes
share it. Layouts: squashfs_fs.h; use: the kernel's xattr.c, xattr_id.c.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass

from cowfs.errors import os_error
from cowfs.formats.squashfs.cache import GenerationCache
from cowfs.formats.squashfs.metadata import BLOCK, IndexedTable, Metadata, Place, Table

_TABLE = struct.Struct("<QII")  # start of keys and values, number of sets, unused
_SET = struct.Struct("<QII")  # reference of the first, number of attributes, bytes
_KEY = struct.Struct("<HH")  # prefix and flags, length of the name
_LENGTH = struct.Struct("<I")
_REFERENCE = struct.Struct("<Q")

_PREFIXES = {0: b"user.", 1: b"trusted.", 2: b"security."}
KINDS = tuple(_PREFIXES.values())
"""The prefixes of all possible xattrs."""

_OUT_OF_LINE = 0x100
_KNOWN = 0x1FF

VALUE_MAX = 65536
"""The limit of a value in bytes (the kernel's XATTR_SIZE_MAX)."""
COUNT_MAX = (64 << 10) // len(b"user.x\0") + 1
"""The limit of the xattrs of one inode: more names than fit in XATTR_LIST_MAX (64 KiB)."""
SET_MAX = 1 << 20
"""The limit of the keys and values of one inode in bytes, without values out of line."""


@dataclass(slots=True, frozen=True)
class OutOfLine:
    """A value that is not read yet: the place of the reference to it."""

    place: Place


@dataclass(slots=True, frozen=True)
class TooLong:
    """A value that is longer than the kernel allows."""


Attributes = dict[bytes, bytes | OutOfLine | TooLong]


class XattrTable:
    """The extended attributes of an image that has such a table."""

    __slots__ = ("_cache", "_keys", "_sets", "count", "first_block")

    def __init__(self, metadata: Metadata, position: int) -> None:
        """*position* is that of the table in the superblock. May block. EIO."""
        raw = metadata.source.pread(_TABLE.size, position, "attribute table")
        start, count, _ = _TABLE.unpack(raw)
        self.count: int = count
        """The number of sets."""
        self._sets = IndexedTable(metadata, position + _TABLE.size, count, _SET.size, "attribute set")
        end = self._sets.first_block() if count else position
        if start > end:
            raise metadata.source.damaged(f"attribute table: keys at {start:#x}, sets at {end:#x}")
        self._keys = Table(metadata, start, end, "attributes")
        self.first_block: int = start
        """The position of the keys and values, which is the end of the table before them."""
        self._cache: GenerationCache[int, Attributes] = GenerationCache(4 << 20, _weight)

    def shrink(self) -> None:
        """Free the cache."""
        self._cache.clear()

    def names(self, number: int) -> list[bytes]:
        """Return the names of set *number*, with their prefixes. May block. EIO."""
        return list(self._attributes(number))

    def value(self, number: int, name: bytes) -> bytes | None:
        """Return the value of *name* in set *number*, or None. May block. EIO, E2BIG."""
        value = self._attributes(number).get(name)
        if isinstance(value, OutOfLine):
            (reference,) = _REFERENCE.unpack(self._keys.read(value.place, _REFERENCE.size))
            raw, at = self._keys.advance(self._place(reference), _LENGTH.size)
            value = self._value(at, _LENGTH.unpack(raw)[0])[0]
        if isinstance(value, TooLong):
            raise os_error(errno.E2BIG)
        return value

    def _attributes(self, number: int) -> Attributes:
        found = self._cache.get(number)
        if found is None:
            found = self._read(number)
            self._cache.put(number, found)
        return found

    def _read(self, number: int) -> Attributes:
        reference, count, _ = _SET.unpack(self._sets.entry(number))
        at = begin = self._place(reference)
        if count > COUNT_MAX:
            raise self._keys.damaged(begin, f"begins a set of {count} attributes")
        attributes: Attributes = {}
        taken = 0
        for _ in range(count):
            raw, at = self._keys.advance(at, _KEY.size)
            kind, length = _KEY.unpack(raw)
            name, at = self._keys.advance(at, length)
            raw, place = self._keys.advance(at, _LENGTH.size)
            size = _LENGTH.unpack(raw)[0]
            taken += length + size
            if taken > SET_MAX:
                raise self._keys.damaged(begin, f"begins a set of over {SET_MAX} bytes")
            value, at = self._value(place, size)
            prefix = _PREFIXES.get(kind & 0xFF)
            if prefix is None or kind & ~_KNOWN or not name or b"\0" in name:
                continue  # a namespace of a later version, which the kernel ignores too
            # Of two with the same name the first counts, as in the kernel.
            attributes.setdefault(prefix + name, OutOfLine(place) if kind & _OUT_OF_LINE else value)
        return attributes

    def _value(self, at: Place, length: int) -> tuple[bytes | TooLong, Place]:
        if length > VALUE_MAX:
            return TooLong(), self._keys.after(at, min(length, SET_MAX + 1))
        return self._keys.advance(at, length)

    def _place(self, reference: int) -> Place:
        place = Place(reference >> 16, reference & 0xFFFF)
        if place.offset >= BLOCK:
            raise self._keys.damaged(place, "begins past its block")
        return place


def _weight(attributes: Attributes) -> int:
    """Return the approximate memory of a set in bytes."""
    return 300 + sum(
        200 + len(name) + (len(value) if isinstance(value, bytes) else 0)
        for name, value in attributes.items()
    )
