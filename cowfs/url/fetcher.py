"""The fetching process: it sends requests to servers and reads their answers for the daemon.

Root's fetcher runs as nobody, and may do nothing but talk to servers; a confined daemon has no network. If it
hangs or dies, its parent process, which does nothing else, starts it again.

Run as ``python -m cowfs.url.fetcher FD``, by :mod:`cowfs.url.link`.
"""

from __future__ import annotations

import ctypes
import heapq
import itertools
import json
import netrc
import os
import pwd
import random
import resource
import select
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn, Protocol

from cowfs.linux.seccomp import refuse_all_but_network
from cowfs.url.http import HttpFile, Login
from cowfs.url.protocol import (
    LONGEST,
    PIECE,
    Kind,
    Message,
    Refused,
    Unreachable,
    Version,
    pack,
    pack_json,
    unpack,
)

NOBODY = 65534
_THREADS = 6
"""How many requests are under way at a time."""
_SILENCE = 15.0
"""Seconds in which a server must send something."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
"""Seconds between one attempt and the next; each is about twice the one before."""
_SAID_AFTER = 3.0
"""Seconds without an answer after which this is logged."""
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38


class RemoteFile(Protocol):
    """A file on a server."""

    def version(self, until: float) -> Version: ...

    def read(self, start: int, length: int, version: Version, until: float) -> bytes: ...


class _Work(NamedTuple):
    order: tuple[int, int]
    """First what somebody waits for, then what may be wanted; of each kind the oldest."""
    message: Message
    since: float


class Worker:
    """Answers the requests that arrive on a socket."""

    def __init__(self, connection: socket.socket, login: Login) -> None:
        self._connection = connection
        self._login = login
        self._file: RemoteFile | None = None
        self._version: Version | None = None
        self._url = ""
        self._work: list[_Work] = []
        self._under_way: set[int] = set()
        self._some = threading.Condition()
        self._count = itertools.count()
        self._away_since = 0.0
        self._told = False
        self._state = threading.Condition()

    def run(self) -> None:
        """Answer until the socket is closed."""
        self._send(pack(Kind.READY))
        while raw := self._connection.recv(LONGEST):
            message = unpack(raw)
            if message.kind == Kind.OPEN and not self._url:  # else it was asked for before we had begun, too
                self._url = message.json()["url"]
                threading.Thread(target=self._open, args=[message], daemon=True).start()
            elif message.kind == Kind.FETCH:
                self._put(message)

    def _put(self, message: Message) -> None:
        with self._some:
            if message.number not in self._under_way:
                self._under_way.add(message.number)
                order = (message.length >> 31, next(self._count))
                heapq.heappush(self._work, _Work(order, message, time.monotonic()))
                self._some.notify()

    def _open(self, message: Message) -> None:
        asked = message.json()
        until = time.monotonic() + asked["patience"]
        try:
            self._file = file = self._find(self._url)
            known = Version.of_json(asked["version"]) if asked["version"] else None
            version = known or self._with_patience(lambda: file.version(until + _SILENCE), until)
        except Refused as error:
            return self._failed(message.number, error.why, error.hint)
        except Unreachable as error:
            return self._failed(message.number, error.why, "check the URL and the network")
        except Exception as error:
            return self._failed(message.number, f"{type(error).__name__}: {error}")
        self._version = version
        self._send(pack_json(Kind.OPENED, message.number, version.to_json()))
        for number in range(_THREADS):
            threading.Thread(target=self._fetch_for_ever, name=f"fetches-{number}", daemon=True).start()
        return None

    def _find(self, url: str) -> RemoteFile:
        if url.lower().startswith(("http://", "https://")):
            return HttpFile(url, self._login, _SILENCE)
        from cowfs.url.by_fsspec import FsspecFile

        return FsspecFile(url)

    def _fetch_for_ever(self) -> None:
        while True:
            with self._some:
                while not self._work:
                    self._some.wait()
                work = heapq.heappop(self._work)
            self._fetch(work)
            with self._some:
                self._under_way.discard(work.message.number)

    def _fetch(self, work: _Work) -> None:
        message = work.message
        number, start, length = message.number, message.place, message.length & 0x7FFFFFFF
        (patience,) = json.loads(message.rest)
        file, version, until = self._file, self._version, work.since + patience
        assert file is not None and version is not None
        try:
            data = self._with_patience(lambda: file.read(start, length, version, until), until)
        except Refused as error:
            return self._failed(number, error.why, error.hint, changed=error.changed)
        except Unreachable as error:
            return self._failed(number, error.why, "it is tried again when something is read", away=True)
        except Exception as error:
            return self._failed(number, f"{type(error).__name__}: {error}")
        for at in range(0, length, PIECE):
            self._send(pack(Kind.DATA, number, at, rest=data[at : at + PIECE]))
        self._send(pack(Kind.DONE, number))
        return None

    def _with_patience(self, call: Any, until: float) -> Any:
        """Return the result of *call*, retried until it succeeds or it is too late."""
        pause = _FIRST_PAUSE
        while True:
            try:
                result = call()
            except Unreachable as error:
                self._is_away(error.why)
                now = time.monotonic()
                wait = max(error.wait, pause * random.uniform(0.5, 1.5))
                if now + wait > until:
                    raise
                self._pause(wait, at_least=error.wait)
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                self._is_back()
                return result

    def _is_away(self, why: str) -> None:
        with self._state:
            now = time.monotonic()
            self._away_since = self._away_since or now
            tell = not self._told and now - self._away_since >= _SAID_AFTER
            self._told |= tell
        if tell:
            self._say("warning", f"{self._url}: cannot be read for now: {why}; trying again")

    def _pause(self, seconds: float, at_least: float) -> None:
        """Wait for some seconds, or until another request succeeds."""
        time.sleep(at_least)
        with self._state:
            if self._away_since:
                self._state.wait(max(seconds - at_least, 0))

    def _is_back(self) -> None:
        with self._state:
            told, away = self._told, self._away_since
            self._told, self._away_since = False, 0.0
            if away:
                self._state.notify_all()
        if told:
            self._say("info", f"{self._url}: can be read again, after {time.monotonic() - away:.0f} s")

    def _say(self, level: str, text: str) -> None:
        self._send(pack_json(Kind.SAID, 0, {"level": level, "text": text}))

    def _failed(self, number: int, why: str, hint: str = "", **more: bool) -> None:
        self._send(pack_json(Kind.FAILED, number, {"why": why[:1000], "hint": hint, **more}))

    def _send(self, raw: bytes) -> None:
        with suppress(OSError):  # the parent is gone
            self._connection.sendall(raw)


def main(fd: int) -> NoReturn:
    """Fetch, for the process at the other end of the socket *fd*, until that is closed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # this process ends with the daemon
    login = _logins()
    _give_up()
    connection = socket.socket(fileno=fd)
    pause = 0.0
    while True:
        begun = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _ctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            try:
                Worker(connection, login).run()
            finally:
                os._exit(0)
        if _outlives(connection, pid):
            os._exit(0)
        pause = 0.0 if time.monotonic() - begun > 10 else min(pause + 0.5, 5.0)
        time.sleep(pause)


def _outlives(connection: socket.socket, pid: int) -> bool:
    """Wait until the worker dies, or the connection closes: then kill the worker, and return True."""
    worker = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(worker, select.POLLIN)
    poll.register(connection, 0)  # POLLHUP alone
    events = dict(poll.poll())
    is_over = connection.fileno() in events
    if is_over:
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(worker)
    return is_over


def _logins() -> Login:
    """Return a lookup of the logins in the user's netrc(5), read now because it cannot be read later."""
    own = os.environ.get("NETRC")
    with suppress(KeyError):
        own = own or os.path.join(_home(), ".netrc")
    hosts: dict[str, tuple[str, str]] = {}
    if own is not None:
        with suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
            for host, (user, _, password) in netrc.netrc(own).hosts.items():
                if host != "default":
                    hosts[host] = (user, password or "")
    return hosts.get


def _home() -> str:
    """Return the home directory. KeyError if there is none.

    $HOME counts if it belongs to the user: with sudo it may be another user's, and as root of a user
    namespace the directory of the password file is another user's.
    """
    home = os.environ.get("HOME", "")
    with suppress(OSError):
        if os.stat(home).st_uid == os.geteuid():
            return home
    return pwd.getpwuid(os.geteuid()).pw_dir


def _give_up() -> None:
    """Drop the privileges of root, forbid new ones, and forbid all system calls but those for the network."""
    if os.geteuid() == 0:
        with suppress(OSError):  # a user namespace without that user
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
    with suppress(OSError):
        os.chdir("/")
    resource.setrlimit(resource.RLIMIT_NICE, (0, 0))  # root's daemon has raised it for its own threads
    _ctl(_PR_SET_NO_NEW_PRIVS, 1)
    with suppress(OSError):  # no libseccomp
        refuse_all_but_network()


def _ctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
