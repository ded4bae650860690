"""Limit how many inodes the kernel knows: each costs a node, and the kernel only forgets for its own needs.

If the nodes exceed the daemon's share of the memory, it asks the kernel to forget the oldest unused inodes.
The kernel keeps those that are open, mapped, watched, mounted on, or a process's working directory, and the
directories above them.

Linux from 6.18 on takes a list of inodes (FUSE_NOTIFY_PRUNE in linux/fuse.h). Before, root can drop all
unused inodes by reconfiguring the superblock without changes (shrink_dcache_sb() in reconfigure_super(),
fs/super.c). Without either, only the kernel's own need for memory limits them. Invalidating entries is not
an option: it detaches mounts, and unhashes names in use (d_invalidate()).
"""

from __future__ import annotations

import errno
import math
import os
import struct
import sys
from array import array
from collections.abc import Callable
from functools import partial

import trio

from cowfs.fuse.user_threads import in_thread
from cowfs.linux import limits
from cowfs.overlay.node import NodeTable

A_NODE = 1 << 10
"""About how many bytes of memory each inode that the kernel knows costs (tests/mount/test_many_inodes.py)."""
_FEWEST = 1 << 13
_PRUNE = 9  # enum fuse_notify_code
_NOTIFY = struct.Struct("=IiQII8x")  # struct fuse_out_header, struct fuse_notify_prune_out
_AT_ONCE = 512
_PAUSE = 0.1
"""Seconds in which the kernel reports part of what it has forgotten."""
_AGAIN = 0.5
"""Seconds after which the kernel is asked again when that was not enough, at first …"""
_AGAIN_AT_LAST = 64.0
"""… and at last: each time twice as long."""


def most_inodes() -> int:
    """Return how many nodes fit into a sixteenth of this process's memory."""
    return max(limits.memory() // 16 // A_NODE, _FEWEST)


def prune(fd: int, inodes: array[int]) -> None:
    """Ask the kernel, over the connection *fd*, to forget unused inodes. May block.

    EINVAL if the kernel does not know the request.
    """
    size = _NOTIFY.size + len(inodes) * inodes.itemsize
    os.write(fd, _NOTIFY.pack(size, _PRUNE, 0, len(inodes), 0) + inodes.tobytes())


class InodeLimit:
    """Keeps the number of nodes at *most*, and below it for some time after reaching it."""

    def __init__(
        self, nodes: NodeTable, most: int, in_trio: Callable[[Callable[[], object]], object] | None = None
    ) -> None:
        """*in_trio* runs a call in trio's thread: other threads also make nodes."""
        self._nodes = nodes
        self._most = nodes.many = most
        self._in_trio = in_trio or (lambda call: call())
        self._expect()

    def _expect(self) -> None:
        self._many = many = trio.Event()

        def tell() -> None:
            self._in_trio(many.set)

        self._nodes.too_many = tell

    async def keep_few(self, fd: int, drop_all: Callable[[], None]) -> None:
        """Enforce the limit until cancelled.

        *fd* is the connection. *drop_all* makes the kernel drop all unused inodes; OSError if it cannot.
        """
        nodes, aim, pause = self._nodes, self._most - self._most // 4, _AGAIN
        while True:
            with trio.move_on_after(pause if len(nodes) > self._most else math.inf):
                await self._many.wait()
            nodes.many = sys.maxsize  # no notice needed
            try:
                await self._prune(fd, aim)
            except OSError as failure:
                if failure.errno != errno.EINVAL:
                    raise
                await in_thread(drop_all)
            await self._await_forgets(aim)
            # The rest is in use, or users add inodes as fast: the next round will tell.
            pause = min(2 * pause, _AGAIN_AT_LAST) if len(nodes) > self._most else _AGAIN
            self._expect()
            nodes.many = max(self._most, len(nodes) + self._most // 8)

    async def _prune(self, fd: int, aim: int) -> None:
        """Prune the nodes once, by quarters from the oldest on.

        In each quarter, the newest come first: a directory cannot be forgotten before its contents.
        """
        nodes = self._nodes
        quarter = len(nodes) // 4 + 1
        for _ in range(4):
            oldest = nodes.oldest(quarter)
            oldest.reverse()
            for start in range(0, quarter, _AT_ONCE):
                inodes = oldest[start : start + _AT_ONCE]
                for ino in inodes:
                    nodes.renew(ino)
                await in_thread(partial(prune, fd, inodes))
                if len(nodes) <= aim:
                    return

    async def _await_forgets(self, aim: int) -> None:
        """Wait for the kernel's FORGET requests."""
        before = len(self._nodes) + 1
        while aim < len(self._nodes) < before:
            before = len(self._nodes)
            await trio.sleep(_PAUSE)
