"""An archive as a lower layer: the index is in memory, the data stays in the archive."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator

from cowfs.errors import LayerError, os_error
from cowfs.formats.archive import Inode, Tree
from cowfs.formats.squashfs.source import Bytes, open_bytes
from cowfs.layers.base import File
from cowfs.layers.read_only import ReadOnlyFile, make_handle, number_in
from cowfs.layers.squashfs import new_device
from cowfs.types import NO_UUID, Attr, AttrData, DirEntry, FileHandle, FsStats
from cowfs.url.names import is_url

_PIECE = 1 << 20


class ArchiveFile(ReadOnlyFile):
    """An open file of an archive: a :class:`cowfs.layers.base.File`. All methods from any thread."""

    __slots__ = ("_archive", "_inode")

    def __init__(self, archive: Tree, inode: Inode, attr: Attr) -> None:
        super().__init__(attr)
        self._archive = archive
        self._inode = inode

    def pread(self, size: int, offset: int) -> bytes:
        """Read up to *size* bytes at *offset*. EIO if the archive has changed."""
        return self._archive.pread(self._inode, size, offset)

    def try_pread(self, size: int, offset: int) -> bytes | None:
        """Return what :meth:`pread` returns, or None if that takes long. EIO."""
        return self._archive.try_pread(self._inode, size, offset)

    def segments(self, end: int, start: int = 0) -> Iterator[tuple[int, int]]:
        """Yield the runs of stored data; the rest are holes."""
        for begin, length, _ in self._inode.stored(start, end):
            yield begin, min(begin + length, end)

    def copy_to(self, target: File, size: int | None = None) -> None:
        """Copy the first *size* bytes, or all, to the new *target*; holes stay holes. Blocks. EIO."""
        size = self._inode.size if size is None else min(size, self._inode.size)
        target.truncate(size)
        for start, stop in self.segments(size):
            for at in range(start, stop, _PIECE):
                target.pwrite(self.pread(min(_PIECE, stop - at), at), at)


class ArchiveLayer:
    """Serve the archive at *path* as a :class:`cowfs.layers.base.LowerLayer`. Any thread may read from it."""

    waits = False
    has_descriptors = False
    data_only = False
    generation: int | None = None
    uuid = NO_UUID
    """The one in its handles. It is changed if they could be mistaken for those of another lower."""
    number = 0
    """Which lower it is, counted from the topmost, if it has another UUID."""

    def __init__(self, path: str, index: Callable[[Bytes, str], Tree]) -> None:
        """Open the archive and read all its headers with *index*. Blocks; LayerError, OSError."""
        data = open_bytes(path)
        try:
            self._archive = index(data, path)
        except OSError as error:
            data.close()
            if is_url(path):
                raise LayerError(error.strerror or str(error)) from None
            raise
        except BaseException:
            data.close()
            raise
        self.name = path
        self.root = self._archive.root
        self.dev = new_device()

    def lookup(self, directory: Inode, name: bytes) -> tuple[Inode, Attr] | None:
        """Find *name*; None if it does not exist. ENOTDIR, ENAMETOOLONG."""
        if len(name) > 255:
            raise os_error(errno.ENAMETOOLONG)
        found = _entries(directory).get(name)
        return None if found is None else (found, self.stat(found))

    def stat(self, key: Inode) -> AttrData:
        return AttrData(
            key.mode,
            key.number,
            self.dev,
            key.nlink,
            key.uid,
            key.gid,
            key.rdev,
            key.size,
            -(-key.bytes_stored() // 512),
            4096,
            key.mtime_ns,
            key.mtime_ns,
            key.mtime_ns,
        )

    def readdir(self, directory: Inode) -> list[DirEntry]:
        """Return all entries. ENOTDIR."""
        return [DirEntry(name, stat.S_IFMT(one.mode)) for name, one in _entries(directory).items()]

    def pieces(self, directory: Inode) -> Iterator[list[DirEntry]]:
        yield self.readdir(directory)

    def names(self, directory: Inode) -> list[bytes]:
        """Return the names only. ENOTDIR."""
        return list(_entries(directory))

    def readlink(self, key: Inode) -> bytes:
        if not stat.S_ISLNK(key.mode):
            raise os_error(errno.EINVAL)
        return self._archive.target(key)

    def listxattr(self, key: Inode) -> list[bytes]:
        return list(key.xattrs)

    def getxattr(self, key: Inode, name: bytes) -> bytes:
        """Return the value of an xattr. ENODATA."""
        try:
            return key.xattrs[name]
        except KeyError:
            raise os_error(errno.ENODATA) from None

    def open(self, key: Inode, flags: int) -> ArchiveFile:
        """Open a regular file for reading. EROFS for any other access; EISDIR, EINVAL for any other type."""
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise os_error(errno.EROFS)
        if not stat.S_ISREG(key.mode):
            raise os_error(errno.EISDIR if stat.S_ISDIR(key.mode) else errno.EINVAL)
        return ArchiveFile(self._archive, key, self.stat(key))

    def statfs(self) -> FsStats:
        """Return the figures: everything used, nothing free."""
        blocks = -(-self._archive.data.size // 4096)
        return FsStats(4096, 4096, blocks, 0, 0, self._archive.inodes, 0, 0, 255)

    def handle(self, key: Inode) -> FileHandle | None:
        """Return the inode number in this archive, in the form of a handle of the kernel's squashfs."""
        return make_handle(key.number, self.uuid, lower=self.number)

    def handle_ino(self, handle: FileHandle) -> int | None:
        return number_in(handle, self.uuid, self._archive.inodes)

    def forget(self, key: Inode) -> None:
        """Do nothing: all inodes stay in memory."""

    def caches(self) -> dict[str, tuple[int, int]]:
        """Return cache hits and misses of a file on a server, by kind."""
        return self._archive.data.caches()

    def shrink(self) -> None:
        """Drop all cached data that can be read again."""
        self._archive.shrink()

    def close(self) -> None:
        """Close the archive. Reads that wait for another machine end with EIO."""
        self._archive.data.stop()
        self._archive.data.close()


def _entries(directory: Inode) -> dict[bytes, Inode]:
    if not stat.S_ISDIR(directory.mode):
        raise os_error(errno.ENOTDIR)
    return directory.children
