"""Bounded reads of the image file.

pread and never mmap: an image that is cut short while it is mounted is then a short read (EIO),
and not a SIGBUS that kills the daemon.
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
"""How many different damages of one image are logged; after that the log has said enough."""


class Bytes(Protocol):
    """What an image is in: a file, or something that is read like one."""

    @property
    def size(self) -> int:
        """Bytes of all of it. OSError."""
        ...

    def pread(self, size: int, at: int) -> bytes:
        """Return bytes as os.pread(2) does. OSError; WouldWait, of what may wait for other machines."""
        ...

    def forget(self, size: int, at: int) -> None:
        """Have these bytes read again the next time they are needed: they were wrong."""

    def caches(self) -> dict[str, tuple[int, int]]:
        """How often what was needed was at hand, and how often not, by its kind."""
        ...

    def stop(self) -> None:
        """Let nobody wait any more for other machines."""

    def close(self) -> None:
        """Close it. Safe to call twice."""


class FileBytes:
    """The bytes of a file, or of a device."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        """*fd* now belongs to this, which closes it."""
        self._fd = fd

    @property
    def size(self) -> int:
        """Bytes of all of it. OSError."""
        return os.lseek(self._fd, 0, os.SEEK_END)

    def pread(self, size: int, at: int) -> bytes:
        """Return bytes as os.pread(2) does. OSError."""
        return os.pread(self._fd, size, at)

    def forget(self, size: int, at: int) -> None:
        """Nothing is kept here."""

    def caches(self) -> dict[str, tuple[int, int]]:
        """The kernel's are not ours."""
        return {}

    def stop(self) -> None:
        """Nobody waits."""

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def open_bytes(path: str) -> Bytes:
    """Open a file, a block device, or what a URL names; compared with a hash tree, if required. Blocks.

    LayerError for a URL that cannot be used; OSError for a file, and LayerError for what is none.
    """
    return checked(open_unchecked(path), place(path), open_unchecked)


def open_unchecked(path: str) -> Bytes:
    """Open the same as it is. As :func:`open_bytes`."""
    if is_url(path):
        from cowfs.url.opened import open_url

        return open_url(path)
    fd = open_ordinary(path, os.O_RDONLY)
    kind = stat.S_IFMT(os.fstat(fd).st_mode)
    if kind in {stat.S_IFREG, stat.S_IFBLK}:
        return FileBytes(fd)
    os.close(fd)
    if kind == stat.S_IFDIR:
        raise LayerError(f"{path}: is a directory, not a squashfs image")
    raise LayerError(f"{path}: is neither a file nor a block device")


class Source:
    """The bytes of one image: those from *offset* on in *data*, *size* of them."""

    __slots__ = ("_data", "_reported", "name", "offset", "size")

    def __init__(self, data: Bytes, name: str, offset: int, size: int) -> None:
        """*data* now belongs to the source, which closes it; *name* is for messages."""
        self._data = data
        self.name = name
        self.offset = offset
        self.size = size
        self._reported: set[str] = set()

    def pread(self, size: int, position: int, what: str) -> bytes:
        """Read exactly *size* bytes at *position* of the image; may block.

        EIO, naming *what* was to be read, when that is not inside the image or the file has become
        shorter. What the kernel says (EIO of a dying disk, ESTALE) is passed on.
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
            if not is_url(self.name):  # of which the log has heard
                self._report(f"{what} at {position:#x}: {error.strerror}")
            raise
        return data

    def caches(self) -> dict[str, tuple[int, int]]:
        """How often what was needed was at hand, and how often not, by its kind."""
        return self._data.caches()

    def stop(self) -> None:
        """Let nobody wait any more for other machines: EIO."""
        self._data.stop()

    def file_size(self) -> int:
        """Return how large the whole file, or device, is. OSError."""
        return self._data.size

    def damaged(self, what: str) -> DamagedImage:
        """Log *what* is damaged, once, and return the exception to raise for it."""
        self._report(what)
        return DamagedImage(f"{self.name}: damaged squashfs image: {what} ({AGAIN})")

    def _report(self, what: str) -> None:
        if what not in self._reported and len(self._reported) < _REPORTS:
            self._reported.add(what)
            log.error("%s: %s", self.name, what)

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        self._data.close()
