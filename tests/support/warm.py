"""Run commands of cowfs without waiting for Python to start, which would be most of a short test's time.

A process for root and one for nobody have all modules loaded and fork for each command. A command starts by
itself if COWFS_TESTS_COLD is in the environment, or if its caller has other mounts or processors than these
processes.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO

from tests.support.forker import LONGEST_REQUEST
from tests.support.system import as_nobody_prefix

_COLD = {"COWFS_TESTS_COLD", "COVERAGE_PROCESS_CONFIG"}
"""With one of these each command starts by itself: coverage measures no process that ends by _exit(2)."""
_LIMITS = (resource.RLIMIT_NOFILE, resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_FSIZE)
_forkers: dict[bool, _Forker] = {}


@contextmanager
def forkers(root: str) -> Iterator[None]:
    """Keep the processes within this block. They load the cowfs of the directory *root* in the background."""
    if not _COLD.isdisjoint(os.environ):
        yield
        return
    for nobody in {False, os.geteuid() == 0}:
        _forkers[nobody] = _Forker(as_nobody_prefix() if nobody else [], root)
    for one in _forkers.values():
        one.wait()
    try:
        yield
    finally:
        for one in _forkers.values():
            one.close()
        _forkers.clear()


def run(
    arguments: Sequence[str | os.PathLike[str]],
    nobody: bool,
    environment: Mapping[str, str],
    directory: str | None,
    timeout: float,
) -> subprocess.CompletedProcess[str] | None:
    """Run a command of cowfs to its end; None if that has to be done in the usual way.

    Like :func:`tests.support.system.run` raises subprocess.TimeoutExpired after *timeout* seconds.
    """
    forker = _forkers.get(nobody and os.geteuid() == 0)
    if forker is None or forker.surroundings != _surroundings():
        return None
    words = [os.fspath(word) for word in arguments]
    try:
        return forker.run(words, environment, directory or os.getcwd(), timeout)
    except FileNotFoundError:  # the working directory was removed
        return None


def _surroundings() -> tuple[object, ...]:
    """What a command inherits that is not told to the process that forks."""
    spaces = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("mnt", "user", "pid", "net")]
    return os.getpid(), os.geteuid(), os.getegid(), os.sched_getaffinity(0), spaces


class _Forker:
    def __init__(self, prefix: Sequence[str], root: str) -> None:
        self.surroundings = _surroundings()
        self._socket, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LONGEST_REQUEST)
        with there:
            self._process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "tests.support.forker", str(there.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[there.fileno()],
                cwd="/",
                env={**os.environ, "PYTHONPATH": root},
            )

    def wait(self) -> None:
        """Wait until the process is what it will be: before, the watch over processes would not know it."""
        assert self._socket.recv(16), "the process that forks has not started"

    def run(
        self, arguments: list[str], environment: Mapping[str, str], directory: str, timeout: float
    ) -> subprocess.CompletedProcess[str]:
        mask = os.umask(0)
        os.umask(mask)
        asked = {
            "arguments": arguments,
            "environment": dict(environment),
            "directory": directory,
            "umask": mask,
            "limits": {number: resource.getrlimit(number) for number in _LIMITS},
        }
        answer, answers = socket.socketpair()
        output, its_output = os.pipe()
        errors, its_errors = os.pipe()
        with answer, open(output, "rb") as said, open(errors, "rb") as complained:
            try:
                message = json.dumps(asked).encode()
                socket.send_fds(self._socket, [message], [its_output, its_errors, answers.fileno()])
            finally:
                answers.close()
                os.close(its_output)
                os.close(its_errors)
            streams: list[IO[bytes] | socket.socket] = [answer, said, complained]
            told, out, err = _read_all(streams, time.monotonic() + timeout, (arguments, timeout))
        assert told.count(b"\n") == 2, f"the process that forks has ended: {told!r}"
        code = int(told.split()[1])
        texts = [_text(data) for data in (out, err)]
        return subprocess.CompletedProcess(["cowfs", *arguments], code, *texts)

    def close(self) -> None:
        """Let it end."""
        self._socket.close()
        self._process.wait()


def _read_all(
    streams: Sequence[IO[bytes] | socket.socket], deadline: float, call: tuple[list[str], float]
) -> list[bytes]:
    """Read all streams to their ends. The first begins with a process ID, which is killed at *deadline*."""
    data = [bytearray() for _ in streams]
    with selectors.DefaultSelector() as selector:
        for number, stream in enumerate(streams):
            selector.register(stream, selectors.EVENT_READ, number)
        while selector.get_map():
            ready = selector.select(max(deadline - time.monotonic(), 0))
            if not ready:
                with suppress(ProcessLookupError, ValueError, IndexError):
                    os.kill(int(data[0].split()[0]), signal.SIGKILL)
                raise subprocess.TimeoutExpired(["cowfs", *call[0]], call[1], *map(bytes, data[1:]))
            for key, _ in ready:
                piece = os.read(key.fd, 65536)
                data[key.data] += piece
                if not piece:
                    selector.unregister(key.fileobj)
    return [bytes(piece) for piece in data]


def _text(data: bytes) -> str:
    """Decode as subprocess does for text."""
    return data.decode(errors="surrogateescape").replace("\r\n", "\n").replace("\r", "\n")
