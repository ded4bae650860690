"""The daemon's log: its destination, its count of errors, and the report on SIGUSR1."""

from __future__ import annotations

import errno
import faulthandler
import logging
import logging.handlers
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

from cowfs.cli.log_limit import Limit
from cowfs.errors import SystemFailure, printable
from cowfs.linux import helper_process
from cowfs.linux.signals import start
from cowfs.linux.sockets import SYSLOG
from cowfs.linux.trust import who_can_redirect, who_can_substitute

_DEEPEST = 50
"""How many frames of a thread are shown."""


class _Formatter(logging.Formatter):
    """Formats each message as one line. Removes control characters, because other users choose names."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line; see printable()."""
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        """Return the traceback, printable line by line."""
        return "\n".join(map(printable, super().formatException(ei).split("\n")))


class _Syslog(logging.handlers.SysLogHandler):
    """Reconnects through the helper process after the system's log has restarted."""

    def _connect_unixsocket(self, address: str) -> None:
        elsewhere = helper_process.current()
        if elsewhere is None:
            super()._connect_unixsocket(address)  # type: ignore[misc]
        else:
            self.socket = socket.socket(fileno=elsewhere.ask("syslog")["fd"])


def open_log(path: str) -> int:
    """Open the log file, without waiting for the reader of a fifo(7). SystemFailure."""
    try:
        return _opened(path)
    except OSError as error:
        what = f"{path}: cannot write the log: {error.strerror}"
        if error.errno == errno.ENXIO:
            raise SystemFailure(what, "if it is a fifo, start the program that reads it first") from None
        raise SystemFailure(what, "give the path of a writable file") from None


def _opened(path: str) -> int:
    """Open the log file.

    PermissionError if another user has redirected it with a symbolic or hard link, as is possible in a
    directory that all users can write to (unless fs.protected_symlinks and fs.protected_hardlinks of
    sysctl(8) forbid it).
    """
    reason = None
    with suppress(FileNotFoundError):  # it will be created; the directories on the way have been checked
        reason = who_can_redirect(path)
    if reason is not None:
        raise PermissionError(errno.EPERM, reason, path)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    fd = os.open(os.path.realpath(path), flags | os.O_NOFOLLOW, 0o644)
    reason = who_can_substitute(path, fd)
    if reason is not None:
        os.close(fd)
        raise PermissionError(errno.EPERM, reason, path)
    return fd


class Failures(logging.Handler):
    """Counts unexpected exceptions, for ``cowfs info``."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.count = 0
        self.last = ""
        self.when = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Count a message that has a traceback."""
        if record.exc_info:
            self.count += 1
            self.last, self.when = record.getMessage(), record.created


class Log(NamedTuple):
    """The destination of a daemon's log, and the failures in it."""

    place: str
    failures: Failures
    fd: int
    """The descriptor of its file; -1 if it has none."""

    def facts(self) -> dict[str, Any]:
        """Return what ``cowfs info`` shows about the log."""
        failures = self.failures
        return {
            "place": self.place,
            "failures": failures.count,
            "last_failure": failures.last or None,
            "last_failure_at": failures.when or None,
        }

    def explain_when_asked(self, tasks: Callable[[], Iterable[str]]) -> None:
        """On SIGUSR1, log what each thread and each of *tasks* is doing; on a fatal signal, the threads.

        A thread of its own writes this, so that it works even if the main thread hangs. (The signal handler
        of faulthandler must not: it reads the stacks while other threads change them, and may crash.) Call
        this before starting the threads that serve.
        """
        if self.fd >= 0:
            faulthandler.enable(self.fd)
        asked = logging.getLogger("cowfs.debug.signal")
        asked.setLevel(logging.DEBUG)

        def explain() -> None:
            for ident, frame in sys._current_frames().items():
                asked.debug("thread %#x:", ident)
                for entry in traceback.extract_stack(frame, limit=_DEEPEST):
                    asked.debug("  %s:%s in %s", entry.filename, entry.lineno, entry.name)
            for line in tasks():
                asked.debug("%s", line)

        def watch() -> None:
            while True:
                signal.sigwait({signal.SIGUSR1})
                try:
                    explain()
                except Exception:  # a task ended meanwhile
                    asked.debug("not all can be shown", exc_info=True)

        signal.signal(signal.SIGUSR1, lambda *_: None)  # in a thread that does not block it, it ends nothing
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        start(threading.Thread(target=watch, name="report", daemon=True))


def set_up_log(path: str | None, *, foreground: bool) -> Log:
    """Send the log to a file, in the foreground to the terminal, or else to syslog if there is one."""
    handler: logging.Handler
    form = "%(asctime)s cowfs[%(process)d] %(levelname)s %(name)s: %(message)s"
    fd = -1
    if path is not None:
        fd = open_log(path)
        handler = logging.StreamHandler(os.fdopen(fd, "w", errors="backslashreplace"))
    elif foreground:
        handler = logging.StreamHandler()
        form = "cowfs: %(message)s"
        path, fd = "standard error", 2
    elif os.path.exists(SYSLOG):
        handler = _Syslog(SYSLOG, logging.handlers.SysLogHandler.LOG_DAEMON)
        form = "cowfs[%(process)d]: %(message)s"
        path = f"system log (journalctl _PID={os.getpid()})"
    else:
        handler = logging.NullHandler()
        path = "none: mount with -o log=FILE"
    handler.setFormatter(_Formatter(form))
    handler.addFilter(Limit())
    failures = Failures()
    root = logging.getLogger()
    root.handlers[:] = [handler, failures]
    root.setLevel(logging.INFO)
    return Log(path, failures, fd)
