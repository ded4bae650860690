"""An open file of the kernel's, as a layer gives it."""

from __future__ import annotations

import os
from collections.abc import Iterator

from cowfs.linux import files
from cowfs.types import Attr


class KernelFile:
    """A :class:`cowfs.layers.base.File` on a descriptor of the kernel's."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def pread(self, size: int, offset: int) -> bytes:
        return os.pread(self._fd, size, offset)

    def pwrite(self, data: bytes, offset: int) -> int:
        written = os.pwrite(self._fd, data, offset)
        while written < len(data):  # a signal or a full disk: the rest says which
            written += os.pwrite(self._fd, memoryview(data)[written:], offset + written)
        return written

    def truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def fsync(self, datasync: bool) -> None:
        if datasync:
            os.fdatasync(self._fd)
        else:
            os.fsync(self._fd)

    def stat(self) -> Attr:
        return os.fstat(self._fd)

    def segments(self, end: int) -> Iterator[tuple[int, int]]:
        return files.segments(self._fd, end)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()
