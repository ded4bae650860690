"""One version of a file: before or after the change."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from cowfs.layers.base import File
from cowfs.types import Attr


@dataclass(frozen=True, slots=True)
class Version:
    """What one side of a change is."""

    attr: Attr
    read: Callable[[], bytes]
    """Reads the whole content of a regular file, or the target of a symlink; b"" for what has none. Blocks;
    OSError."""

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.attr.st_mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.attr.st_mode)

    @property
    def is_link(self) -> bool:
        return stat.S_ISLNK(self.attr.st_mode)


@dataclass(frozen=True, slots=True)
class Node:
    """An inode of a tree, and the functions that read the rest of it. These block, and raise OSError."""

    attr: Attr
    identity: tuple[int, int, int]
    """Equal for the names of one inode alone."""
    xattrs: Callable[[], dict[bytes, bytes]]
    """Those that users of the tree see."""
    target: Callable[[], bytes]
    """Of a symbolic link."""
    open: Callable[[], File]
    """For reading, of a regular file."""

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.attr.st_mode)


class Tree(Protocol):
    """A tree that is read, by paths from its root, without a leading slash. Blocks; OSError.

    Ask for paths in order if possible: what was looked up for one path is used for the next.
    """

    def node(self, path: bytes) -> Node | None:
        """Return what is at *path*; None if nothing is."""

    def names(self, path: bytes) -> set[bytes]:
        """Return the names in the directory at *path*; none if it is not a directory."""

    def others(self, wanted: Iterable[tuple[int, int, int]]) -> Iterator[bytes]:
        """Yield the paths of the changed inodes with these identities (:attr:`Node.identity`)."""


def version_of(path: bytes, root: int) -> Version | None:
    """Return what is at *path* beneath the directory *root*, a descriptor; None if nothing is.

    Follows no symbolic link. Raises OSError for any other failure.
    """
    try:
        attr = os.stat(path or b".", dir_fd=root, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if stat.S_ISLNK(attr.st_mode):
        return Version(attr, lambda: os.readlink(path, dir_fd=root))
    if not stat.S_ISREG(attr.st_mode):
        return Version(attr, bytes)
    return Version(attr, lambda: _content(path, root, attr.st_size))


def _content(path: bytes, root: int, size: int) -> bytes:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(path, flags, dir_fd=root), "rb") as file:
        return file.read(size)  # it may grow meanwhile
