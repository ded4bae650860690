"""Going into the background, and telling the one who waits how it went."""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import signal
import sys
from collections.abc import Callable, Collection
from contextlib import suppress

from cowfs.errors import CowfsError, InternalError


class Reporter:
    """The daemon's end of a pipe that its parent waits on."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def ready(self) -> None:
        """Let the parent return with success, and leave the terminal."""
        self._send({})
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        os.close(null)

    def failed(self, error: CowfsError) -> None:
        """Let the parent say why and return with the error's exit code."""
        self._send({"error": str(error), "code": error.exit_code})

    def _send(self, report: dict[str, object]) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.write(fd, json.dumps(report).encode())
            os.close(fd)


def run_in_background(daemon: Callable[[Reporter], int], keep: Collection[int] = ()) -> int:
    """Run *daemon* in a process of its own session; return once it has reported.

    Of the descriptors that were open only *keep* and the terminal's stay. Raises the CowfsError that it
    reported.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _detach(writing, keep)
        reporter = Reporter(writing)
        code = 1
        try:
            code = daemon(reporter)
        except CowfsError as error:
            logging.getLogger(__name__).error("%s", error)
            reporter.failed(error)
            code = error.exit_code
        except BaseException as error:
            logging.getLogger(__name__).exception("the daemon failed")
            reporter.failed(InternalError(f"the daemon failed: {error!r}"))
        finally:
            logging.shutdown()
            _leave(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    if not said:
        _, status = os.waitpid(pid, 0)
        raise InternalError(f"the daemon ended without a word (wait status {status})")
    report = json.loads(said)
    if "error" in report:
        os.waitpid(pid, 0)
        failure = CowfsError(report["error"])
        failure.exit_code = report["code"]
        raise failure
    return 0


def _detach(pipe: int, keep: Collection[int]) -> None:
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd != pipe and fd not in keep:
            with suppress(OSError):  # the listing's own
                os.close(fd)
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.chdir("/")


def _leave(code: int) -> None:
    """End the forked process; through the exit handlers, which a coverage tool needs."""
    import atexit

    atexit._run_exitfuncs()
    os._exit(code)


def set_up_log(path: str | None, *, foreground: bool) -> None:
    """Send the log to a file, to the terminal in the foreground, or else to syslog if there is one."""
    handler: logging.Handler
    form = "%(asctime)s cowfs[%(process)d] %(levelname)s %(name)s: %(message)s"
    if path is not None:
        handler = logging.FileHandler(path)
    elif foreground:
        handler = logging.StreamHandler()
        form = "cowfs: %(message)s"
    elif os.path.exists("/dev/log"):
        handler = logging.handlers.SysLogHandler("/dev/log", logging.handlers.SysLogHandler.LOG_DAEMON)
        form = "cowfs[%(process)d]: %(message)s"
    else:
        handler = logging.NullHandler()
    handler.setFormatter(logging.Formatter(form))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO if not foreground else logging.WARNING)
