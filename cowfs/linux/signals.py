"""Block the signals that ask a process to end, until it is ready for them.

A blocked signal stays pending. It is not lost while a handler changes, and does not end the process early.
Each thread has a mask, which the threads and programs that it starts inherit. So block the signals before
starting any: then a service manager that signals each process of a service does not stop an e2fsck.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import struct
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

from cowfs.errors import os_error

ASKS_TO_END = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})

_SOON = 0.001
"""Seconds after which a SIGINT that came in a callback is tried again."""

_libc = ctypes.CDLL(None, use_errno=True)
_SIGINFO = struct.Struct("=I124x")  # struct signalfd_siginfo: ssi_signo; more
_MASK = struct.Struct("=Q120x")  # glibc's sigset_t: bit n - 1 is signal n


def hold_back() -> None:
    """Block the signals that ask to end, in this thread and those it starts, until :func:`unblock`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ASKS_TO_END)


def unblock() -> None:
    """Unblock the signals that ask to end. Pending ones take effect now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKS_TO_END)


@contextmanager
def held_back() -> Iterator[None]:
    """Block the signals that ask to end during the block. Pending ones take effect at its end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKS_TO_END)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start(thread: threading.Thread) -> None:
    """Start a thread that never gets a signal that asks to end or to report, even if the others block it
    later.

    RuntimeError if there can be no more threads.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKS_TO_END | {signal.SIGUSR1})
    try:
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def raise_keyboard_interrupts() -> None:
    """Let SIGINT raise KeyboardInterrupt, as Python does by default, but never where Python would lose it.

    After an import, Python calls back to remove the module's lock. It prints an exception that is raised
    there, and continues.
    """
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGALRM, _interrupt)


def ignore_keyboard_interrupts() -> None:
    """Ignore SIGINT from now on, also one that came already."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 0)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if frame is not None and frame.f_code.co_name == "cb" and "importlib" in frame.f_code.co_filename:
        signal.setitimer(signal.ITIMER_REAL, _SOON)
    else:
        raise KeyboardInterrupt


@contextmanager
def ctrl_c_postponed() -> Iterator[None]:
    """Delay a SIGINT during the block until its end, whichever thread of this process receives it."""
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
def handled(
    numbers: Collection[signal.Signals], handler: Callable[[int, FrameType | None], object]
) -> Iterator[None]:
    """Let these signals call *handler* during the block, even if they are blocked outside."""
    before = {number: signal.signal(number, handler) for number in numbers}
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, old in before.items():
            signal.signal(number, old)


def interruptible(
    numbers: Collection[signal.Signals] = (signal.SIGINT,),
) -> AbstractContextManager[None]:
    """Let these signals raise KeyboardInterrupt during the block, even if they are blocked outside."""
    return handled(numbers, signal.default_int_handler)


def read_answer(question: str) -> str:
    """Write *question* to stderr, and return the line that is read from stdin; "" at its end. Blocks.

    Ctrl-C raises KeyboardInterrupt from the moment when the question is seen, even if it comes just before
    the wait for a line begins: Python runs no handler during read(2). So do SIGTERM and SIGHUP.
    """
    come, comes = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        with interruptible(ASKS_TO_END):
            before = signal.set_wakeup_fd(comes)
            try:
                print(question, end="", file=sys.stderr, flush=True)
                if sys.stdin.isatty():  # which gives a line at a time: none is in a buffer
                    select.select([sys.stdin, come], [], [])
                return sys.stdin.readline()
            finally:
                signal.set_wakeup_fd(before)
    finally:
        os.close(come)
        os.close(comes)


def forget_held_back() -> None:
    """Discard the pending signals that ask to end. Does not block."""
    while signal.sigtimedwait(ASKS_TO_END, 0) is not None:
        pass


def wait_asked(seconds: float) -> bool:
    """Wait *seconds* for a SIGTERM or SIGINT, which must be blocked; return whether one came. Blocks."""
    return signal.sigtimedwait(ASKS_TO_END - {signal.SIGHUP}, seconds) is not None


def open_signals() -> int:
    """Return a descriptor that is readable while a signal that asks to end is pending (signalfd(2)).

    The signals must be blocked. OSError.
    """
    mask = _MASK.pack(sum(1 << (number - 1) for number in ASKS_TO_END))
    fd = int(_libc.signalfd(-1, mask, os.O_NONBLOCK | os.O_CLOEXEC))
    if fd < 0:
        raise os_error(ctypes.get_errno())
    return fd


def take(fd: int) -> signal.Signals | None:
    """Read one signal from a descriptor of :func:`open_signals`; None if none is pending. Does not block."""
    try:
        (number,) = _SIGINFO.unpack(os.read(fd, _SIGINFO.size))
    except BlockingIOError:
        return None
    return signal.Signals(number)
