"""Run cowfs commands without waiting for Python to start, which would be most of a short test's time.

Two processes, one of root and one of nobody, have all modules loaded and fork for each command. A command
runs in a new Python process instead if COWFS_TESTS_COLD is in the environment, or if its caller has other
namespaces or processors than these two.
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
"""With one of these, every command runs in a new process. coverage cannot measure forked commands."""
_LIMITS = (resource.RLIMIT_NOFILE, resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_FSIZE)
_forkers: dict[bool, _Forker] = {}


@contextmanager
def forkers(root: str) -> Iterator[None]:
    """Run the processes within this block. They load cowfs from the directory *root*."""
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
    """Run a cowfs command and wait for its end; return None if it needs a new Python process.

    Raise subprocess.TimeoutExpired after *timeout* seconds, like :func:`tests.support.system.run`.
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
    """Return what a command inherits from its caller that a request does not contain."""
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
        """Wait until the process has started, so that the guard knows its command line."""
        assert self._socket.recv(16), "the forker has not started"

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
        assert told.count(b"\n") == 2, f"the forker has exited: {told!r}"
        code = int(told.split()[1])
        texts = [_text(data) for data in (out, err)]
        return subprocess.CompletedProcess(["cowfs", *arguments], code, *texts)

    def close(self) -> None:
        """Close the socket, and wait until the process exits."""
        self._socket.close()
        self._process.wait()


def _read_all(
    streams: Sequence[IO[bytes] | socket.socket], deadline: float, call: tuple[list[str], float]
) -> list[bytes]:
    """Read all streams to their ends. The first begins with a process ID; kill it at *deadline*."""
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
