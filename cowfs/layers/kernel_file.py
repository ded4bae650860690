"""An open file with a descriptor, as a layer returns it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator

from cowfs.errors import NoRoom
from cowfs.layers.base import File
from cowfs.linux import files
from cowfs.types import Attr

_CHUNK = 1 << 20


class KernelFile:
    """A :class:`cowfs.layers.base.File` on a descriptor."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def pread(self, size: int, offset: int) -> bytes:
        return os.pread(self._fd, size, offset)

    try_pread = pread

    def pwrite(self, data: bytes, offset: int) -> int:
        written = os.pwrite(self._fd, data, offset)
        while written < len(data):  # a signal or a full disk: the next write tells which
            try:
                written += os.pwrite(self._fd, memoryview(data)[written:], offset + written)
            except OSError as failure:
                if failure.errno not in files.LACK_OF_ROOM:
                    raise
                no_room = NoRoom(*failure.args)
                no_room.written = written
                raise no_room from None
        return written

    def fill(self, data: bytes, offset: int) -> None:
        """Write *data* where there are holes. Nobody else may write meanwhile; the times change."""
        data = data[: max(os.fstat(self._fd).st_size - offset, 0)]
        for start, stop in files.holes(self._fd, offset, offset + len(data)):
            self.pwrite(data[start - offset : stop - offset], start)

    def truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        files.fallocate(self._fd, offset, length, mode)

    def fsync(self, datasync: bool) -> None:
        if datasync:
            os.fdatasync(self._fd)
        else:
            os.fsync(self._fd)

    def stat(self) -> Attr:
        return os.fstat(self._fd)

    def segments(self, end: int, start: int = 0) -> Iterator[tuple[int, int]]:
        return files.segments(self._fd, end, start)

    def fileno(self) -> int:
        return self._fd

    def copy_to(self, target: File, size: int | None = None) -> None:
        """Copy the first *size* bytes, or all, to a new file; by a reflink or sendfile(2) where possible."""
        info = os.fstat(self._fd)
        whole = info.st_size
        size = whole if size is None else size
        target_fd = target.fileno()
        if target_fd >= 0 and size == whole > _CHUNK and files.reflink(self._fd, target_fd):
            return
        if info.st_blocks * 512 >= whole:  # no holes to look for
            runs: Iterable[tuple[int, int]] = [(0, size)] if size else []
        else:
            target.truncate(size)
            runs = self.segments(size)
        for start, stop in runs:
            if target_fd >= 0:
                files.copy_range(self._fd, target_fd, start, stop)
            else:
                self._copy_run(target, start, stop)

    def _copy_run(self, target: File, start: int, stop: int) -> None:
        while start < stop:
            data = os.pread(self._fd, min(_CHUNK, stop - start), start)
            if not data:
                raise OSError(errno.EIO, "the source is shorter than its attributes say")
            start += target.pwrite(data, start)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()
