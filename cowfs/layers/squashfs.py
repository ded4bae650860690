"""A squashfs image as a lower layer, read in-process: no privilege, no mount, no loop device.

Keys are references of inodes: integers, of which nothing needs to be remembered.
"""

from __future__ import annotations

import errno
import itertools
import os
import struct
import threading
import zlib
from array import array
from collections.abc import Iterator
from datetime import UTC, datetime

from cowfs.formats.squashfs.copy import copy
from cowfs.formats.squashfs.data import FileData
from cowfs.formats.squashfs.directory import type_of
from cowfs.formats.squashfs.image import CACHE_BYTES, image_in, open_image
from cowfs.formats.squashfs.inodes import Inode
from cowfs.formats.squashfs.source import Bytes
from cowfs.formats.squashfs.summary import summary
from cowfs.layers.base import File, NamesJob
from cowfs.types import Attr, AttrData, DirEntry, FileHandle, FsStats, Identity

_FILEID_INO32_GEN = 1
"""The kernel's type of a handle that is an inode number and a generation (linux/exportfs.h)."""
_HANDLE = struct.Struct("<II")

_NAME_MAX = 256
"""SQUASHFS_NAME_LEN of the kernel's fs/squashfs/squashfs_fs.h; the VFS allows 255 anyway."""
_devices = itertools.count(1)
_FIRST_DEVICE = 1 << 40
"""Device numbers of layers that the kernel knows nothing of begin here: the kernel's have 32 bits."""


def new_device() -> int:
    """Return a device number that no other layer has."""
    return _FIRST_DEVICE + next(_devices)


class SquashfsFile:
    """An open file of an image: a :class:`cowfs.layers.base.File`. All methods from any thread."""

    __slots__ = ("_attr", "_data")

    def __init__(self, data: FileData, attr: AttrData) -> None:
        self._data = data
        self._attr = attr

    def pread(self, size: int, offset: int) -> bytes:
        """Up to *size* bytes at *offset*. May block; EIO where the image is damaged."""
        return self._data.pread(size, offset)

    def try_pread(self, size: int, offset: int) -> bytes | None:
        """The same, but None where it takes longer than half a millisecond: for a thread to do."""
        return self._data.try_pread(size, offset)

    def pwrite(self, data: bytes, offset: int) -> int:
        raise _error(errno.EBADF)

    def truncate(self, size: int) -> None:
        raise _error(errno.EBADF)

    def fsync(self, datasync: bool) -> None:
        """Nothing is ever dirty."""

    def stat(self) -> Attr:
        return self._attr

    def segments(self, end: int, start: int = 0) -> Iterator[tuple[int, int]]:
        """What is stored; holes are the blocks that mksquashfs found to be zeros. May block; EIO."""
        return self._data.segments(end, start)

    def fileno(self) -> int:
        return -1

    def copy_to(self, target: File, size: int | None = None) -> None:
        """Copy the first *size* bytes, or all, to the new empty file *target*; holes stay holes.

        Blocks. *target* is given its size first. Large files are decompressed and written by several
        threads, in pieces of about 1 MiB of which a few are under way at a time. Raises EIO where the
        image is damaged and whatever writing raises; the caller then throws *target* away.
        """
        size = self._data.size if size is None else min(size, self._data.size)
        target.truncate(size)
        fd = target.fileno()

        def write(parts: list[bytes], offset: int) -> None:
            if fd >= 0:
                _write(fd, parts, offset)
            else:
                target.pwrite(parts[0] if len(parts) == 1 else b"".join(parts), offset)

        copy(self._data, size, write)

    def close(self) -> None:
        """Nothing to release: the image stays open."""


class _Numbers:
    """Inode numbers that are each of one inode, whatever the maker of the image did.

    To the union one number is one inode. A second inode with a number that is taken gets one above the
    32 bits that the format has: another one at the next mount, if it is then met first.
    """

    __slots__ = ("_lock", "_more", "_others", "_owners")

    def __init__(self) -> None:
        # Reference + 1 of the inode that has the number, 64 numbers at a time: 11 bytes for each.
        self._owners: dict[int, array[int]] = {}
        self._others: dict[int, int] = {}
        self._more: dict[int, int] = {}
        self._lock = threading.Lock()

    def of(self, inode: Inode) -> int:
        """The number of *inode*: its own if it was the first to have it."""
        number, owner = inode.number, inode.ref + 1
        owners = self._owners.get(number >> 6)
        if owners is not None and owners[number & 63] == owner:
            return number
        with self._lock:
            return self._given(number, owner)

    def _given(self, number: int, owner: int) -> int:
        owners = self._owners.get(number >> 6)
        if owners is None:
            owners = self._owners[number >> 6] = array("Q", bytes(8 * 64))
        known = owners[number & 63]
        if known == owner:
            return number
        if not known:
            owners[number & 63] = owner
            return number
        other = self._others.get(owner)
        if other is None:
            more = self._more[number] = self._more.get(number, 0) + 1
            other = self._others[owner] = number | more << 32
        return other


class SquashfsLayer:
    """Serve the image at *path* as a :class:`cowfs.layers.base.LowerLayer`. Any thread may read from it."""

    waits = False
    has_descriptors = False
    data_only = False

    def __init__(
        self, path: str, *, offset: int = 0, cache_bytes: int = CACHE_BYTES, data: Bytes | None = None
    ) -> None:
        """Open the image that begins *offset* bytes into the file, or into *data* of it; reads little.

        :class:`cowfs.errors.LayerError` says why an image cannot be used. *cache_bytes* bounds the
        decompressed data that is kept.
        """
        if data is None:
            self._image = open_image(path, offset, cache_bytes)
        else:
            self._image = image_in(data, path, offset, cache_bytes)
        self._path = path
        self.source = self._image.source
        self.name = self.source.name
        self.root = self._image.root
        self.dev = new_device()
        self._block_size = self._image.superblock.block_size
        self._numbers = _Numbers()
        # What was asked for last, key and answer: a copy-up, or a removal, asks several times.
        self._last = -1, AttrData(0, 0)
        self.generation: int | None = zlib.crc32(self._image.superblock.raw)

    def lookup(self, directory: int, name: bytes) -> tuple[int, Attr] | None:
        """Find *name*; None when it is not there. ENOTDIR, ENAMETOOLONG; EIO where damaged or not a tree."""
        if len(name) >= _NAME_MAX:
            raise _error(errno.ENAMETOOLONG)
        inode = self._image.lookup(directory, name)
        return None if inode is None else (inode.ref, self._attr(inode))

    def stat(self, key: int) -> Attr:
        last, attr = self._last
        if last != key:
            attr = self._attr(self._image.inode(key))
            self._last = key, attr
        return attr

    def _attr(self, inode: Inode) -> AttrData:
        time = inode.mtime * 1_000_000_000
        return AttrData(
            inode.mode,
            self._numbers.of(inode),
            self.dev,
            inode.nlink,
            inode.uid,
            inode.gid,
            inode.rdev,
            inode.size,
            inode.blocks,
            self._block_size,
            time,
            time,
            time,
        )

    def readdir(self, directory: int) -> list[DirEntry]:
        """All entries, in the order of their names. ENOTDIR, EIO."""
        listing = self._image.listing(directory)
        return [DirEntry(name, type_of(value)) for name, value in listing.items()]

    def names(self, directory: int) -> list[bytes] | NamesJob:
        """The names alone. ENOTDIR, EIO."""
        if self._image.is_long(directory):
            return lambda: list(self._image.listing(directory))
        return list(self._image.listing(directory))

    def readlink(self, key: int) -> bytes:
        return self._image.target(key)

    def listxattr(self, key: int) -> list[bytes]:
        return self._image.xattr_names(key)

    def getxattr(self, key: int, name: bytes) -> bytes:
        return self._image.xattr(key, name)

    def open(self, key: int, flags: int) -> SquashfsFile:
        """Open a regular file for reading. EROFS for any other access; EISDIR, EINVAL for any other type."""
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise _error(errno.EROFS)
        data = self._image.data(key)
        return SquashfsFile(data, self._attr(data.inode))

    def statfs(self) -> FsStats:
        """As the kernel's squashfs: everything used, nothing free."""
        sb = self._image.superblock
        blocks = ((sb.bytes_used - 1) >> sb.block_log) + 1
        return FsStats(sb.block_size, sb.block_size, blocks, 0, 0, sb.inodes, 0, 0, 256)

    def handle(self, key: int) -> FileHandle | None:
        """What the kernel's squashfs gives: the inode number. It does so if the image is exportable.

        None where another inode has the number.
        """
        inode = self._image.inode(key)
        if self._numbers.of(inode) != inode.number:
            return None
        return FileHandle(_FILEID_INO32_GEN, _HANDLE.pack(inode.number, 0), place=b"%d" % key)

    def handle_ino(self, handle: FileHandle) -> int | None:
        if handle.type != _FILEID_INO32_GEN or len(handle.data) != _HANDLE.size or any(handle.uuid):
            return None
        number, generation = _HANDLE.unpack(handle.data)
        last = self._image.superblock.last_number
        return number if not generation and 0 < number <= last else None

    def identity(self) -> Identity:
        """What the image is recognised by at the next mount. Reads all its tables once."""
        sb = self._image.superblock
        made = datetime.fromtimestamp(sb.mkfs_time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        description = f"{sb.compression} squashfs of {made}, {sb.inodes} inodes, {sb.bytes_used} bytes"
        return Identity("squashfs", self._image.fingerprint(), description, self._path)

    def summary(self) -> list[tuple[str, str]]:
        """(what, value) of what the image says of itself, as ``unsquashfs -s`` shows it. EIO."""
        return summary(self._image)

    def shrink(self) -> None:
        """Forget what can be read again."""
        self._image.shrink()

    def caches(self) -> dict[str, tuple[int, int]]:
        """How often a block was there decompressed when it was needed, and how often not, by its kind."""
        return self._image.caches()

    def forget(self, key: int) -> None:
        """Nothing is remembered of a key."""

    def close(self) -> None:
        self._image.close()


def _write(fd: int, parts: list[bytes], offset: int) -> None:
    """Write all of *parts* one after the other, from *offset* on."""
    left = [memoryview(part) for part in parts]
    while left:
        written = os.pwritev(fd, left[:_VECTORS], offset)
        offset += written
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if left:
            left[0] = left[0][written:]


_VECTORS = min(os.sysconf("SC_IOV_MAX"), 1024)


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))
