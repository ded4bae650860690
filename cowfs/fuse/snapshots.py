"""The names of directories at the time when a reader began to list them, for all their readers."""

from __future__ import annotations

from collections import OrderedDict

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
