"""Versions of a file, before and after a change, and trees to read them from."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from cowfs.layers.base import File
from cowfs.types import Attr


@dataclass(frozen=True, slots=True)
class Version:
    """A file before or after a change."""

    attr: Attr
    read: Callable[[], bytes]
    """Reads the whole content of a regular file, or the target of a symlink; b"" for other types. Blocks;
    OSError."""

    @property
    def is_dir(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.attr.st_mode)

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return stat.S_ISREG(self.attr.st_mode)

    @property
    def is_link(self) -> bool:
        """Whether it is a symbolic link."""
        return stat.S_ISLNK(self.attr.st_mode)


@dataclass(frozen=True, slots=True)
class Node:
    """An inode of a tree, and functions that read the rest of it. They block; OSError."""

    attr: Attr
    identity: tuple[int, int, int]
    """A number of the layer or mount, the device and the inode number. Names of one inode have the same."""
    xattrs: Callable[[], dict[bytes, bytes]]
    """Reads the xattrs that users of the tree see."""
    target: Callable[[], bytes]
    """Reads the target of a symbolic link."""
    open: Callable[[], File]
    """Opens a regular file for reading."""

    @property
    def is_dir(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.attr.st_mode)


class Tree(Protocol):
    """A tree to read, by paths from its root, without a leading slash. Blocks; OSError.

    Reading paths in order is fastest: directories looked up for one path are used for the next.
    """

    def node(self, path: bytes) -> Node | None:
        """Return the inode at *path*; None if there is none."""

    def names(self, path: bytes) -> set[bytes]:
        """Return the names in the directory at *path*; none if it is not a directory."""

    def others(self, wanted: Iterable[tuple[int, int, int]]) -> Iterator[bytes]:
        """Yield the paths of the changed inodes with these identities (:attr:`Node.identity`)."""
