"""A helper process that stays unconfined, and runs a few errands for the daemon.

The daemon of root's mount confines itself (:mod:`cowfs.linux.confine`), and then cannot mount, unmount or run
e2fsck. The helper does that. It is forked before the daemon reads anything that other users made, runs only a
fixed list of errands, and takes no path from the daemon. Each errand runs in its own process, so that one
that waits for the daemon does not delay the others.
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
"""Takes the request and descriptors, which are closed after it. Returns an object for JSON; its ``fd``, if
any, is a descriptor to pass to the daemon. OSError is passed to the daemon."""

_LONGEST = 1 << 16
_MOST_FDS = 4


class Outside:
    """The daemon's end of the connection."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self._connection = connection
        self._pid = pid

    def ask(self, errand: str, fds: Sequence[int] = (), **arguments: Any) -> dict[str, Any]:
        """Run an errand; return its reply. Blocks. Any thread may call it. OSError."""
        request = json.dumps({"errand": errand, **arguments}).encode()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours:
            with theirs, suppress(BrokenPipeError):  # the answer is empty then
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
        """End the process, and wait until it has ended."""
        self._connection.close()
        with suppress(ChildProcessError):
            os.waitpid(self._pid, 0)


_current: Outside | None = None


def current() -> Outside | None:
    """Return the helper of this process; None if it has none."""
    return _current


def start(errands: Mapping[str, Errand], inline: Collection[str], *, own_session: bool) -> Outside:
    """Fork the helper that runs *errands*, in its *own_session*. It runs those of *inline* itself, so that
    all later ones see the effect.

    Call it while the process has one thread. From now on :func:`current` returns it.
    """
    global _current  # noqa: PLW0603 - a process has one
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    gc.collect()
    gc.freeze()  # a collection writes to the objects it visits, which would copy their pages in each process
    pid = os.fork()
    if pid == 0:
        try:
            _serve(theirs, errands, inline, own_session)
        finally:
            os._exit(0)
    theirs.close()
    _current = Outside(ours, pid)
    return _current


def end() -> None:
    global _current  # noqa: PLW0603
    if _current is not None:
        _current.close()
        _current = None


def _serve(
    connection: socket.socket, errands: Mapping[str, Errand], inline: Collection[str], own_session: bool
) -> None:
    """Serve requests until the daemon has ended."""
    _detach_from_daemon(connection.fileno())
    if own_session:
        os.setsid()
    while True:
        message, fds, _, _ = socket.recv_fds(connection, _LONGEST, 1 + _MOST_FDS, socket.MSG_CMSG_CLOEXEC)
        if not message:
            return
        request = json.loads(message)
        if request["errand"] in inline:
            _run(errands, request, fds)
        elif os.fork() == 0:
            connection.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _run(errands, request, fds)
            _exit()
        for fd in fds:
            os.close(fd)


def _detach_from_daemon(kept: int) -> None:
    """Close the daemon's files except *kept*, leave its terminal, and ignore all signals but SIGKILL.

    The helper ends when the daemon does.
    """
    logging.getLogger().handlers.clear()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd != kept:
            with suppress(OSError):  # the descriptor of this listing, closed by now
                os.close(fd)
    os.chdir("/")
    hold_back()
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no code waits for the children


def _run(errands: Mapping[str, Errand], request: dict[str, Any], fds: list[int]) -> None:
    with socket.socket(fileno=os.dup(fds[0])) as asker:
        try:
            reply = errands[request["errand"]](request, fds[1:])
        except OSError as error:
            reply = {"errno": error.errno or errno.EIO, "strerror": error.strerror or str(error)}
        except Exception as error:
            reply = {"errno": errno.EIO, "strerror": repr(error)}
        given = reply.pop("fd", -1)
        with suppress(OSError):  # the daemon no longer waits
            if given >= 0:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [given]))]
                asker.sendmsg([json.dumps(reply).encode()], rights)
            else:
                asker.sendall(json.dumps(reply).encode())


def _exit() -> NoReturn:
    os._exit(0)
