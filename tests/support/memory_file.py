"""A file of an upper layer that exists only in memory."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator

from cowfs.layers.base import File
from cowfs.types import Attr, AttrData


class MemoryFile:
    """A target of a copy. It counts the bytes written, and the largest number of concurrent writes."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.written = 0
        self.fails_after = 1 << 60
        self.busy = 0
        self.most = 0
        self._lock = threading.Lock()

    def truncate(self, size: int) -> None:
        self.content = bytearray(size)

    def pwrite(self, data: bytes, offset: int) -> int:
        with self._lock:
            self.busy += 1
            self.most = max(self.most, self.busy)
            self.written += len(data)
            try:
                if self.written > self.fails_after:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                assert offset + len(data) <= len(self.content), "a write past the end"
                self.content[offset : offset + len(data)] = data
            finally:
                self.busy -= 1
        return len(data)

    def fileno(self) -> int:
        return -1

    def pread(self, size: int, offset: int) -> bytes:
        raise NotImplementedError

    def try_pread(self, size: int, offset: int) -> bytes | None:
        raise NotImplementedError

    def copy_to(self, target: File, size: int | None = None) -> None:
        raise NotImplementedError

    def fsync(self, datasync: bool) -> None:
        raise NotImplementedError

    def stat(self) -> Attr:
        return AttrData(0, 0)

    def segments(self, end: int, start: int = 0) -> Iterator[tuple[int, int]]:
        raise NotImplementedError

    def close(self) -> None:
        pass
