"""A process between this one and a command, which ends and tidies up everything if this one is killed."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress

from cowfs.linux import offspring
from cowfs.linux.signals import ASKS_TO_END, handled

_PASSED_ON = ASKS_TO_END - {signal.SIGINT}
_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h
_SIZE = 2
_libc = ctypes.CDLL(None, use_errno=True)


class Abandoned(BaseException):
    """Raised in the guard: its parent has ended. The guard then leaves all blocks that the parent was in."""


Start = Callable[[Callable[[], None]], subprocess.Popen[bytes] | int]
"""Starts the command, which first calls the given function; or returns an exit code."""


class Guard:
    """The guard, as its parent sees it."""

    def __init__(self, start: Start, after: Callable[[], object]) -> None:
        """Fork it. It calls *start*, and *after* when the command has ended."""
        report, reports = os.pipe2(os.O_CLOEXEC)
        parent = os.pidfd_open(os.getpid())
        pid = os.fork()
        if pid == 0:
            os.close(report)
            _guard(start, after, parent, reports)
        self._report = report
        self._process = os.pidfd_open(pid)
        os.close(parent)
        os.close(reports)

    def wait(self) -> int | None:
        """Wait until the command has ended; return its exit code as sh(1) does, or None if the guard was
        killed. Passes on the signals that ask to end."""
        with _passed_on(self._send):
            code = os.read(self._report, _SIZE)
        return int.from_bytes(code, "little") if code else None

    def end(self) -> None:
        """End it. Nothing needs it any more."""
        self._send(signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, self._process, os.WEXITED)
        os.close(self._process)
        os.close(self._report)

    def _send(self, number: int) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._process, number)


def _guard(start: Start, after: Callable[[], object], parent: int, report: int) -> None:
    """Start the command and report its exit code. Never returns: raises Abandoned when the parent ends.

    It is in a process group of its own, so that a SIGKILL to the group of the parent and the command does
    not end it.
    """
    offspring.become_subreaper()
    group = os.getpgrp()
    os.setpgid(0, 0)
    before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # it may write to the terminal

    def begin() -> None:
        os.setpgid(0, group)
        signal.signal(signal.SIGTTOU, before)
        _libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)

    started = start(begin)
    code = started if isinstance(started, int) else _code(started, parent)
    after()
    os.write(report, code.to_bytes(_SIZE, "little"))
    _first_to_end(parent)
    raise Abandoned


def _code(process: subprocess.Popen[bytes], parent: int) -> int:
    command = os.pidfd_open(process.pid)
    with _passed_on(process.send_signal):
        if command not in _first_to_end(command, parent):
            raise Abandoned
    os.close(command)
    code = process.wait()
    return code if code >= 0 else 128 - code


def _first_to_end(*processes: int) -> set[int]:
    """Wait until one of the processes ends, whose descriptors (pidfd_open(2)) are given. Return those."""
    poll = select.poll()
    for fd in processes:
        poll.register(fd, select.POLLIN)
    return {fd for fd, _ in poll.poll()}


def _passed_on(send: Callable[[int], None]) -> AbstractContextManager[None]:
    """Pass on the signals that ask to end, except Ctrl-C, which the command gets from the terminal."""
    return handled(_PASSED_ON, lambda number, _: send(number))
