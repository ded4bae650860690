"""An index of a zip archive. Data is decompressed when it is read.

Layout: PKWARE's APPNOTE.TXT, and extrafld.txt of Info-ZIP's zip. Archives are untrusted, so names, counts,
sizes and positions are checked.
"""

from __future__ import annotations

import calendar
import errno
import hashlib
import stat
import struct
from collections.abc import Iterator
from typing import NamedTuple

from cowfs.errors import LayerError, os_error
from cowfs.formats.archive import MOST_MEMBERS, NAMES, Inode, Tree
from cowfs.formats.squashfs.source import Bytes
from cowfs.formats.zip_data import DEFLATED, STORED, Member, Unpacker

_PIECE = 1 << 20
_FIRST_MEMBER, _NO_MEMBER = b"PK\3\4", b"PK\5\6"
_END = struct.Struct("<4sHHHHIIH")
"""magic, disk, disk of the directory, entries on this disk, entries, bytes, place, bytes of comment."""
_LONGEST_END = _END.size + 0xFFFF
_END64_AT = struct.Struct("<4sIQI")  # magic, disk, offset, disks
_END64 = struct.Struct("<4sQHHIIQQQQ")
"""magic, size, made by, needs, disk, disk of the directory, entries on this disk, entries, bytes, place."""
_ENTRY = struct.Struct("<4sBBHHHHHIIIHHHHHII")
_LONGEST_ENTRY = _ENTRY.size + 3 * 0xFFFF
_ENCRYPTED = 0x0001 | 0x0040 | 0x2000
_UTF8 = 0x0800
_FAT, _UNIX, _NTFS, _VFAT, _OS_X = 0, 3, 10, 14, 19  # hosts: who made it
_LACKS = 0xFFFFFFFF
"""In place of a number that does not fit and is in the extra field."""
_ZIP64, _TIMES, _NTFS_TIMES, _OWNER, _UNICODE_PATH = 0x0001, 0x5455, 0x000A, 0x7875, 0x7075
_1601 = 11_644_473_600
"""Seconds from NTFS's epoch to Unix's."""
_LARGEST_RATIO = 1032
"""How many bytes one deflated byte can give at most (zlib's Technical Details: 258 bytes from two bits)."""
_OVERHEAD = 64 << 10
"""A deflated member may have so many bytes and twice its content. More would waste time."""
_METHODS = {9: "Deflate64", 12: "bzip2", 14: "LZMA", 20: "zstd", 93: "zstd", 95: "xz", 98: "PPMd", 99: "AES"}


class _Entry(NamedTuple):
    """A member as the central directory describes it."""

    host: int
    flags: int
    method: int
    time: int
    date: int
    crc: int
    packed: int
    size: int
    external: int
    place: int
    """The position of its local header."""
    raw_name: bytes
    extra: dict[int, bytes]


def is_zip(start: bytes) -> bool:
    """Whether a file that begins with *start* is a zip archive. One behind a program is not found."""
    return start[:4] in {_FIRST_MEMBER, _NO_MEMBER}


class Archive(Tree):
    """The index of a zip archive, and its data. Any thread may read from it."""

    def __init__(self, data: Bytes, name: str) -> None:
        """Read the central directory. The archive closes *data*. Blocks; LayerError, OSError."""
        super().__init__(data, name)
        self._members: dict[int, Member] = {}
        self._unpacker = Unpacker(data, name)
        self._digest = hashlib.sha256()
        self._start, self._end, self._shift, self._count = self._find_directory()
        found = 0
        for entry in self._entries():
            found += 1
            if found > MOST_MEMBERS:
                raise LayerError(f"{name}: has more than {MOST_MEMBERS} members")
            self._add(entry)
        if found & 0xFFFF != self._count & 0xFFFF:  # some writers store only 16 bits of the count
            raise self._damaged(f"has {found} members, but should have {self._count}")
        self.fingerprint = self._digest.hexdigest()

    def _damaged(self, what: str) -> LayerError:
        return LayerError(f"{self.name}: damaged zip archive: {what}", "download or copy it again")

    def _find_directory(self) -> tuple[int, int, int, int]:
        """Return the start and end of the central directory, the error of all positions, and the count."""
        size = self.data.size
        tail_at = max(0, size - _LONGEST_END)
        tail = self._read(size - tail_at, tail_at)
        at = tail.rfind(_NO_MEMBER)
        while at >= 0:
            if at + _END.size <= len(tail) and at + _END.size + _END.unpack_from(tail, at)[7] == len(tail):
                break
            at = tail.rfind(_NO_MEMBER, 0, at)
        if at < 0:
            raise self._damaged("it has no central directory: truncated")
        _, disk, of_directory, here, count, length, offset, _ = _END.unpack_from(tail, at)
        end = tail_at + at
        locator = self._read(_END64_AT.size, end - _END64_AT.size) if end >= _END64_AT.size else b""
        if locator.startswith(b"PK\6\7"):
            _, _, place, disks = _END64_AT.unpack(locator)
            record = self._read(_END64.size, place) if place + _END64.size <= size else b""
            if len(record) < _END64.size or not record.startswith(b"PK\6\6") or disks > 1:
                raise self._damaged("the end of its central directory is not where it should be")
            *_, disk, of_directory, here, count, length, offset = _END64.unpack(record)
            end = place
        if (disk, of_directory, here) != (0, 0, count):
            raise LayerError(f"{self.name}: is one of several parts of a zip archive", "join them: zip -s 0")
        if length > end or offset > end - length:
            raise self._damaged("its central directory is outside the archive")
        return end - length, end, end - length - offset, count

    def _read(self, size: int, at: int) -> bytes:
        found = b""
        while len(found) < size and (piece := self.data.pread(size - len(found), at + len(found))):
            found += piece
        return found

    def _entries(self) -> Iterator[_Entry]:
        at, buffer, begin = self._start, b"", 0
        while True:
            if len(buffer) - begin < _LONGEST_ENTRY and at < self._end:
                piece = self._read(min(_PIECE, self._end - at), at)
                if not piece:
                    raise self._damaged("its central directory is truncated")
                buffer, begin, at = buffer[begin:] + piece, 0, at + len(piece)
            if buffer[begin : begin + 4] != b"PK\1\2":
                return
            if len(buffer) - begin < _ENTRY.size:
                raise self._damaged("its central directory is truncated")
            facts = _ENTRY.unpack_from(buffer, begin)
            lengths = facts[11:14]  # of name, extra fields and comment
            end = begin + _ENTRY.size + sum(lengths)
            if end > len(buffer):
                raise self._damaged("its central directory is truncated")
            self._digest.update(buffer[begin:end])
            name_at = begin + _ENTRY.size
            extra_at = name_at + lengths[0]
            extra = _fields(buffer[extra_at : extra_at + lengths[1]])
            yield self._entry(facts, buffer[name_at:extra_at], extra)
            begin = end

    def _entry(self, facts: tuple[int, ...], name: bytes, extra: dict[int, bytes]) -> _Entry:
        _, _, host, _, flags, method, time, date, crc, packed, size, *_, external, place = facts
        numbers, at = [size, packed, place], 0
        wide = extra.get(_ZIP64, b"")
        for index, number in enumerate(numbers):
            if number == _LACKS and at + 8 <= len(wide):
                (numbers[index],) = struct.unpack_from("<Q", wide, at)
                at += 8
        size, packed, place = numbers
        place += self._shift
        return _Entry(host, flags, method, time, date, crc, packed, size, external, place, name, extra)

    def _add(self, entry: _Entry) -> None:
        name = _name(entry)
        parts = self._parts(name)
        mode = _mode(entry, is_directory=name.endswith("/"))
        if not parts:
            if stat.S_ISDIR(mode):
                self._set_attributes(self.root, entry, mode)
            return
        directory = self._directory(parts[:-1])
        known = directory.children.get(parts[-1])
        if stat.S_ISDIR(mode) and known is not None and stat.S_ISDIR(known.mode):
            self._set_attributes(known, entry, mode)
            return
        inode = self._new(mode)
        self._set_attributes(inode, entry, mode)
        if stat.S_ISDIR(mode):
            inode.nlink = 2
        elif stat.S_ISREG(mode) or stat.S_ISLNK(mode):
            self._set_data(inode, entry, name)
        elif not stat.S_ISFIFO(mode) and not stat.S_ISSOCK(mode):
            raise LayerError(
                f"{self.name}: {name!r} is a device, but zip archives do not record device numbers"
            )
        self._put(directory, parts[-1], inode)

    def _set_data(self, inode: Inode, entry: _Entry, name: str) -> None:
        if entry.flags & _ENCRYPTED:
            raise LayerError(
                f"{self.name}: {name!r} is encrypted", "unpack it with its password, and mount the directory"
            )
        if entry.method not in {STORED, DEFLATED}:
            method = _METHODS.get(entry.method, f"method {entry.method}")
            raise LayerError(
                f"{self.name}: {name!r} is compressed with {method}; only deflate is supported",
                "unpack it, and mount the directory",
            )
        most = entry.packed * _LARGEST_RATIO if entry.method == DEFLATED else entry.packed
        least = entry.packed if entry.method == STORED else (entry.packed - _OVERHEAD) // 2
        if not least <= entry.size <= most:
            raise self._damaged(f"{name!r} has {entry.size} bytes in {entry.packed}")
        if entry.place + entry.packed > self._start:
            raise self._damaged(f"{name!r} is outside the archive")
        inode.size = entry.size
        if stat.S_ISLNK(inode.mode) and not 0 < inode.size < 4096:
            raise LayerError(f"{self.name}: {name!r} is a symbolic link of {inode.size} bytes")
        if inode.size:
            inode.segments = [(0, inode.size, entry.place)]
            self._members[inode.number] = Member(
                entry.place, entry.method, entry.packed, entry.size, entry.crc
            )

    def _set_attributes(self, inode: Inode, entry: _Entry, mode: int) -> None:
        inode.mode = mode
        inode.uid, inode.gid = _owner(entry.extra.get(_OWNER, b""))
        inode.mtime_ns = _nanoseconds(entry)

    def pread(self, inode: Inode, size: int, offset: int) -> bytes:
        """Return up to *size* bytes of a file. May block. EIO if the archive is damaged or has changed."""
        end = min(offset + size, inode.size)
        if offset < 0 or offset >= end:
            return b""
        return self._unpacker.pread(self._members[inode.number], end - offset, offset)

    def try_pread(self, inode: Inode, size: int, offset: int) -> bytes | None:
        """Return what :meth:`pread` returns, or None if it must decompress, or read for a CRC, much. EIO."""
        end = min(offset + size, inode.size)
        if 0 <= offset < end and self._unpacker.is_long(self._members[inode.number], end - offset, offset):
            return None
        return self.pread(inode, size, offset)

    def shrink(self) -> None:
        """Drop all decompressed data."""
        self._unpacker.shrink()

    def target(self, inode: Inode) -> bytes:
        """Return the target of a symbolic link. EIO."""
        target = self.pread(inode, inode.size, 0)
        if b"\0" in target:
            raise os_error(errno.EIO)
        return target


def _fields(extra: bytes) -> dict[int, bytes]:
    """Return the extra fields of a member by their kinds, up to the first invalid one."""
    found, at = {}, 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if at + 4 + length > len(extra):
            break
        found[kind] = extra[at + 4 : at + 4 + length]
        at += 4 + length
    return found


def _name(entry: _Entry) -> str:
    """Decode a path as Info-ZIP's unzip does. One from DOS has its charset, and may have backslashes."""
    raw = entry.raw_name
    unicode = entry.extra.get(_UNICODE_PATH, b"")
    if unicode[:1] == b"\1" and unicode[1:5] == Unpacker.crc(raw):
        return unicode[5:].decode(*NAMES)
    is_dos = entry.host in {_FAT, _NTFS, _VFAT}
    name = raw.decode(*NAMES) if entry.flags & _UTF8 or not is_dos else raw.decode("cp437")
    return name.replace("\\", "/") if is_dos and "/" not in name else name


def _mode(entry: _Entry, *, is_directory: bool) -> int:
    mode = entry.external >> 16
    if not mode:  # DOS's attributes
        is_directory = is_directory or bool(entry.external & 0x10)
        mode = 0o755 if is_directory else 0o644
        mode &= ~0o222 if entry.external & 1 else ~0
    if is_directory or stat.S_ISDIR(mode):
        return stat.S_IFDIR | mode & 0o7777
    if stat.S_ISLNK(mode):
        return stat.S_IFLNK | 0o777
    return mode if stat.S_IFMT(mode) else stat.S_IFREG | mode


def _owner(field: bytes) -> tuple[int, int]:
    """Return user and group; those of root if the archive has none."""
    if len(field) < 3 or field[0] != 1 or len(field) < 3 + field[1]:
        return 0, 0
    uid = int.from_bytes(field[2 : 2 + field[1]], "little")
    at = 2 + field[1]
    gid = int.from_bytes(field[at + 1 : at + 1 + field[at]], "little")
    return uid & 0xFFFFFFFF, gid & 0xFFFFFFFF


def _nanoseconds(entry: _Entry) -> int:
    """Return the mtime in ns since the epoch. One from DOS, which has no time zone, is taken for UTC."""
    times = entry.extra.get(_TIMES, b"")
    if len(times) >= 5 and times[0] & 1:
        return int.from_bytes(times[1:5], "little", signed=True) * 1_000_000_000
    ntfs = entry.extra.get(_NTFS_TIMES, b"")
    if len(ntfs) >= 16 and ntfs[4:8] == b"\1\0\x18\0":
        return (int.from_bytes(ntfs[8:16], "little") - _1601 * 10_000_000) * 100
    date, time = entry.date, entry.time
    year, month, day = 1980 + (date >> 9), date >> 5 & 15, date & 31
    if not 1 <= month <= 12 or not 1 <= day <= 31:
        return 0
    clock = (time >> 11, time >> 5 & 63, (time & 31) * 2)
    return calendar.timegm((year, month, day, *clock)) * 1_000_000_000
