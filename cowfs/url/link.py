"""The reader's end: send requests to the fetching process, await its answers, and repeat them if it dies."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from cowfs.errors import LayerError, SystemFailure
from cowfs.linux.signals import start
from cowfs.url.protocol import LONGEST, PIECE, Kind, Message, Version, pack, pack_json, unpack

log = logging.getLogger(__name__)

_OPENING = 5.0
"""Seconds in which a server must be there when a file is opened."""
_GRACE = 10.0
"""This many seconds after its own timeout should have expired, the fetching process is given up."""
_SLOW_OPENING = 15.0
"""Seconds more in which a server may answer slowly when a file is opened."""
_LOOK = 0.5
"""Seconds after which is looked whether anybody still waits, and whether it was sent at all."""
_ONLY_IF_ROOM = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_NONSENSE = (ValueError, KeyError, TypeError, RecursionError)
"""What an invalid message raises: the fetching process is trusted as little as the server."""
_SILENT = 60.0
"""Seconds in which the log is not told the same of one file again."""


class Fetch:
    """Bytes that were requested."""

    __slots__ = (
        "_done",
        "error",
        "is_ending",
        "length",
        "number",
        "parts",
        "sent",
        "since",
        "start",
        "urgent",
    )

    def __init__(self, number: int, start: int, length: int, *, urgent: bool) -> None:
        self.number = number
        self.start = start
        self.length = length
        self.urgent = urgent
        self.since = time.monotonic()
        self.sent = False
        self.is_ending = False
        self.parts: dict[int, bytes] = {}
        self.error: OSError | None = None
        self._done = threading.Event()

    def finish(self, error: OSError | None = None) -> None:
        """Let the waiting readers continue."""
        self.error = error
        self._done.set()

    def wait(self, seconds: float) -> bool:
        """Wait at most *seconds*; return whether the bytes have arrived, or failed."""
        return self._done.wait(seconds)

    def data(self) -> bytes:
        """Return all bytes. OSError."""
        if self.error is not None:
            raise OSError(self.error.errno, self.error.strerror)
        return b"".join(self.parts[at] for at in sorted(self.parts))


class Process(Protocol):
    """The fetching process, which ends when the socket is closed."""

    pid: int

    def wait(self, timeout: float | None = None) -> int: ...


Start = Callable[[int], Process]
"""Start what fetches for the other end of the socket, of which it gets a descriptor."""


def start_process(fd: int) -> subprocess.Popen[bytes]:
    """Start the fetching process. OSError."""
    return subprocess.Popen(
        [sys.executable, "-I" if sys.flags.isolated else "-P", "-m", "cowfs.url.fetcher", str(fd)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[fd],
        cwd="/",
        start_new_session=True,
    )


class Link:
    """The connection to the process that fetches one file. Any thread may call the methods."""

    def __init__(self, url: str, patience: float, start: Start = start_process) -> None:
        """Start the process. *patience* is how many seconds to wait for a server. SystemFailure."""
        self.url = url
        self._patience = patience
        self._lock = threading.Lock()
        self._waiting: dict[int, Fetch] = {}
        self._numbers = itertools.count(1)
        self._opening: tuple[int, Fetch] | None = None
        self._opened: Message | None = None
        self._version: Version | None = None
        self._is_gone = False
        self._told: dict[str, float] = {}
        self.received: Callable[[Fetch], None] = lambda _: None
        """Is called, by the thread that receives, before those who wait for something go on."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        try:
            with theirs:
                self._process = start(theirs.fileno())
        except OSError as error:
            ours.close()
            raise SystemFailure(
                f"{url}: cannot start the process that fetches it: {error.strerror}"
            ) from None
        self._thread: threading.Thread | None = None

    def open(self) -> Version:
        """Return the version of the file on the server. Call it once, before anything else. Blocks;
        LayerError.

        Starts the receiving thread.
        """
        fetch = Fetch(next(self._numbers), 0, 0, urgent=True)
        self._opening = (fetch.number, fetch)
        self._thread = threading.Thread(target=self._receive, name="fetched", daemon=True)
        start(self._thread)
        self._send_opening()
        if not fetch.wait(_OPENING + _SLOW_OPENING + _GRACE):
            raise LayerError(
                f"{self.url}: the process that fetches it does not answer", "check the network, and try again"
            )
        answer = self._opened
        if answer is None:
            raise LayerError(
                f"{self.url}: {fetch.error.strerror if fetch.error else 'cannot be read'}",
                "check the network, and try again",
            )
        try:
            said = answer.json()
            if answer.kind == Kind.FAILED:
                raise LayerError(f"{self.url}: {said['why']}", said["hint"])
            self._version = Version.of_json(said)
        except _NONSENSE:
            raise LayerError(f"{self.url}: the process that fetches it sent an invalid reply") from None
        return self._version

    def _send_opening(self) -> None:
        with self._lock:
            opening, version = self._opening, self._version
        if opening is None:
            return
        known = version.to_json() if version is not None else None
        asked = {"url": self.url, "patience": _OPENING, "version": known}
        self._send(pack_json(Kind.OPEN, opening[0], asked))

    def prepare(self, start: int, length: int, *, urgent: bool) -> Fetch:
        """Return a request for bytes, to pass to :meth:`send`."""
        return Fetch(next(self._numbers), start, length, urgent=urgent)

    def send(self, fetch: Fetch) -> None:
        """Send a request for bytes. Does not block."""
        with self._lock:
            if not self._is_gone:
                self._waiting[fetch.number] = fetch
        self._send_fetch(fetch)

    def wait(self, fetch: Fetch, is_over: Callable[[], bool]) -> bytes:
        """Return the bytes. Blocks; EIO, also once *is_over* is true; ESTALE: the file has changed,
        ETIMEDOUT: no answer.
        """
        deadline = fetch.since + self._patience + _GRACE
        while not fetch.wait(0 if self._is_gone else _LOOK):
            if is_over():
                raise OSError(errno.EIO, f"{self.url}: is closed")
            if self._is_gone:
                self._finish(fetch, _gone())
            elif not fetch.sent:
                self._send_fetch(fetch)
            if time.monotonic() > deadline:
                self._tell("error", "the process that fetches it does not answer")
                self._finish(fetch, OSError(errno.ETIMEDOUT, f"{self.url}: no answer"))
        return fetch.data()

    def _send_fetch(self, fetch: Fetch) -> None:
        length = fetch.length | (0 if fetch.urgent else 1 << 31)
        rest = json.dumps([self._patience]).encode()
        fetch.sent = self._send(pack(Kind.FETCH, fetch.number, fetch.start, length, rest))

    def _send(self, raw: bytes) -> bool:
        try:
            self._socket.send(raw, _ONLY_IF_ROOM)
        except OSError:  # the socket is full, or the process is dead
            return False
        return True

    def _receive(self) -> None:
        while True:
            try:
                raw = self._socket.recv(LONGEST)
            except OSError:
                raw = b""
            if not raw:
                break
            try:
                self._take(unpack(raw))
            except _NONSENSE as error:
                self._tell("error", f"the process that fetches it sent an invalid reply: {error!r}")
        with self._lock:
            self._is_gone = True
            waiting, opening = list(self._waiting.values()), self._opening
        for fetch in waiting:
            self._finish(fetch, _gone())
        if opening is not None and self._opened is None:
            opening[1].finish(_gone())

    def _take(self, message: Message) -> None:
        if message.kind == Kind.READY:
            self._begin_anew()
        elif message.kind == Kind.SAID:
            said = message.json()
            log.log(logging.WARNING if said["level"] == "warning" else logging.INFO, "%s", said["text"])
        elif self._opening is not None and message.number == self._opening[0]:
            if self._opened is None:
                self._opened = message
                self._opening[1].finish()
        elif (fetch := self._waiting.get(message.number)) is not None:
            self._take_of(fetch, message)

    def _take_of(self, fetch: Fetch, message: Message) -> None:
        if message.kind == Kind.DATA:
            if message.place % PIECE or message.place >= fetch.length:
                raise ValueError(f"data at {message.place} of {fetch.length}")
            fetch.parts[message.place] = message.rest
        elif message.kind == Kind.DONE:
            got = sum(map(len, fetch.parts.values()))
            wrong = OSError(errno.EIO, f"{got} bytes fetched, not {fetch.length}")
            self._finish(fetch, None if got == fetch.length else wrong)
        elif message.kind == Kind.FAILED:
            said = message.json()
            code = errno.ESTALE if said.get("changed") else errno.ETIMEDOUT if said.get("away") else errno.EIO
            self._tell("error", f"{said['why']} ({said['hint']})" if said["hint"] else said["why"])
            self._finish(fetch, OSError(code, f"{self.url}: {said['why']}"))

    def _begin_anew(self) -> None:
        """Repeat all requests: the process was restarted, and does not know them."""
        if self._version is not None:
            self._tell("warning", "the process that fetches it has died, and is started again")
        self._send_opening()
        with self._lock:
            waiting = list(self._waiting.values())
        for fetch in waiting:
            fetch.parts.clear()
            self._send_fetch(fetch)

    def _finish(self, fetch: Fetch, error: OSError | None) -> None:
        with self._lock:
            self._waiting.pop(fetch.number, None)
            if fetch.is_ending:
                return
            fetch.is_ending = True
        fetch.error = error
        try:
            self.received(fetch)
        finally:
            fetch.finish(error)

    def _tell(self, level: str, text: str) -> None:
        """Log a message, unless it was logged just before."""
        now = time.monotonic()
        if now - self._told.get(text, -_SILENT) < _SILENT:
            return
        self._told = {known: at for known, at in self._told.items() if now - at < _SILENT}
        self._told[text] = now
        log.log(logging.ERROR if level == "error" else logging.WARNING, "%s: %s", self.url, text)

    def close(self) -> None:
        """End the process. Waiting readers get EIO. Safe to call twice."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._thread is not None:
            self._thread.join(5)
        self._socket.close()
        with suppress(subprocess.TimeoutExpired, ChildProcessError):
            self._process.wait(5)


def _gone() -> OSError:
    return OSError(errno.EIO, "the process that fetches is gone")
