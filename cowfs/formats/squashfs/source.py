"""Bounded reads of the image file.

They use pread(2) and not mmap(2): if a mounted image is truncated, a read is short (EIO), whereas a mapping
would cause a SIGBUS that kills the daemon.
"""

from __future__ import annotations

import logging
import os
import stat
from typing import Protocol

from cowfs.errors import LayerError
from cowfs.formats.squashfs.errors import AGAIN, DamagedImage
from cowfs.formats.verified import checked
from cowfs.linux.files import open_ordinary
from cowfs.url.names import is_url, place

log = logging.getLogger(__name__)

_REPORTS = 200
"""How many different damages of one image are logged."""


class Bytes(Protocol):
    """The bytes that contain an image: a file, or something that is read like one."""

    @property
    def size(self) -> int:
        """The size in bytes. OSError."""
        ...

    def pread(self, size: int, at: int) -> bytes:
        """Return bytes as os.pread() does.

        OSError; WouldWait if it would have to wait for another machine.
        """
        ...

    def forget(self, size: int, at: int) -> None:
        """Drop these bytes from caches, because they were wrong."""

    def caches(self) -> dict[str, tuple[int, int]]:
        """How often what was needed was at hand, and how often not, by its kind."""
        ...

    def stop(self) -> None:
        """Let nobody wait any more for other machines."""

    def close(self) -> None:
        """Close it. Safe to call twice."""


class FileBytes:
    """The bytes of a file or block device."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        """This object closes *fd*."""
        self._fd = fd

    @property
    def size(self) -> int:
        """Bytes of all of it. OSError."""
        return os.lseek(self._fd, 0, os.SEEK_END)

    def pread(self, size: int, at: int) -> bytes:
        """Return bytes as os.pread(2) does. OSError."""
        return os.pread(self._fd, size, at)

    def forget(self, size: int, at: int) -> None:
        """Do nothing: this has no cache."""

    def caches(self) -> dict[str, tuple[int, int]]:
        """Return nothing: only the kernel caches a file."""
        return {}

    def stop(self) -> None:
        """Do nothing: no read waits for another machine."""

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def open_bytes(path: str) -> Bytes:
    """Open a file, block device or URL, verified by a hash tree if required. Blocks.

    OSError if a file cannot be opened; LayerError for a URL that cannot be used, and for other types of
    files.
    """
    return checked(open_unchecked(path), place(path), open_unchecked)


def open_unchecked(path: str) -> Bytes:
    """Open a file, block device or URL without verifying it. See :func:`open_bytes`."""
    if is_url(path):
        from cowfs.url.opened import open_url

        return open_url(path)
    fd = open_ordinary(path, os.O_RDONLY)
    kind = stat.S_IFMT(os.fstat(fd).st_mode)
    if kind in {stat.S_IFREG, stat.S_IFBLK}:
        return FileBytes(fd)
    os.close(fd)
    if kind == stat.S_IFDIR:
        raise LayerError(f"{path}: is a directory, not a squashfs image", "give the path of the image")
    raise LayerError(f"{path}: is neither a file nor a block device", "give the path of the image")


class Source:
    """The bytes of one image: *size* bytes of *data* from *offset* on."""

    __slots__ = ("_data", "_reported", "name", "offset", "size")

    def __init__(self, data: Bytes, name: str, offset: int, size: int) -> None:
        """The source closes *data*. *name* is for messages."""
        self._data = data
        self.name = name
        self.offset = offset
        self.size = size
        self._reported: set[str] = set()

    def pread(self, size: int, position: int, what: str) -> bytes:
        """Return exactly *size* bytes at *position* of the image. May block.

        EIO, which names *what* was read, if they are outside the image or the file was truncated. Other
        errors of the kernel (EIO of a failing disk, ESTALE) are passed on.
        """
        if position < 0 or size < 0 or position + size > self.size:
            raise self.damaged(f"{what} at {position:#x} (+{size}) is outside of the image")
        try:
            data = self._data.pread(size, position + self.offset)
            while len(data) < size:
                more = self._data.pread(size - len(data), position + self.offset + len(data))
                if not more:
                    raise self.damaged(f"{what} at {position:#x}: the image file has become shorter")
                data += more
        except DamagedImage:
            raise
        except OSError as error:
            if not is_url(self.name):  # errors of URLs are logged already
                self._report(f"{what} at {position:#x}: {error.strerror}")
            raise
        return data

    def caches(self) -> dict[str, tuple[int, int]]:
        """How often what was needed was at hand, and how often not, by its kind."""
        return self._data.caches()

    def stop(self) -> None:
        """Make reads that wait for other machines fail with EIO."""
        self._data.stop()

    def file_size(self) -> int:
        """Return the size of the whole file or device in bytes. OSError."""
        return self._data.size

    def damaged(self, what: str) -> DamagedImage:
        """Log, once, that *what* is damaged; return the exception to raise."""
        self._report(what)
        return DamagedImage(f"{self.name}: damaged squashfs image: {what} ({AGAIN})")

    def _report(self, what: str) -> None:
        if what not in self._reported and len(self._reported) < _REPORTS:
            self._reported.add(what)
            log.error("%s: %s", self.name, what)

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        self._data.close()
