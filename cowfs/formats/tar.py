"""An index of an uncompressed tar archive. Nothing is unpacked.

Python's tarfile reads the headers: V7, ustar, pax and GNU's, with sparse files, xattrs (SCHILY.xattr) and
ACLs (SCHILY.acl). Archives are untrusted, so names, counts, sizes and positions are checked.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tarfile
from collections.abc import Iterator
from typing import Any, cast

from cowfs.errors import LayerError
from cowfs.formats.acl_text import from_text
from cowfs.formats.archive import MOST_MEMBERS, NAMES, Inode, Tree
from cowfs.formats.squashfs.recognise import is_old_tar
from cowfs.formats.squashfs.source import Bytes

_LONGEST_HEADER = 16 << 20
"""The limit of the headers of one member in bytes, with its xattrs, name and sparse map."""
_MOST_FOR_ALL = 1000
"""The limit of records in pax's global headers, which apply to each later member."""
_XATTR = "SCHILY.xattr."
_ACLS = {"SCHILY.acl.access": b"system.posix_acl_access", "SCHILY.acl.default": b"system.posix_acl_default"}
_AHEAD = 64 << 10
_TIME = re.compile(r"(-?)([0-9]{1,10})(?:\.([0-9]+))?")
_MOST_SECONDS = 9_000_000_000
_MAJOR, _MINOR = (1 << 12) - 1, (1 << 20) - 1  # linux/kdev_t.h
_LONGEST_XATTR_NAME, _LONGEST_XATTR = 255, 64 << 10  # linux/limits.h: XATTR_NAME_MAX, XATTR_SIZE_MAX


def is_tar(start: bytes) -> bool:
    """Whether a file that begins with *start* is a tar archive: ustar, pax, GNU, or without a magic (V7)."""
    return start[257:262] == b"ustar" or is_old_tar(start)


class Archive(Tree):
    """The index of a tar archive, and its data. Any thread may read from it."""

    def __init__(self, data: Bytes, name: str) -> None:
        """Read all headers. The archive closes *data*. Blocks; LayerError, OSError."""
        super().__init__(data, name)
        self._size = data.size
        self._xattr_bytes = 0
        digest = hashlib.sha256()
        try:
            for count, member in enumerate(_members(data)):
                if count >= MOST_MEMBERS:
                    raise LayerError(f"{name}: has more than {MOST_MEMBERS} members")
                inode = self._add(member)
                digest.update(repr((member.name, *_facts(inode))).encode(*NAMES))
        except (tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError) as error:
            raise LayerError(f"{name}: damaged tar archive: {error}") from None
        self.fingerprint = digest.hexdigest()

    def _add(self, member: tarfile.TarInfo) -> Inode:
        parts = self._parts(member.name)
        if not parts:
            if member.isdir():
                self._set_attributes(self.root, member)
            return self.root
        directory = self._directory(parts[:-1])
        known = directory.children.get(parts[-1])
        if member.isdir() and known is not None and stat.S_ISDIR(known.mode):
            self._set_attributes(known, member)
            return known
        inode = self._linked(member) if member.islnk() else self._made(member)
        if known is not inode:
            self._put(directory, parts[-1], inode)
        return inode

    def _linked(self, member: tarfile.TarInfo) -> Inode:
        *way, last = self._parts(member.linkname) or [b""]
        found = self._directory(way).children.get(last)
        if found is None or stat.S_ISDIR(found.mode):
            raise LayerError(f"{self.name}: {member.name!r} links to a missing file: {member.linkname!r}")
        found.nlink += 1
        return found

    def _made(self, member: tarfile.TarInfo) -> Inode:
        inode = self._new(0)
        if member.isdir():
            inode.mode, inode.nlink = stat.S_IFDIR, 2
        elif member.issym():
            inode.mode = stat.S_IFLNK
            inode.target = member.linkname.encode(*NAMES)
            inode.size = len(inode.target)
            if not 0 < inode.size < 4096:
                raise LayerError(f"{self.name}: {member.name!r} is a symbolic link of {inode.size} bytes")
            if b"\0" in inode.target:
                raise LayerError(f"{self.name}: {member.name!r} is a symbolic link with a NUL in its target")
        elif member.isfifo():
            inode.mode = stat.S_IFIFO
        elif member.isdev():
            inode.mode = stat.S_IFCHR if member.ischr() else stat.S_IFBLK
            if not (0 <= member.devmajor <= _MAJOR and 0 <= member.devminor <= _MINOR):
                raise LayerError(f"{self.name}: {member.name!r} is a device that cannot be")
            inode.rdev = os.makedev(member.devmajor, member.devminor)
        else:
            inode.mode, inode.size = stat.S_IFREG, member.size
            inode.segments = self._segments(member)
        self._set_attributes(inode, member)
        return inode

    def _segments(self, member: tarfile.TarInfo) -> list[tuple[int, int, int]]:
        sparse: list[tuple[int, int]] | None = cast(Any, member).sparse
        pieces = [(0, member.size)] if sparse is None else sparse
        segments, place, end = [], member.offset_data, 0
        if not 0 <= member.size < 1 << 63:
            raise LayerError(f"{self.name}: {member.name!r} has {member.size} bytes")
        for start, length in pieces:
            if not length:  # also the unused entries of the four in a header of GNU tar
                continue
            if start < end or length < 0 or start + length > member.size:
                raise LayerError(f"{self.name}: {member.name!r} has a damaged sparse map")
            segments.append((start, length, place))
            place, end = place + length, start + length
        if place > self._size:
            raise LayerError(f"{self.name}: truncated tar archive: ends before {member.name!r} does")
        return segments

    def _set_attributes(self, inode: Inode, member: tarfile.TarInfo) -> None:
        inode.mode = stat.S_IFMT(inode.mode) | (0o777 if member.issym() else member.mode & 0o7777)
        inode.uid, inode.gid = member.uid & 0xFFFFFFFF, member.gid & 0xFFFFFFFF
        inode.mtime_ns = _nanoseconds(member)
        inode.xattrs = self._xattrs(member)

    def _xattrs(self, member: tarfile.TarInfo) -> dict[bytes, bytes]:
        """Return the xattrs of a member. LayerError for those that no file can have."""
        found = {
            key.removeprefix(_XATTR).encode(*NAMES): text.encode(*NAMES)
            for key, text in member.pax_headers.items()
            if key.startswith(_XATTR)
        }
        for key, attribute in _ACLS.items():
            value = from_text(member.pax_headers[key]) if key in member.pax_headers else None
            if value is not None and not member.issym():
                found.setdefault(attribute, value)
        for name, value in found.items():
            is_name = 0 < len(name) <= _LONGEST_XATTR_NAME and b"\0" not in name
            if not is_name or len(value) > _LONGEST_XATTR:
                raise LayerError(
                    f"{self.name}: {member.name!r} has an extended attribute that no file can have"
                )
            self._xattr_bytes += len(name) + len(value)
        if self._xattr_bytes > self._size:  # a global one would be stored for each member
            raise LayerError(f"{self.name}: has more bytes of extended attributes than the archive itself")
        return found


def _facts(inode: Inode) -> tuple[object, ...]:
    what = (inode.mode, inode.uid, inode.gid, inode.mtime_ns, inode.size, inode.rdev, inode.target)
    return (*what, inode.segments, sorted(inode.xattrs.items()), inode.number)


def _nanoseconds(member: tarfile.TarInfo) -> int:
    """Return the mtime in ns since the epoch; 0 if it is invalid or does not fit in 64 bits."""
    exact = _TIME.fullmatch(member.pax_headers.get("mtime", ""))
    if exact:
        time = int(exact[2]) * 1_000_000_000 + int((exact[3] or "").ljust(9, "0")[:9])
        if int(exact[2]) >= _MOST_SECONDS:
            return 0
        return -time if exact[1] else time
    return int(member.mtime) * 1_000_000_000 if abs(member.mtime) < _MOST_SECONDS else 0


def _members(data: Bytes) -> Iterator[tarfile.TarInfo]:
    stream = _Stream(data)
    with tarfile.open(fileobj=stream, mode="r:", encoding=NAMES[0], errors=NAMES[1]) as archive:  # type: ignore[call-overload]
        while (member := archive.next()) is not None:
            if len(archive.pax_headers) > _MOST_FOR_ALL:
                raise tarfile.ReadError(f"{len(archive.pax_headers)} records in global headers")
            yield member
            archive.members.clear()  # tarfile would keep them all
            stream.left = _LONGEST_HEADER
        end = data.pread(tarfile.BLOCKSIZE, archive.offset)
        if end.strip(b"\0"):  # tarfile takes an invalid header for the end
            raise tarfile.ReadError(f"no header at {archive.offset:#x}")


class _Stream:
    """The archive as a file for tarfile, with a limit for each header."""

    def __init__(self, data: Bytes) -> None:
        self._data = data
        self._at = 0
        self._begin, self._piece = 0, b""
        self.left = _LONGEST_HEADER
        """The limit of the headers of the next member in bytes."""

    def read(self, size: int) -> bytes:
        """Return *size* bytes, fewer at the end."""
        if not 0 <= self._at <= self._data.size:
            raise tarfile.ReadError(f"a header at byte {self._at}")
        if not 0 <= size <= self.left:
            raise tarfile.ReadError(f"a header of more than {_LONGEST_HEADER} bytes")
        self.left -= size
        start = self._at - self._begin
        if start < 0 or start + size > len(self._piece):
            self._begin, self._piece = self._at, self._data.pread(max(size, _AHEAD), self._at)
            start = 0
        found = self._piece[start : start + size]
        self._at += len(found)
        return found

    def seek(self, place: int) -> None:
        """Set the position in bytes."""
        self._at = place

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._at
