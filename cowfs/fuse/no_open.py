"""Files that the kernel reads and writes without an OPEN request (FUSE_NO_OPEN_SUPPORT).

Most files are opened, read once and closed: of the requests of a compiler's run four in five are OPEN and
RELEASE. Where a file of a layer costs us nothing to keep open, since no descriptor stands behind it, we need
neither. So what is used of an inode is opened here when it is first read or written, and closed when the
kernel forgets the inode, or others were used since.

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
    """What is open of the inodes that were used last."""

    def __init__(self, fs: Overlay) -> None:
        self._fs = fs
        self._kept: OrderedDict[Node, _Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def to_read(self, node: Node) -> Handle:
        """Return what an inode is read by."""
        kept = self._of(node)
        if kept.reads is None:
            kept.reads = self._fs.open(node, os.O_RDONLY)
        return kept.reads

    def writes(self, node: Node) -> Handle | None:
        """Return what an inode is written by if it is open, and nobody changes it in a thread."""
        kept = self._kept.get(node)
        return None if kept is None or node.copying is not None else kept.writes

    def to_write(self, node: Node) -> Handle:
        """Return what an inode of the upper is written by."""
        kept = self._of(node)
        if kept.writes is None:
            kept.writes = self._fs.open(node, os.O_RDWR)
        return kept.writes

    def created(self, handle: Handle) -> None:
        """Keep open what was made."""
        self._of(handle.node).writes = handle

    @contextmanager
    def in_use(self, node: Node) -> Iterator[None]:
        """Keep it open meanwhile."""
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
        """Close what is open of an inode that nobody uses any more."""
        kept = self._kept.pop(node, None)
        if kept is not None:
            self._close(kept)

    def end_writes(self, node: Node) -> bool:
        """Close what an inode is written by; False while a thread uses it."""
        kept = self._kept.get(node)
        if kept is None or kept.writes is None:
            return True
        if kept.users:
            return False
        writes, kept.writes = kept.writes, None
        self._fs.release_handle(writes)
        return True

    def let_go(self, node: Node) -> bool:
        """Close what is open of an inode, since its data is now in another file; False while a thread uses
        it.
        """
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
