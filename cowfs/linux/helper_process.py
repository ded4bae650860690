"""A small process that stays where the daemon came from, and does a few errands there for it.

The daemon of root's mount shuts itself in (:mod:`cowfs.linux.confine`). What it cannot do from in there
another process does, which was forked before anything that others made had been read: it mounts, unmounts,
runs e2fsck. What it does is a fixed list, with nothing in it that is taken for a path. Each errand is a
process of its own, so that one that waits for the daemon holds up no other.
"""

from __future__ import annotations

import array
import errno
import gc
import json
import logging
import os
import signal
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from cowfs.linux.signals import hold_back

Errand = Callable[[dict[str, Any], list[int]], dict[str, Any]]
"""Gets what it is asked for and descriptors, which are closed after it; returns what JSON can hold, with a
descriptor to be handed over as ``fd``. OSError goes back to who asked."""

_LONGEST = 1 << 16
_MOST_FDS = 4


class Outside:
    """The daemon's end."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self._connection = connection
        self._pid = pid

    def ask(self, errand: str, fds: Sequence[int] = (), **arguments: Any) -> dict[str, Any]:
        """Have an errand done; return what it tells. Blocks; for any thread. Raises OSError."""
        request = json.dumps({"errand": errand, **arguments}).encode()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours:
            with theirs, suppress(BrokenPipeError):  # there is no answer then
                socket.send_fds(self._connection, [request], [theirs.fileno(), *fds])
            answer, given, _, _ = socket.recv_fds(ours, _LONGEST, 1, socket.MSG_CMSG_CLOEXEC)
            while more := ours.recv(_LONGEST):
                answer += more
        if not answer:
            raise OSError(errno.ECONNRESET, "the daemon's helper process is gone")
        reply: dict[str, Any] = json.loads(answer)
        if "errno" in reply:
            raise OSError(reply["errno"], reply["strerror"])
        return {**reply, "fd": given[0]} if given else reply

    def close(self) -> None:
        """Let the process end, and wait for that."""
        self._connection.close()
        with suppress(ChildProcessError):
            os.waitpid(self._pid, 0)


_current: Outside | None = None


def current() -> Outside | None:
    """Return what does errands for this process, if anything does."""
    return _current


def start(errands: Mapping[str, Errand], inline: Collection[str]) -> Outside:
    """Fork the process that does *errands*; those of *inline* itself, so that the others know of them.

    To be called while there is one thread. From now on :func:`current` has it.
    """
    global _current  # noqa: PLW0603 - a process has one
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    gc.collect()
    gc.freeze()  # a collection writes to what it looks at: it would have a page of its own in each process
    pid = os.fork()
    if pid == 0:
        try:
            _stay(theirs, errands, inline)
        finally:
            os._exit(0)
    theirs.close()
    _current = Outside(ours, pid)
    return _current


def end() -> None:
    """Let it end."""
    global _current  # noqa: PLW0603
    if _current is not None:
        _current.close()
        _current = None


def _stay(connection: socket.socket, errands: Mapping[str, Errand], inline: Collection[str]) -> None:
    """Serve requests until the daemon is gone."""
    _leave_everything(connection.fileno())
    while True:
        message, fds, _, _ = socket.recv_fds(connection, _LONGEST, 1 + _MOST_FDS, socket.MSG_CMSG_CLOEXEC)
        if not message:
            return
        request = json.loads(message)
        if request["errand"] in inline:
            _do(errands, request, fds)
        elif os.fork() == 0:
            connection.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _do(errands, request, fds)
            _end()
        for fd in fds:
            os.close(fd)


def _leave_everything(kept: int) -> None:
    """Keep no terminal, no files of the daemon's and no signals but SIGKILL: we end when it does."""
    logging.getLogger().handlers.clear()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd != kept:
            with suppress(OSError):  # the listing's own
                os.close(fd)
    os.setsid()
    os.chdir("/")
    hold_back()
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them


def _do(errands: Mapping[str, Errand], request: dict[str, Any], fds: list[int]) -> None:
    with socket.socket(fileno=os.dup(fds[0])) as asker:
        try:
            reply = errands[request["errand"]](request, fds[1:])
        except OSError as error:
            reply = {"errno": error.errno or errno.EIO, "strerror": error.strerror or str(error)}
        except Exception as error:
            reply = {"errno": errno.EIO, "strerror": repr(error)}
        given = reply.pop("fd", -1)
        with suppress(OSError):  # nobody waits any more
            if given >= 0:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [given]))]
                asker.sendmsg([json.dumps(reply).encode()], rights)
            else:
                asker.sendall(json.dumps(reply).encode())


def _end() -> NoReturn:
    os._exit(0)
