"""Start the daemon in the background, and report to the waiting parent how that went."""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any, NoReturn

from cowfs.cli.limits import explain_shortage
from cowfs.cli.output import warn
from cowfs.errors import CowfsError, InternalError, MountFailure
from cowfs.linux.signals import hold_back, open_signals, take, unblock

_PATIENCE_MS = 5_000
"""How long to wait, in milliseconds, for a daemon that was asked to end."""
_REPORT = "please report this, with what -o log=FILE writes"


class Reporter:
    """The daemon's end of a pipe that its parent waits on."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC) if fd >= 0 else -1  # the mount may hide it

    def ready(self) -> None:
        """Let the parent return with success, and detach from the terminal."""
        self._send({})
        if self._null >= 0:
            for fd in range(3):
                os.dup2(self._null, fd)
            os.close(self._null)
            self._null = -1

    def failed(self, error: CowfsError) -> None:
        """Make the parent print the error and return with its exit code."""
        self._send({"error": str(error), "code": error.exit_code})

    def _send(self, report: dict[str, object]) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.write(fd, json.dumps(report).encode())
            os.close(fd)


class _OwnReporter(Reporter):
    """The reporter of a command that has become the daemon itself: it prints the error, and sends its exit
    code.
    """

    def _send(self, report: dict[str, object]) -> None:
        if "error" in report:
            warn(str(report["error"]))
            sys.stderr.flush()
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.write(fd, f"{report.get('code', 0)}\n".encode())
            os.close(fd)


_told: list[int] = []
"""In a fork of a warm process: where it sends its exit code."""


def may_become_the_daemon(told: int) -> None:
    """Allow this process to become the daemon of a mount instead of forking one.

    Then nothing of the command is done after the mount. What waits for the command reads its exit code, and a
    newline, from the socket *told*.
    """
    _told.append(told)


def run_in_background(
    daemon: Callable[[Reporter], int],
    keep: Collection[int] = (),
    *,
    stays: bool = False,
    is_last: bool = False,
    own_session: bool = True,
) -> int:
    """Run *daemon* in a process with its *own_session*; return when it has reported.

    If it *is_last*, nothing has to be done after that, and this process may become it and never return.
    Only the descriptors of *keep* and of the terminal stay open. Raises the CowfsError that the daemon
    reported. A signal that asks this process to end is passed on to the daemon; when that has ended,
    SystemExit is raised. After the report, or always if *stays*, such a signal stays blocked for good.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if is_last and _told:
        hold_back()
        _be_daemon(daemon, _told[0], keep, own_session, _OwnReporter)
    reading, writing = os.pipe()
    hold_back()  # otherwise a signal could end one of the two processes unnoticed
    pid = os.fork()
    if pid == 0:
        _be_daemon(daemon, writing, keep, own_session)
    os.close(writing)
    said, asked, ended = _wait_for_report(reading, pid, heeds_signals=not stays)
    if not ended:
        print(
            f"cowfs: interrupted; the daemon (pid {pid}) waits for a lower to answer, then exits",
            file=sys.stderr,
        )
        raise SystemExit(128 + asked)
    report: dict[str, Any] = json.loads(said) if said else {"error": ""}
    if "error" not in report and not asked:
        return 0
    _, status = os.waitpid(pid, 0)
    if asked:
        print("cowfs: interrupted", file=sys.stderr)
        raise SystemExit(128 + asked)
    if not said:
        if os.WIFSIGNALED(status):
            number = signal.Signals(os.WTERMSIG(status))
            hint = "memory may have run out: see dmesg" if number == signal.SIGKILL else _REPORT
            raise MountFailure(f"the daemon was killed by {number.name}", hint)
        raise InternalError(f"the daemon exited without reporting a result (wait status {status})", _REPORT)
    failure = CowfsError(report["error"])
    failure.exit_code = report["code"]
    raise failure


def _wait_for_report(pipe: int, pid: int, *, heeds_signals: bool) -> tuple[bytes, int, bool]:
    """Return the daemon's report, the signal that came before it (or 0), and whether the daemon has ended or
    the report is complete.

    A signal is passed on. The report is complete when all ends of the pipe, *pipe* included, are closed. If a
    daemon does not end some time after the signal, this stops waiting: a lower does not answer the daemon.
    """
    signals = open_signals()
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    if heeds_signals:
        poll.register(signals, select.POLLIN)
    asked = 0
    with os.fdopen(pipe, "rb") as reader:
        while pipe not in dict(poll.poll(_PATIENCE_MS if asked else None)):
            number = take(signals)
            if number is None and asked:
                return b"", asked, False
            if number is not None:
                asked = number
                os.kill(pid, signal.SIGTERM)
        os.close(signals)
        return reader.read(), asked, True


def _be_daemon(
    daemon: Callable[[Reporter], int],
    pipe: int,
    keep: Collection[int],
    own_session: bool,
    kind: type[Reporter] = Reporter,
) -> NoReturn:
    """Run *daemon* in the forked process, and end the process. Never returns."""
    code = 1
    try:
        _detach(pipe, keep)
        if own_session:
            os.setsid()
        reporter = kind(pipe)
        try:
            code = _interruptible(daemon, reporter)
            reporter.failed(MountFailure("unmounted before the daemon was ready", "mount again"))
        except CowfsError as error:
            logging.getLogger(__name__).error("%s", error)
            reporter.failed(error)
            code = error.exit_code
        except KeyboardInterrupt:
            reporter.failed(MountFailure("the daemon was interrupted (SIGINT)"))
        except BaseException as error:
            failure = explain_shortage(error) or InternalError(f"the daemon failed: {error!r}", _REPORT)
            code = failure.exit_code
            logging.getLogger(__name__).exception("the daemon failed")
            reporter.failed(failure)
    finally:
        leave(code)


def _interruptible(daemon: Callable[[Reporter], int], reporter: Reporter) -> int:
    """Run *daemon*, with signals unblocked until it blocks them."""
    try:
        unblock()
        return daemon(reporter)
    finally:
        hold_back()


def _detach(pipe: int, keep: Collection[int]) -> None:
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd != pipe and fd not in keep:
            with suppress(OSError):  # the descriptor of this listing, closed by now
                os.close(fd)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.chdir("/")


def leave(code: int) -> NoReturn:
    """Run the exit handlers, which a coverage tool needs, and end the process."""
    import atexit

    with suppress(Exception):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    atexit._run_exitfuncs()
    os._exit(code)
