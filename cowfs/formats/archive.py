"""The tree of an archive. Archives are untrusted, so names and counts are checked."""

from __future__ import annotations

import errno
import os
import stat
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field

from cowfs.errors import LayerError
from cowfs.formats.squashfs.source import Bytes

MOST_MEMBERS = 4_000_000
"""The limit of members, and of inodes, which include directories that are only part of other paths."""
NAMES = ("utf-8", "surrogateescape")
"""How strings encode the bytes of names and values, without loss."""
_LONGEST_PATH = 64 << 10
_UNNAMED, _BYTES_EACH = 1000, 32
"""How many directories may have no member of their own: so many, and one for so many bytes of the archive."""
_NAME_MAX = 255


@dataclass(slots=True, eq=False)
class Inode:
    """A file, a directory or whatever else an archive has. It is equal to itself alone, and can be a key."""

    number: int
    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    rdev: int = 0
    nlink: int = 1
    target: bytes = b""
    segments: list[tuple[int, int, int]] = field(default_factory=list)
    """The stored parts of a file, in order: offset in the file, number of bytes, offset in the archive."""
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    children: dict[bytes, Inode] = field(default_factory=dict)
    _bytes: int = -1

    def bytes_stored(self) -> int:
        """The number of bytes stored in the archive. The segments must not change after the first call."""
        if self._bytes < 0:
            self._bytes = sum(length for _, length, _ in self.segments)
        return self._bytes

    def stored(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield the segments that overlap a range of the file. A file may have millions of segments."""
        at = max(bisect_left(self.segments, (start,)) - 1, 0)
        while at < len(self.segments) and self.segments[at][0] < end:
            begin, length, _ = self.segments[at]
            if begin + length > start:
                yield self.segments[at]
            at += 1


class Tree:
    """The inodes of an archive, and their data. Any thread may read from it."""

    fingerprint: str
    """SHA-256 of the content of all headers."""

    def __init__(self, data: Bytes, name: str) -> None:
        """The tree closes *data*. *name* is for messages."""
        self.data = data
        self.name = name
        self.root = Inode(1, stat.S_IFDIR | 0o755, nlink=2)
        self.inodes = 1
        self._unnamed = _UNNAMED + data.size // _BYTES_EACH

    def pread(self, inode: Inode, size: int, offset: int) -> bytes:
        """Return up to *size* bytes of a file. May block. EIO if the archive is damaged or was truncated."""
        end = min(offset + size, inode.size)
        if offset < 0 or offset >= end:
            return b""
        found = bytearray(end - offset)
        for start, length, place in inode.stored(offset, end):
            first, last = max(start, offset), min(start + length, end)
            while first < last:
                piece = self.data.pread(last - first, place + first - start)
                if not piece:
                    raise OSError(errno.EIO, f"{self.name}: the archive has become shorter")
                found[first - offset : first - offset + len(piece)] = piece
                first += len(piece)
        return bytes(found)

    def try_pread(self, inode: Inode, size: int, offset: int) -> bytes | None:
        """Return what :meth:`pread` returns, or None if that would take long."""
        return self.pread(inode, size, offset)

    def shrink(self) -> None:
        """Drop all cached data that can be read again."""

    def target(self, inode: Inode) -> bytes:
        """Return the target of a symbolic link. EIO."""
        return inode.target

    def _parts(self, name: str) -> list[bytes]:
        if len(name) > _LONGEST_PATH:
            raise LayerError(f"{self.name}: has a path of {len(name)} characters")
        parts = [part for part in name.encode(*NAMES).split(b"/") if part not in {b"", b"."}]
        if any(part == b".." or len(part) > _NAME_MAX or b"\0" in part for part in parts):
            raise LayerError(f"{self.name}: has a member of the name {name!r}, which no file can have here")
        return parts

    def _directory(self, parts: list[bytes]) -> Inode:
        """Return the directory at a path. One without a member belongs to root, with mode 0755."""
        directory = self.root
        for part in parts:
            child = directory.children.get(part)
            if child is None:
                self._unnamed -= 1
                if self._unnamed < 0:
                    raise LayerError(f"{self.name}: the paths in it lead through too many directories")
                child = self._new(stat.S_IFDIR | 0o755)
                child.nlink = 2
                directory.children[part] = child
                directory.nlink += 1
            if not stat.S_ISDIR(child.mode):
                name = os.fsdecode(b"/".join(parts))
                raise LayerError(f"{self.name}: {name!r} is not a directory, but has members")
            directory = child
        return directory

    def _new(self, mode: int) -> Inode:
        if self.inodes >= MOST_MEMBERS:
            raise LayerError(f"{self.name}: has more than {MOST_MEMBERS} files and directories")
        self.inodes += 1
        return Inode(self.inodes, mode)

    def _put(self, directory: Inode, name: bytes, inode: Inode) -> None:
        """Give an inode a name. It replaces an earlier member of that name."""
        known = directory.children.get(name)
        if known is not None:
            known.nlink -= 1
            if stat.S_ISDIR(known.mode):
                directory.nlink -= 1
        directory.children[name] = inode
        if stat.S_ISDIR(inode.mode):
            directory.nlink += 1
