"""Copy the missing data of lazily copied files to the store, while others use them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import trio

from cowfs.fuse.loop import RequestLoop
from cowfs.fuse.user_threads import in_thread
from cowfs.layers.base import may_wait_for_disk
from cowfs.layers.partial import PartialFile
from cowfs.linux.files import LACK_OF_ROOM
from cowfs.overlay import incomplete
from cowfs.overlay.fs import Pending
from cowfs.overlay.overlay import Overlay

log = logging.getLogger(__name__)

_BEGIN = 2.0
"""Seconds until the copying begins: a program that opens a file may close it by then, and sync it alone."""
_AGAIN = 30.0
"""Seconds until it checks again whether there is room."""
_SYNCED = 8 << 20
"""How many bytes are copied before a sync: a program that syncs a file waits for no more than that."""
_REST, _MOST_REST = 0.005, 1.0
"""The copying rests as long as it has worked, within these bounds in seconds."""


class LazyCopier:
    """Runs one task while there is something to copy."""

    def __init__(self, fs: Overlay, loop: RequestLoop) -> None:
        self._fs = fs
        self._loop = loop
        self._is_running = False
        self._failed: set[int] = set()
        """Files that remain partial until the next mount, because copying failed."""

    def soon(self) -> None:
        """Start the task soon, if there is a partial file."""
        if not self._is_running and self._waiting():
            self._is_running = True
            self._loop.in_trio(lambda: trio.lowlevel.spawn_system_task(self._run))

    def _waiting(self) -> list[int]:
        return [ino for ino in self._fs.pending if ino not in self._failed]

    async def _run(self) -> None:
        try:
            await trio.sleep(_BEGIN)
            while self._fs.host.wants_rest() and (waiting := self._waiting()):
                progress = [await self._try(ino) for ino in waiting]
                if not all(progress):
                    await trio.sleep(_AGAIN)
        except Exception:
            log.exception("files remain partly copied up until the next mount")
        finally:
            self._is_running = False

    async def _try(self, ino: int) -> bool:
        """Continue with one file; False if it must wait for space."""
        pending = self._fs.pending.get(ino)
        if pending is None:
            return True
        try:
            return await self._bring_up(ino, pending)
        except OSError as failure:
            self._failed.add(ino)
            log.warning("%r remains partly copied up: %s", pending.path, failure.strerror)
            return True

    async def _bring_up(self, ino: int, pending: Pending) -> bool:
        """Copy up the rest of one file; False if there is not enough space."""
        fs = self._fs
        file = incomplete.open_rest(fs, pending)
        try:
            steps = file.copy_steps()
            while True:
                if not incomplete.has_room(fs, file):
                    return False
                begun = time.monotonic()
                try:
                    there_is_more = await in_thread(lambda: _copy_some(file, steps))
                except OSError as failure:
                    if failure.errno not in LACK_OF_ROOM:
                        raise
                    return fs.host.make_room()
                if fs.pending.get(ino) is not pending:
                    return True  # it is complete, or removed
                if not there_is_more:
                    with may_wait_for_disk(fs.upper):
                        incomplete.complete(fs, pending)
                    return True
                await trio.sleep(min(max(time.monotonic() - begun, _REST), _MOST_REST))
        finally:
            file.close()


def _copy_some(file: PartialFile, steps: Iterator[int]) -> bool:
    """Copy a few MiB; return whether there may be more."""
    copied = 0
    for size in steps:
        copied += size
        if copied >= _SYNCED:
            file.fsync(True)
            return True
    return False
