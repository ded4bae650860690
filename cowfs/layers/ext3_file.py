"""An open file of an ext3 image, and the inodes in use of an image."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

from cowfs.errors import os_error
from cowfs.formats.ext3.image import Image
from cowfs.layers.base import File
from cowfs.linux import files
from cowfs.types import Attr

_CHUNK = 1 << 20
_HIDDEN = b"#in-use-%d"
_CAPABILITY = b"security.capability"


class Key(int):
    """An inode number. The *object* matters once the inode has no name.

    The inode then lives as long as the key that was passed to ``unlink``. Users may forget other keys of the
    same inode, from earlier calls of ``lookup``, at any time.
    """

    __slots__ = ()


class InUse:
    """The inodes in use, which outlive their names. Any thread may use it.

    To remove a name, hold *lock* from the check whether the inode is in use until the result is noted.
    """

    __slots__ = ("_files", "_image", "_orphans", "lock")

    def __init__(self, image: Image) -> None:
        self._image = image
        self.lock = threading.Lock()
        self._files: dict[int, int] = {}  # the number of open files of an inode
        self._orphans: dict[int, Key | None] = {}  # without a name: the key that keeps them

    def has(self, ino: int, key: int | None) -> bool:
        """Whether anyone other than the holder of *key* uses an inode."""
        return key == ino or ino in self._files

    def lost_its_name(self, ino: int, key: int | None) -> None:
        """Note that an inode in use lost its last name, and that *key* keeps it."""
        self._orphans[ino] = key if isinstance(key, Key) and key == ino else None

    def is_nameless(self, ino: int) -> bool:
        """Whether an inode has lost its last name."""
        return ino in self._orphans

    def opened(self, ino: int) -> None:
        """Note that a file was opened."""
        with self.lock:
            self._files[ino] = self._files.get(ino, 0) + 1

    def closed(self, ino: int) -> None:
        """Note that a file was closed."""
        with self.lock:
            left = self._files.pop(ino) - 1
            if left:
                self._files[ino] = left
            else:
                self._let_go(ino)

    def forgotten(self, key: int) -> None:
        """Note that the user of this key no longer needs it."""
        if self._orphans:
            with self.lock:
                if self._orphans.get(key) is key:
                    self._orphans[key] = None
                    self._let_go(key)

    def hide(self, place: int) -> None:
        """Give inodes without a name one in the directory *place*, so that e2fsck does not free them."""
        with self.lock:
            try:
                for ino in self._orphans:
                    self._image.link(ino, self._image.getattr(ino).mode, place, _HIDDEN % ino)
            except OSError:
                self._unhide(place)
                raise

    def unhide(self, place: int) -> None:
        """Remove these names."""
        with self.lock:
            self._unhide(place)

    def _unhide(self, place: int) -> None:
        names = self._image.names(place)
        for ino in self._orphans:
            if _HIDDEN % ino in names:
                is_directory = stat.S_ISDIR(self._image.getattr(ino).mode)
                (self._image.rmdir if is_directory else self._image.unlink)(place, _HIDDEN % ino, keep=True)

    def _let_go(self, ino: int) -> None:
        if ino not in self._files and self._orphans.get(ino, ...) is None:
            del self._orphans[ino]
            with suppress(OSError):  # the image was given up: e2fsck frees it
                self._image.release(ino)


class Capabilities:
    """File capabilities (setcap(8)), which every change of a file's data or owner removes."""

    __slots__ = ("_image", "count")

    def __init__(self, image: Image) -> None:
        self._image = image
        self.count = 0
        """How many were set so far: a caller that found none must look again when it changes."""

    def has(self, ino: int) -> bool:
        """Whether an inode has a capability. Most have none, and exceptions are slow."""
        return _CAPABILITY in self._image.listxattr(ino)

    def drop(self, ino: int) -> None:
        """Remove an inode's capability if it has one."""
        if self.has(ino):
            try:
                self._image.removexattr(ino, _CAPABILITY)
            except OSError as failure:
                if failure.errno != errno.ENODATA:  # ENODATA: another thread was faster
                    raise

    def noted(self, name: bytes) -> None:
        """Note that an xattr was set."""
        self.count += name == _CAPABILITY


class Ext3File:
    """A :class:`cowfs.layers.base.File` that counts as a use of its inode. For any thread."""

    __slots__ = ("_capabilities", "_flags", "_image", "_in_use", "_ino", "_seen", "_show")

    def __init__(
        self,
        image: Image,
        ino: int,
        flags: int,
        in_use: InUse,
        capabilities: Capabilities,
        show: Callable[[int, tuple[int, ...]], Attr],
        *,
        is_new: bool = False,
    ) -> None:
        """*is_new*: the file was just created, and has no xattrs."""
        self._image = image
        self._ino = ino
        self._flags = flags
        self._in_use = in_use
        self._capabilities = capabilities
        self._seen = capabilities.count if is_new else -1
        self._show = show
        in_use.opened(ino)

    def pread(self, size: int, offset: int) -> bytes:
        return self._image.pread(self._ino, size, offset)

    try_pread = pread

    def pwrite(self, data: bytes, offset: int) -> int:
        self._changes()
        return self.write_back(data, offset)

    def write_back(self, data: bytes, offset: int) -> int:
        """Write what was changed through mmap(2). That leaves the capability (ext4_page_mkwrite())."""
        written = self._image.pwrite(self._ino, data, offset)
        if self._flags & os.O_DSYNC:  # a part of O_SYNC
            self._image.fsync(self._ino, self._flags & os.O_SYNC != os.O_SYNC)
        return written

    def fill(self, data: bytes, offset: int) -> None:
        """Write *data* where there are holes, and change nothing else: see Image.fill. ENOSPC. May block."""
        self._image.fill(self._ino, data, offset)

    def truncate(self, size: int) -> None:
        self._changes()
        self._image.truncate(self._ino, size)

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        """Punch a hole. EFBIG. EOPNOTSUPP for other modes: ext3 has no unwritten blocks."""
        if offset + length > self._image.size_max():
            raise os_error(errno.EFBIG)
        if mode != files.PUNCH_HOLE:
            raise os_error(errno.EOPNOTSUPP)
        self._changes()
        self._image.punch(self._ino, offset, length)

    def _changes(self) -> None:
        if self._flags & os.O_ACCMODE == os.O_RDONLY:
            raise os_error(errno.EBADF)
        if self._seen != self._capabilities.count:
            self._seen = self._capabilities.count
            self._capabilities.drop(self._ino)

    def fsync(self, datasync: bool) -> None:
        self._image.fsync(self._ino, datasync)

    def stat(self) -> Attr:
        return self._show(self._ino, self._image.getattr(self._ino))

    def segments(self, end: int, start: int = 0) -> Iterator[tuple[int, int]]:
        return self._image.segments(self._ino, end, start)

    def fileno(self) -> int:
        return -1

    def copy_to(self, target: File, size: int | None = None) -> None:
        """Copy the first *size* bytes, or all, to a new file, piece by piece; holes stay holes. Blocks."""
        whole = self._image.getattr(self._ino).size
        size = whole if size is None else min(size, whole)
        target.truncate(size)
        for start, stop in self.segments(size):
            while start < stop:
                data = self.pread(min(_CHUNK, stop - start), start)
                if not data:
                    raise os_error(errno.EIO)
                start += target.pwrite(data, start)

    def close(self) -> None:
        ino, self._ino = self._ino, 0
        if ino:
            self._in_use.closed(ino)
