"""Bounded reads of the image file.

pread and never mmap: an image that is cut short while it is mounted is then a short read (EIO),
and not a SIGBUS that kills the daemon.
"""

from __future__ import annotations

import logging
import os

from cowfs.formats.squashfs.errors import DamagedImage

log = logging.getLogger(__name__)

_REPORTS = 200
"""How many different damages of one image are logged; after that the log has said enough."""


class Source:
    """The bytes of one image: those from *offset* on in the file behind *fd*, *size* of them."""

    __slots__ = ("_fd", "_reported", "name", "offset", "size")

    def __init__(self, fd: int, name: str, offset: int, size: int) -> None:
        """*fd* now belongs to the source, which closes it; *name* is for messages."""
        self._fd = fd
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
            data = os.pread(self._fd, size, position + self.offset)
            while len(data) < size:
                more = os.pread(self._fd, size - len(data), position + self.offset + len(data))
                if not more:
                    raise self.damaged(f"{what} at {position:#x}: the image file has become shorter")
                data += more
        except DamagedImage:
            raise
        except OSError as error:
            self._report(f"{what} at {position:#x}: {error.strerror}")
            raise
        return data

    def damaged(self, what: str) -> DamagedImage:
        """Log *what* is damaged, once, and return the exception to raise for it."""
        self._report(what)
        return DamagedImage(f"{self.name}: damaged squashfs image: {what}")

    def _report(self, what: str) -> None:
        if what not in self._reported and len(self._reported) < _REPORTS:
            self._reported.add(what)
            log.error("%s: %s", self.name, what)

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
