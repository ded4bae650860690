"""Files that the kernel reads and writes without an OPEN request (FUSE_NO_OPEN_SUPPORT).

Most files are opened, read once and closed: four in five requests of a compiler are OPEN and RELEASE. If a
layer's open files need no descriptor, keeping them open costs nothing, and cowfs needs neither request. So
this module opens an inode when it is first read or written. It closes the inode when the kernel forgets it,
or after others were used since.

A file of a lower is copied up when it is first written to, not when it is opened.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from cowfs.overlay.handle import Handle
from cowfs.overlay.node import Node
from cowfs.overlay.overlay import Overlay

_MOST = 1000
"""How many inodes have something open."""


class _Kept:
    __slots__ = ("reads", "users", "writes")

    def __init__(self) -> None:
        self.reads: Handle | None = None
        self.writes: Handle | None = None
        self.users = 0
        """How many wait for a thread that reads or writes."""


class Unopened:
    """The open files of the most recently used inodes."""

    def __init__(self, fs: Overlay) -> None:
        self._fs = fs
        self._kept: OrderedDict[Node, _Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def to_read(self, node: Node) -> Handle:
        """Return the handle by which to read an inode."""
        kept = self._of(node)
        if kept.reads is None:
            kept.reads = self._fs.open(node, os.O_RDONLY)
        return kept.reads

    def writes(self, node: Node) -> Handle | None:
        """Return the handle by which to write an inode if it is open, and no thread changes it."""
        kept = self._kept.get(node)
        return None if kept is None or node.copying is not None else kept.writes

    def to_write(self, node: Node) -> Handle:
        """Return the handle by which to write an upper inode."""
        kept = self._of(node)
        if kept.writes is None:
            kept.writes = self._fs.open(node, os.O_RDWR)
        return kept.writes

    @contextmanager
    def in_use(self, node: Node) -> Iterator[None]:
        """Keep an inode open during the block."""
        kept = self._kept.get(node)
        if kept is None:
            yield
            return
        kept.users += 1
        try:
            yield
        finally:
            kept.users -= 1

    def forget(self, node: Node) -> None:
        """Close an inode that is no longer used."""
        kept = self._kept.pop(node, None)
        if kept is not None:
            self._close(kept)

    def end_writes(self, node: Node) -> bool:
        """Close the handle that writes an inode; False while a thread uses it."""
        kept = self._kept.get(node)
        if kept is None or kept.writes is None:
            return True
        if kept.users:
            return False
        writes, kept.writes = kept.writes, None
        self._fs.release_handle(writes)
        return True

    def let_go(self, node: Node) -> bool:
        """Close an inode whose data is now in another file; False while a thread uses it."""
        kept = self._kept.get(node)
        if kept is not None and kept.users:
            return False
        self.forget(node)
        return True

    def _of(self, node: Node) -> _Kept:
        kept = self._kept.get(node)
        if kept is not None:
            self._kept.move_to_end(node)
            return kept
        if len(self._kept) >= _MOST:
            oldest = next(iter(self._kept))
            if self._kept[oldest].users:
                self._kept.move_to_end(oldest)
            else:
                self.forget(oldest)
        kept = self._kept[node] = _Kept()
        return kept

    def _close(self, kept: _Kept) -> None:
        for handle in (kept.reads, kept.writes):
            if handle is not None:
                self._fs.release_handle(handle)
