"""The open directories of a mount, with the names that each had when its reader began to list it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from cowfs.fuse import libfuse
from cowfs.fuse.quotas import Quota
from cowfs.overlay.node import Node
from cowfs.overlay.readdir import Listing

DOTS = 2
"""The names ``.`` and ``..`` come first in a listing."""


class OpenDirectory:
    """An open directory."""

    __slots__ = ("names", "node", "opener")

    def __init__(self, node: Node, opener: int) -> None:
        self.node = node
        self.opener = opener
        self.names: Listing | None = None
        """The names in the directory when the listing began."""


class Snapshots:
    """Keeps a limited total number of names, and always the last snapshot.

    A reader whose snapshot was dropped continues with a new one: a name has the same place in each.
    """

    __slots__ = ("_count", "_kept", "_most")

    def __init__(self, most: int) -> None:
        self._most = most
        self._count = 0
        self._kept: OrderedDict[OpenDirectory, int] = OrderedDict()

    def __len__(self) -> int:
        return self._count

    def keep(self, directory: OpenDirectory, names: Listing) -> None:
        """Keep the names with which a reader continues."""
        if directory.names is not None:
            self.drop(directory)
        directory.names = names
        self._kept[directory] = len(names)
        self._count += len(names)
        while self._count > self._most and len(self._kept) > 1:
            self.drop(next(iter(self._kept)))

    def drop(self, directory: OpenDirectory) -> None:
        """Forget the names of a reader."""
        if directory.names is not None:
            directory.names = None
            self._count -= self._kept.pop(directory)


class OpenDirectories:
    """Open directories by handle number."""

    def __init__(self, opened: Quota, most_names: int) -> None:
        """*opened* counts them for their users, together with files."""
        self.snapshots = Snapshots(most_names)
        self._opened = opened
        self._open: dict[int, OpenDirectory] = {}
        self._last = 0
        self._cached: set[Node] = set()

    def __getitem__(self, number: int) -> OpenDirectory:
        return self._open[number]

    def get(self, number: int) -> OpenDirectory | None:
        """Return an open directory; None if no directory has this number."""
        return self._open.get(number)

    def nodes(self) -> Iterator[Node]:
        """Yield the nodes that are open."""
        return (directory.node for directory in self._open.values())

    def open(self, node: Node, uid: int, *, cache: bool) -> int:
        """Add a directory that a user opens; return its number. It asks the kernel to cache the listing if
        *cache* is true and nobody else reads it. EMFILE."""
        self._opened.claim(uid)
        self._last += 1
        number = self._last | libfuse.LISTING
        # The kernel's cache is for one reader at a time: it would give a second reader, past the beginning,
        # what the first one got before the second one came.
        if cache and node not in self._cached:
            self._cached.add(node)
            number |= libfuse.KEPT
        self._open[number] = OpenDirectory(node, uid)
        return number

    def close(self, number: int) -> None:
        """Forget an open directory. KeyError if no directory has this number."""
        directory = self._open.pop(number)
        self.snapshots.drop(directory)
        self._opened.give_back(directory.opener)
        if number & libfuse.KEPT:
            self._cached.discard(directory.node)
