"""A file that is open without a descriptor: each call opens it again.

It is for users who open more files than there are descriptors. Each read and write costs two more system
calls, but the number of open files is unlimited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from cowfs.layers.base import File, Key
from cowfs.types import Attr


@runtime_checkable
class Reopens(Protocol):
    """A layer that can open files without a descriptor."""

    def reopened(self, key: Key, flags: int) -> File:
        """Open a regular file as :meth:`LowerLayer.open` does, and keep no descriptor."""
        ...


class Reopened:
    """A :class:`cowfs.layers.base.File`. Only for the thread that uses the layer."""

    __slots__ = ("_open",)

    def __init__(self, open_: Callable[[], File]) -> None:
        """*open_* opens the file. Raises what it raises."""
        self._open = open_
        open_().close()

    @contextmanager
    def opened(self) -> Iterator[File]:
        """Open the file for the block."""
        file = self._open()
        try:
            yield file
        finally:
            file.close()

    def pread(self, size: int, offset: int) -> bytes:
        with self.opened() as file:
            return file.pread(size, offset)

    try_pread = pread

    def pwrite(self, data: bytes, offset: int) -> int:
        with self.opened() as file:
            return file.pwrite(data, offset)

    def truncate(self, size: int) -> None:
        with self.opened() as file:
            file.truncate(size)

    def fsync(self, datasync: bool) -> None:
        with self.opened() as file:
            file.fsync(datasync)

    def stat(self) -> Attr:
        with self.opened() as file:
            return file.stat()

    def segments(self, end: int, start: int = 0) -> Iterator[tuple[int, int]]:
        with self.opened() as file:
            yield from file.segments(end, start)

    def fileno(self) -> int:
        return -1

    def copy_to(self, target: File, size: int | None = None) -> None:
        with self.opened() as file:
            file.copy_to(target, size)

    def close(self) -> None:
        """Do nothing: nothing is open."""


@contextmanager
def at_hand(file: File) -> Iterator[File]:
    """Yield a file that any thread may use: *file* itself, or it reopened with a descriptor for the block."""
    if isinstance(file, Reopened):
        with file.opened() as opened:
            yield opened
    else:
        yield file
