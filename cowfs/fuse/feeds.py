"""Report changes as they happen: for ``cowfs watch``.

A slow reader does not delay the mount: unread changes are kept up to a limit, and a reader that falls further
behind gets a message and is dropped. The format is in docs/finding-changes.md.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from socket import MSG_DONTWAIT, MSG_PEEK
from typing import Any

import trio

from cowfs.errors import SystemFailure
from cowfs.jsontext import put_path, stamp
from cowfs.linux.processes import Process, described

VERSION = 1
_MOST_BYTES = 4 << 20
"""How many bytes a reader may be behind."""
_MOST_WATCHERS = 32
_AT_ONCE = 64 << 10
_SLOW = b'{"ended": "slow"}\n{"end": true}\n'
_UNMOUNTED = b'{"ended": "unmounted"}\n{"end": true}\n'


class Feed:
    """The watchers of a mount."""

    def __init__(self, in_trio: Callable[[Callable[[], object]], None], changed: Callable[[], None]) -> None:
        """*changed* is called when the first watcher comes, and when the last leaves."""
        self._in_trio = in_trio
        self._changed = changed
        self.watchers: set[Watcher] = set()
        self.settle: Callable[[], None] = lambda: None
        """Called before the last message to a watcher: reports what is held back."""

    def watch(self) -> Watcher:
        """Return a watcher that gets all reports from now on. SystemFailure if there are too many
        watchers."""
        if len(self.watchers) >= _MOST_WATCHERS:
            raise SystemFailure(f"{_MOST_WATCHERS} watch this mount already", "end one of them")
        watcher = Watcher(self, self._in_trio)
        self.watchers.add(watcher)
        if len(self.watchers) == 1:
            self._changed()
        return watcher

    def leave(self, watcher: Watcher) -> None:
        """Remove a watcher."""
        if watcher in self.watchers:
            self.watchers.remove(watcher)
            if not self.watchers:
                self._changed()

    def tell(self, operation: str, process: Process | None, path: bytes, to: bytes | None = None) -> None:
        """Report a change that has just happened to all watchers."""
        line = json.dumps(_event(operation, process, path, to)).encode() + b"\n"
        for watcher in list(self.watchers):
            watcher.take(line)


class Watcher:
    """A watcher: a connection to the control socket."""

    def __init__(self, feed: Feed, in_trio: Callable[[Callable[[], object]], None]) -> None:
        self._feed = feed
        self._in_trio = in_trio
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._lost = False
        self._more = trio.Event()
        self._told = False

    def take(self, line: bytes) -> None:
        """Queue a line until it is read."""
        if self._bytes > _MOST_BYTES:
            self._lost = True
            self._feed.leave(self)
        else:
            self._lines.append(line)
            self._bytes += len(line)
        if not self._told:
            self._told = True
            self._in_trio(self._more.set)

    async def pour(self, stream: trio.SocketStream) -> None:
        """Send all lines until the client leaves, was dropped, or the mount ends."""
        rest = memoryview(b'{"watching": true}\n')
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_until_left, stream, nursery.cancel_scope)
                while rest:
                    while rest:
                        rest = rest[await stream.socket.send(rest) :]
                    rest = memoryview(await self._next())
                nursery.cancel_scope.cancel()
        except* OSError:  # the client has left
            pass
        finally:
            self._feed.settle()
            last = _SLOW if self._lost else _UNMOUNTED
            self._say(
                stream, bytes(rest) + b"".join(self._lines) + (last if self._lines or not self._lost else b"")
            )
            self._feed.leave(self)

    async def _next(self) -> bytes:
        """Wait for lines, and return those queued since the last call; b"" after the last message."""
        while not self._lines and not self._lost:
            self._more, self._told = trio.Event(), False
            await self._more.wait()
        if not self._lines:
            return b""
        lines = []
        size = 0
        while self._lines and size < _AT_ONCE:
            line = self._lines.popleft()
            lines.append(line)
            size += len(line)
        self._bytes -= size
        if self._lost and not self._lines:
            lines.append(_SLOW)
        return b"".join(lines)

    @staticmethod
    def _say(stream: trio.SocketStream, words: bytes) -> None:
        """Send what fits without waiting."""
        rest = memoryview(words)
        with suppress(OSError):
            while rest:
                rest = rest[stream.socket._sock.send(rest, MSG_DONTWAIT) :]  # type: ignore[attr-defined]


async def _until_left(stream: trio.SocketStream, scope: trio.CancelScope) -> None:
    """Cancel *scope* when the client has closed the connection."""
    while True:
        await trio.lowlevel.wait_readable(stream.socket)
        with suppress(BlockingIOError):
            try:
                if stream.socket._sock.recv(1, MSG_PEEK | MSG_DONTWAIT):  # type: ignore[attr-defined]
                    stream.socket._sock.recv(_AT_ONCE, MSG_DONTWAIT)  # type: ignore[attr-defined]
                    continue
            except ConnectionError:
                pass
            scope.cancel()
            return


def _event(operation: str, process: Process | None, path: bytes, to: bytes | None) -> dict[str, Any]:
    """Return a change as an object for JSON."""
    event: dict[str, Any] = {
        "version": VERSION,
        "time": stamp(time.time_ns() // 1000),
        "operation": operation,
    }
    put_path(event, "path", path)
    if to is not None:
        put_path(event, "to", to)
    event["process"] = None if process is None else described(process)
    return event
