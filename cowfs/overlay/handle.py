"""The open files of an inode."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING

from cowfs.layers.base import File

if TYPE_CHECKING:
    from cowfs.overlay.node import Node


class Writer(Enum):
    """A writer of a file, as far as set-ID bits are concerned (write(2))."""

    PRIVILEGED = 1
    """The writer has CAP_FSETID: the bits stay."""
    MEMBER = 2
    """The writer is in the file's group: set-group-ID stays if the group may not execute the file."""
    STRANGER = 3


class Reader:
    """A file that all readers of an inode share: they use pread(2), so it needs no position."""

    __slots__ = ("file", "users")

    def __init__(self, file: File) -> None:
        self.file = file
        self.users = 0


class Handle:
    """An open file of the merged tree."""

    __slots__ = (
        "_retired",
        "file",
        "is_frozen",
        "is_synchronous",
        "node",
        "number",
        "on_replace",
        "opener",
        "reader",
        "writable",
    )

    def __init__(
        self, node: Node, file: File | Reader, *, writable: bool, opener: Writer = Writer.PRIVILEGED
    ) -> None:
        self.node = node
        self.reader = file if isinstance(file, Reader) else None
        self.file: File = file.file if isinstance(file, Reader) else file
        if self.reader is not None:
            self.reader.users += 1
        self.writable = writable
        self.opener = opener
        """The writer that is assumed if the real one is unknown."""
        self.is_frozen = False
        """Whether it is open for writing, but its inode is in a lower now, and must be copied up first."""
        self.is_synchronous = False
        """Whether each write waits for the disk (O_SYNC, O_DSYNC)."""
        self.number = -1
        """Its number in a table of handles."""
        self.on_replace: Callable[[Handle, File], None] | None = None
        """Called after another file has taken the place of this one."""
        self._retired: list[tuple[File, Reader | None]] = []

    def replace(self, reader: Reader) -> None:
        """Continue with another file. A thread may still be reading the old one."""
        self._replace(reader.file, reader)
        reader.users += 1

    def thaw(self, file: File) -> None:
        """Continue with the upper file that the inode was copied up to."""
        self._replace(file, None)
        self.is_frozen = False

    def _replace(self, file: File, reader: Reader | None) -> None:
        before, reader_before = self.file, self.reader
        self.file, self.reader = file, reader
        if self.on_replace is not None:
            self.on_replace(self, before)
        if before.fileno() < 0:
            self._retired.append((before, reader_before))
        # The last user closes a file that has a descriptor, so that none stays open unused.

    def close(self) -> None:
        _close(self.file, self.reader)
        for file, reader in self._retired:
            _close(file, reader)


def _close(file: File, reader: Reader | None) -> None:
    if reader is not None:
        reader.users -= 1
        if reader.users:
            return
    file.close()


class Handles(dict[Handle, None]):
    """All open handles of one inode, in the order of their opening."""

    __slots__ = ("reader",)

    def __init__(self) -> None:
        super().__init__()
        self.reader: Reader | None = None
        """The reader that the next open file shares."""
