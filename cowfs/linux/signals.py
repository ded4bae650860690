"""The signals that ask a process to end, blocked until it is ready for them.

A blocked signal waits. It cannot get lost in a handler that is just being changed, and cannot end the process
before its last instruction. The mask belongs to a thread and is inherited by the threads and the programs
that it starts, so it is set before there are any: a service manager that signals each process of a service
does not stop an e2fsck.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ASKS_TO_END = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})

_libc = ctypes.CDLL(None, use_errno=True)
_SIGINFO = struct.Struct("=I124x")  # struct signalfd_siginfo: ssi_signo; more
_MASK = struct.Struct("=Q120x")  # glibc's sigset_t: bit n - 1 is signal n


def hold_back() -> None:
    """Block the signals that ask to end, in this thread and those that it starts, until :func:`unblock`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ASKS_TO_END)


def unblock() -> None:
    """Let them have their usual effect again, also those that came meanwhile."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKS_TO_END)


@contextmanager
def held_back() -> Iterator[None]:
    """Block the signals that ask to end inside; what came meanwhile takes effect at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKS_TO_END)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def ctrl_c_postponed() -> Iterator[None]:
    """Let a SIGINT that comes inside take effect at the end, whatever thread of this process gets it."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C (SIGINT) raise KeyboardInterrupt inside, though it is held back around."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)


def forget_held_back() -> None:
    """Let the signals that wait, being held back, have come in vain. Does not block."""
    while signal.sigtimedwait(ASKS_TO_END, 0) is not None:
        pass


def wait_asked(seconds: float) -> bool:
    """Wait so long for a SIGTERM or SIGINT, which must be held back; say whether one came. Blocks."""
    return signal.sigtimedwait(ASKS_TO_END - {signal.SIGHUP}, seconds) is not None


def open_signals() -> int:
    """Return a descriptor that is readable while one of them waits (signalfd(2)); they must be held back."""
    mask = _MASK.pack(sum(1 << (number - 1) for number in ASKS_TO_END))
    fd = int(_libc.signalfd(-1, mask, os.O_NONBLOCK | os.O_CLOEXEC))
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return fd


def take(fd: int) -> signal.Signals | None:
    """Take one signal from such a descriptor; None when none waits. Does not block."""
    try:
        (number,) = _SIGINFO.unpack(os.read(fd, _SIGINFO.size))
    except BlockingIOError:
        return None
    return signal.Signals(number)
