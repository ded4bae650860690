"""An index of an ISO 9660 image, from Rock Ridge, else from Joliet, else from the plain names.

Layout: ECMA-119; SUSP 1.12 and RRIP 1.12 (IEEE P1281, P1282). Images are untrusted, so names, counts, sizes
and positions are checked, and no directory is read twice.
"""

from __future__ import annotations

import calendar
import hashlib
import os
import re
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from cowfs.errors import LayerError
from cowfs.formats.archive import NAMES, Inode, Tree
from cowfs.formats.squashfs.source import Bytes

MAGIC_AT, MAGIC = 0x8001, b"CD001"
_SECTOR = 2048
_FIRST_DESCRIPTOR, _MOST_DESCRIPTORS = 16, 64
_PRIMARY, _SUPPLEMENTARY, _LAST = 1, 2, 255
_BLOCK_SIZE_AT, _ROOT_AT, _ESCAPES = 128, 156, slice(88, 91)
_JOLIET = {b"%/@", b"%/C", b"%/E"}
_RECORD = struct.Struct("<BBI4xI4x7sBBB4xB")
"""length, sectors of attributes, block, bytes, date, flags, unit, gap, bytes of the name."""
_DIRECTORY, _ASSOCIATED, _GOES_ON = 0x02, 0x04, 0x80
_LONGEST_LISTING = 64 << 20
_LONGEST_NAME = 1024
_MOST_CONTINUED = 64
"""The limit of continuation areas of one record."""
_LONG_TIME = re.compile(rb"([0-9]{4})([0-9]{2})([0-9]{2})([0-9]{2})([0-9]{2})([0-9]{2})[0-9]{2}")


@dataclass(slots=True)
class _Record:
    """A directory record: what a directory contains about a file."""

    name: bytes
    block: int
    size: int
    date: bytes
    flags: int
    use: bytes
    """The system use field."""
    mode: int = 0
    uid: int = 0
    gid: int = 0
    serial: int = 0
    """The serial number of the inode; 0 if there is none."""
    device: int = 0
    longer: bytes = b""
    """The name from Rock Ridge."""
    target: list[bytes] = field(default_factory=list)
    mtime_ns: int | None = None
    child: int = 0
    """The block of the directory, if that was relocated."""
    is_moved: bool = False
    is_interleaved: bool = False


def is_iso9660(start: bytes) -> bool:
    """Whether a file that begins with *start* is an ISO 9660 image."""
    return start[MAGIC_AT : MAGIC_AT + len(MAGIC)] == MAGIC


class Image(Tree):
    """The index of an ISO 9660 image, and its bytes. Any thread may read from it."""

    def __init__(self, data: Bytes, name: str) -> None:
        """Read all directories. The image closes *data*. Blocks; LayerError, OSError."""
        super().__init__(data, name)
        self._digest = hashlib.sha256()
        self._left = self._size = data.size
        self._skip = 0
        self._linked: dict[tuple[int, int, int], Inode] = {}
        descriptor, self._is_joliet = self._find_volume()
        (self._block_size,) = struct.unpack_from("<H", descriptor, _BLOCK_SIZE_AT)
        if self._block_size not in {512, 1024, 2048}:
            raise self._damaged(f"blocks of {self._block_size} bytes")
        self._digest.update(descriptor)
        root = _record(descriptor[_ROOT_AT : _ROOT_AT + 34])
        self._seen = {root.block}
        waiting = [(self.root, root)]
        while waiting:
            directory, record = waiting.pop()
            waiting.extend(self._fill(directory, record))
        self.fingerprint = self._digest.hexdigest()

    def _damaged(self, what: str) -> LayerError:
        return LayerError(f"{self.name}: damaged ISO 9660 image: {what}", "download or copy it again")

    def _read(self, size: int, at: int) -> bytes:
        found = b""
        while len(found) < size and (piece := self.data.pread(size - len(found), at + len(found))):
            found += piece
        if len(found) < size:
            raise self._damaged(f"truncated: it has {self._size} bytes")
        return found

    def _find_volume(self) -> tuple[bytes, bool]:
        """Return the volume descriptor to use, and whether it is Joliet's."""
        primary, joliet = b"", b""
        for number in range(_MOST_DESCRIPTORS):
            sector = self._read(_SECTOR, (_FIRST_DESCRIPTOR + number) * _SECTOR)
            if sector[1:6] != MAGIC or sector[0] == _LAST:
                break
            if sector[0] == _PRIMARY and not primary:
                primary = sector
            elif sector[0] == _SUPPLEMENTARY and sector[_ESCAPES] in _JOLIET and not joliet:
                joliet = sector
        if not primary:
            raise self._damaged("no primary volume")
        (block_size,) = struct.unpack_from("<H", primary, _BLOCK_SIZE_AT)
        root = _record(primary[_ROOT_AT : _ROOT_AT + 34])
        start = self._read(_SECTOR, root.block * block_size)
        use = _record(start[: start[0]]).use if start[0] >= _RECORD.size else b""
        if use[:2] == b"SP" and use[4:6] == b"\xbe\xef" and len(use) >= 7:
            self._skip = use[6]
            return primary, False
        self._skip = -1
        return (joliet, True) if joliet else (primary, False)

    def _fill(self, directory: Inode, of_directory: _Record) -> Iterator[tuple[Inode, _Record]]:
        """Add the content of a directory; yield the directories in it."""
        self._left -= of_directory.size
        if of_directory.size > _LONGEST_LISTING:
            raise LayerError(f"{self.name}: has a directory of {of_directory.size} bytes")
        if self._left < 0:
            raise self._damaged("its directories are larger than the image")
        listing = self._read(of_directory.size, of_directory.block * self._block_size)
        self._digest.update(listing)
        segments: list[tuple[int, int, int]] = []
        for number, record in enumerate(self._records(listing)):
            if number < 2:  # the directory itself, and its parent
                if number == 0 and directory is self.root:
                    self._apply(record)
                    self._set_attributes(directory, record, is_directory=True)
                continue
            self._apply(record)
            if record.is_moved or record.flags & _ASSOCIATED:
                continue
            is_directory = bool(record.flags & _DIRECTORY or record.child)
            if not is_directory:
                self._add_segment(segments, record)
                if record.flags & _GOES_ON:
                    continue
            inode = self._add(directory, record, segments, is_directory=is_directory)
            segments = []
            if is_directory:
                inner = self._inner(record)
                if inner.block in self._seen:
                    raise self._damaged(f"the directory {os.fsdecode(record.name)!r} is in it twice")
                self._seen.add(inner.block)
                yield inode, inner

    def _inner(self, record: _Record) -> _Record:
        """Return the record of a directory. If that was relocated, its size is in its own first record."""
        if not record.child:
            return record
        start = self._read(_RECORD.size + 1, record.child * self._block_size)
        return _record(start)

    def _records(self, listing: bytes) -> Iterator[_Record]:
        at = 0
        while at < len(listing):
            length = listing[at]
            if not length:  # no record crosses a sector
                at = (at // _SECTOR + 1) * _SECTOR
                continue
            if length < _RECORD.size or at + length > len(listing):
                raise self._damaged(f"a record of {length} bytes in a directory")
            yield _record(listing[at : at + length])
            at += length

    def _add_segment(self, segments: list[tuple[int, int, int]], record: _Record) -> None:
        start = segments[-1][0] + segments[-1][1] if segments else 0
        place = record.block * self._block_size
        if record.is_interleaved:
            raise LayerError(
                f"{self.name}: {os.fsdecode(record.name)!r} is interleaved, which cowfs does not support"
            )
        if record.size:
            if place + record.size > self._size:
                raise self._damaged(f"truncated: it ends before {os.fsdecode(record.name)!r} does")
            segments.append((start, record.size, place))

    def _add(
        self, directory: Inode, record: _Record, segments: list[tuple[int, int, int]], *, is_directory: bool
    ) -> Inode:
        name = self._name(record)
        parts = self._parts(name.decode(*NAMES))
        if parts != [name]:
            raise LayerError(f"{self.name}: has a member of the name {name!r}, which no file can have here")
        is_file = not is_directory and stat.S_IFMT(record.mode) in {0, stat.S_IFREG}
        same = (record.serial, record.block, record.size)
        inode = self._linked.get(same) if is_file and record.serial else None
        if inode is not None:
            inode.nlink += 1
            self._put(directory, name, inode)
            return inode
        inode = self._new(0)
        self._set_attributes(inode, record, is_directory=is_directory)
        if is_directory:
            inode.nlink = 2
        elif is_file:
            inode.segments = segments
            inode.size = sum(length for _, length, _ in segments)
            if record.serial:
                self._linked[same] = inode
        elif stat.S_ISLNK(record.mode):
            inode.target = b"".join(record.target)
            inode.size = len(inode.target)
            if not 0 < inode.size < 4096 or b"\0" in inode.target:
                raise LayerError(f"{self.name}: {name!r} is a symbolic link of {inode.size} bytes")
        else:
            inode.rdev = record.device
        self._put(directory, name, inode)
        return inode

    def _name(self, record: _Record) -> bytes:
        if record.longer:
            return record.longer
        if self._is_joliet:
            return re.sub(";1$", "", record.name.decode("utf-16-be", "replace")).encode(*NAMES)
        return re.sub(rb"\.?(;[0-9]+)?$", b"", record.name, count=1).lower()

    def _set_attributes(self, inode: Inode, record: _Record, *, is_directory: bool) -> None:
        kind = stat.S_IFDIR if is_directory else stat.S_IFMT(record.mode) or stat.S_IFREG
        if record.mode:
            inode.mode = kind | stat.S_IMODE(record.mode)
        else:
            inode.mode = kind | (0o755 if is_directory else 0o644)
        inode.uid, inode.gid = record.uid, record.gid
        inode.mtime_ns = _short_time(record.date) if record.mtime_ns is None else record.mtime_ns

    # --- Rock Ridge

    def _apply(self, record: _Record) -> None:
        """Apply the system use field of a record, and its continuation areas."""
        if self._skip < 0:
            return
        use, areas = record.use[self._skip if record.name != b"\0" else 0 :], 0
        target_goes_on = False
        while use:
            following = b""
            for sign, data in _fields(use):
                if sign == b"CE" and len(data) >= 24:
                    areas += 1
                    block, offset, length = struct.unpack_from("<I4xI4xI", data)
                    self._left -= length
                    if areas > _MOST_CONTINUED or length > 1 << 16 or self._left < 0:
                        raise self._damaged("one record has too many continuation areas")
                    following = self._read(length, block * self._block_size + offset)
                    self._digest.update(following)
                elif sign == b"SL":
                    target_goes_on = _add_target(record.target, data, goes_on=target_goes_on)
                elif sign in {b"ZF", b"SF"}:
                    what = "compressed (zisofs)" if sign == b"ZF" else "a sparse file of Rock Ridge"
                    raise LayerError(
                        f"{self.name}: {os.fsdecode(record.name)!r} is {what}, which cowfs does not support",
                        "mount it: mount -o loop,ro FILE DIR",
                    )
                else:
                    _apply_field(record, sign, data)
                if len(record.longer) > _LONGEST_NAME:
                    raise self._damaged("a name is too long")
            use = following


def _record(data: bytes) -> _Record:
    if len(data) < _RECORD.size:
        return _Record(b"", 0, 0, bytes(7), 0, b"")
    _, attributes, block, size, date, flags, unit, gap, length = _RECORD.unpack_from(data)
    name = data[_RECORD.size : _RECORD.size + length]
    use = data[_RECORD.size + length + (length + 1) % 2 :]
    return _Record(name, block + attributes, size, date, flags, use, is_interleaved=bool(unit or gap))


def _fields(use: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at + 4 <= len(use) and 4 <= use[at + 2] <= len(use) - at:
        sign = use[at : at + 2]
        if sign == b"ST":
            return
        yield sign, use[at + 4 : at + use[at + 2]]
        at += use[at + 2]


def _apply_field(record: _Record, sign: bytes, data: bytes) -> None:
    if sign == b"PX" and len(data) >= 32:
        record.mode, _, record.uid, record.gid = struct.unpack_from("<I4xI4xI4xI", data)
        record.serial = struct.unpack_from("<I", data, 32)[0] if len(data) >= 40 else 0
    elif sign == b"PN" and len(data) >= 16:
        high, low = struct.unpack_from("<I4xI", data)
        if not high and low > 0xFF:  # as the kernel decodes it
            high, low = low >> 8, low & 0xFF
        record.device = os.makedev(high & 0xFFF, low & 0xFFFFF)
    elif sign == b"NM" and data and not data[0] & 6:
        record.longer += data[1:]
    elif sign == b"TF" and data:
        record.mtime_ns = _modified(data)
    elif sign == b"CL" and len(data) >= 4:
        (record.child,) = struct.unpack_from("<I", data)
    elif sign == b"RE":
        record.is_moved = True


def _add_target(target: list[bytes], data: bytes, *, goes_on: bool) -> bool:
    """Add the components of a field to a target; return whether the last one continues in the next field."""
    at = 1
    while at + 2 <= len(data):
        flags, length = data[at], data[at + 1]
        if target and not goes_on and target[-1] != b"/":
            target.append(b"/")
        text = {2: b".", 4: b"..", 8: b"/"}.get(flags & 14, data[at + 2 : at + 2 + length])
        target.append(text)
        goes_on = bool(flags & 1)
        at += 2 + length
    return goes_on


def _modified(data: bytes) -> int | None:
    """Return the mtime in a TF field, in ns since the epoch; None if it has none."""
    flags = data[0]
    if not flags & 2:
        return None
    size = 17 if flags & 0x80 else 7
    stamp = data[1 + size * (flags & 1) :][:size]
    if size == 7:
        return _short_time(stamp)
    found = _LONG_TIME.match(stamp)
    if not found or len(stamp) < size:
        return None
    return _nanoseconds([int(part) for part in found.groups()], stamp[16])


def _short_time(stamp: bytes) -> int:
    if len(stamp) < 7:
        return 0
    return _nanoseconds([1900 + stamp[0], *stamp[1:6]], stamp[6])


def _nanoseconds(parts: list[int], zone: int) -> int:
    """Return a time in ns since the epoch; 0 if invalid. *zone* is a signed byte: quarter hours from UTC."""
    if not 1 <= parts[1] <= 12 or not 1 <= parts[2] <= 31 or parts[0] < 1:
        return 0
    quarters = zone - 256 if zone > 127 else zone
    return (calendar.timegm((*parts, 0, 0, 0)) - quarters * 900) * 1_000_000_000
