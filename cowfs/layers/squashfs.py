"""A squashfs image as a lower layer, read in-process: no privilege, no mount, no loop device.

Keys are inode references: integers, which need no state.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from cowfs.errors import os_error
from cowfs.formats.squashfs.copy import copy
from cowfs.formats.squashfs.data import FileData
from cowfs.formats.squashfs.directory import type_of
from cowfs.formats.squashfs.image import CACHE_BYTES, image_in, open_image
from cowfs.formats.squashfs.inodes import Inode
from cowfs.formats.squashfs.source import Bytes
from cowfs.formats.squashfs.summary import summary
from cowfs.layers.base import File, NamesJob
from cowfs.layers.read_only import ReadOnlyFile, make_handle, number_in
from cowfs.types import NO_UUID, Attr, AttrData, DirEntry, FileHandle, FsStats, Identity

_NAME_MAX = 256
"""SQUASHFS_NAME_LEN of the kernel's fs/squashfs/squashfs_fs.h; the VFS allows 255 anyway."""
_MANY = 8192
"""Names of a directory that :meth:`SquashfsLayer.pieces` yields at once."""
_devices = itertools.count(1)
_FIRST_DEVICE = 1 << 40
"""Device numbers of layers that the kernel knows nothing of begin here: the kernel's have 32 bits."""


def new_device() -> int:
    """Return a device number that no other layer has."""
    return _FIRST_DEVICE + next(_devices)


class SquashfsFile(ReadOnlyFile):
    """An open file of an image: a :class:`cowfs.layers.base.File`. All methods from any thread."""

    __slots__ = ("_data",)

    def __init__(self, data: FileData, attr: AttrData) -> None:
        super().__init__(attr)
        self._data = data

    def pread(self, size: int, offset: int) -> bytes:
        """Read up to *size* bytes at *offset*. May block; EIO if the image is damaged."""
        return self._data.pread(size, offset)

    def try_pread(self, size: int, offset: int) -> bytes | None:
        """Like :meth:`pread`, but None if it takes more than half a millisecond, and a thread should do
        it."""
        return self._data.try_pread(size, offset)

    def segments(self, end: int, start: int = 0) -> Iterator[tuple[int, int]]:
        """Yield the runs of stored data. Holes are the blocks that mksquashfs found to be zeros. May block;
        EIO."""
        return self._data.segments(end, start)

    def copy_to(self, target: File, size: int | None = None) -> None:
        """Copy the first *size* bytes, or all, to the new empty file *target*; holes stay holes.

        Blocks. Sets the size of *target* first. Several threads decompress and write large files, in pieces
        of about 1 MiB, a few at a time. EIO if the image is damaged, and any error of writing; the caller
        then discards *target*.
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


_IN_TABLE = 1 << 24
"""Numbers up to this one have a place in the table, if the image has so many inodes: 128 MiB at most."""


class _Numbers:
    """Unique inode numbers, even if an image uses a number twice.

    For the union, a number identifies an inode. If two inodes have the same number, the second one that is
    found gets a number above the 32 bits of the format. At the next mount, it may be the other inode.
    """

    __slots__ = ("_lock", "_more", "_others", "_owners", "_table")

    def __init__(self, inodes: int) -> None:
        """*inodes*: how many the image has. Their numbers are usually 1 to *inodes*."""
        # Reference + 1 of the inode with the number. The kernel supplies pages of the table as they are used.
        # Many small objects would keep Python's arenas from being freed when all nodes are forgotten.
        size = 8 * (min(inodes, _IN_TABLE) + 1)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._table = memoryview(mmap.mmap(-1, size, flags=flags)).cast("Q")
        self._owners: dict[int, int] = {}  # of the other numbers
        self._others: dict[int, int] = {}
        self._more: dict[int, int] = {}
        self._lock = threading.Lock()

    def of(self, inode: Inode) -> int:
        """Return the number of *inode*: its own if it was the first inode with that number."""
        number, owner = inode.number, inode.ref + 1
        if number < len(self._table) and self._table[number] == owner:
            return number
        with self._lock:
            return self._given(number, owner)

    def _given(self, number: int, owner: int) -> int:
        owners = self._table if number < len(self._table) else self._owners
        known = self._table[number] if number < len(self._table) else self._owners.get(number, 0)
        if known == owner:
            return number
        if not known:
            owners[number] = owner
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
    uuid = NO_UUID
    """The one in its handles. It is changed if they could be mistaken for those of another lower."""
    number = 0
    """Which lower it is, counted from the topmost, if it has another UUID."""

    def __init__(
        self, path: str, *, offset: int = 0, cache_bytes: int = CACHE_BYTES, data: Bytes | None = None
    ) -> None:
        """Open the image that begins *offset* bytes into the file, or into *data* of it; reads little.

        :class:`cowfs.errors.LayerError` says why an image cannot be used. *cache_bytes* limits the cache of
        decompressed data.
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
        self._numbers = _Numbers(self._image.superblock.inodes)
        # The last key and its answer: a copy-up or a removal asks several times.
        self._last = -1, AttrData(0, 0)
        self.generation: int | None = zlib.crc32(self._image.superblock.raw)

    def lookup(self, directory: int, name: bytes) -> tuple[int, Attr] | None:
        """Find *name*; None if it does not exist. ENOTDIR, ENAMETOOLONG; EIO if damaged or not a tree."""
        if len(name) >= _NAME_MAX:
            raise os_error(errno.ENAMETOOLONG)
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
        """Return all entries, ordered by name. ENOTDIR, EIO."""
        listing = self._image.listing(directory)
        return [DirEntry(name, type_of(value)) for name, value in listing.items()]

    def pieces(self, directory: int) -> Iterator[list[DirEntry]]:
        """Yield the same entries, some at a time. ENOTDIR, EIO."""
        found = iter(self._image.listing(directory).items())
        while some := [DirEntry(name, type_of(value)) for name, value in itertools.islice(found, _MANY)]:
            yield some

    def names(self, directory: int) -> list[bytes] | NamesJob:
        """Return the names only. ENOTDIR, EIO."""
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
            raise os_error(errno.EROFS)
        data = self._image.data(key)
        return SquashfsFile(data, self._attr(data.inode))

    def read_small(self, key: int, size: int, offset: int, may_block: Callable[[], bool]) -> bytes | None:
        """Return data of a regular file that needs no readahead; None for any other.

        It blocks for at most half a millisecond unless *may_block* says so; None if that is not enough. EIO.
        """
        data = self._image.data(key)
        if not data.is_small:
            return None
        found = data.try_pread(size, offset)
        return data.pread(size, offset) if found is None and may_block() else found

    def read_whole(self, key: int, size: int) -> bytes | None:
        data = self._image.data(key)
        return data.pread(size, 0) if data.is_small and not data.has_holes() else None

    def statfs(self) -> FsStats:
        """Return the figures as the kernel's squashfs does: everything used, nothing free."""
        sb = self._image.superblock
        blocks = ((sb.bytes_used - 1) >> sb.block_log) + 1
        return FsStats(sb.block_size, sb.block_size, blocks, 0, 0, sb.inodes, 0, 0, 256)

    def handle(self, key: int) -> FileHandle | None:
        """Return the handle of the kernel's squashfs, which has the inode number, if the image is exportable.

        None if another inode has the number.
        """
        inode = self._image.inode(key)
        if self._numbers.of(inode) != inode.number:
            return None
        return make_handle(inode.number, self.uuid, b"%d" % key, self.number)

    def handle_ino(self, handle: FileHandle) -> int | None:
        return number_in(handle, self.uuid, self._image.superblock.last_number)

    def identity(self) -> Identity:
        """Return what identifies the image at the next mount. The first call reads all its tables."""
        sb = self._image.superblock
        made = datetime.fromtimestamp(sb.mkfs_time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        description = f"{sb.compression} squashfs of {made}, {sb.inodes} inodes, {sb.bytes_used} bytes"
        return Identity("squashfs", self._image.fingerprint(), description, self._path)

    def summary(self) -> list[tuple[str, str]]:
        """Return pairs of a name and a value that describe the image, like ``unsquashfs -s``. EIO."""
        return summary(self._image)

    def shrink(self) -> None:
        """Drop cached data that can be read again."""
        self._image.shrink()

    def caches(self) -> dict[str, tuple[int, int]]:
        """Return cache hits and misses of decompressed blocks, by kind."""
        return self._image.caches()

    def forget(self, key: int) -> None:
        """Do nothing: keys need no state."""

    def close(self) -> None:
        self._image.close()


def _write(fd: int, parts: list[bytes], offset: int) -> None:
    """Write all *parts*, one after the other, from *offset* on."""
    left = [memoryview(part) for part in parts]
    while left:
        written = os.pwritev(fd, left[:_VECTORS], offset)
        offset += written
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if left:
            left[0] = left[0][written:]


_VECTORS = min(os.sysconf("SC_IOV_MAX"), 1024)
