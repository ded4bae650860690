"""A process with all of cowfs loaded that forks for each command, so that tests need not wait for Python.

``python -m tests.support.forker FD``. Each command is a message on the socket FD, with arguments,
environment, working directory, umask and limits in JSON, and with three descriptors: one for the command's
output, one for its errors, and a socket. The process writes two lines to the socket: the command's process
ID, and its exit code (negative for a signal). It sends a message on FD when it has started, and exits when
the other end of FD is closed. See :mod:`tests.support.warm`.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import resource
import signal
import socket
import sys
from contextlib import suppress
from typing import Any, NoReturn

import cowfs.cli
from cowfs.cli.main import main
from cowfs.cli.own_files import load_all

LONGEST_REQUEST = 1 << 20
_SELDOM_USED = ("cowfs.cli.browse", "cowfs.cli.zygote")


def serve(requests: socket.socket) -> None:
    """Fork for each command until the other end of *requests* is closed."""
    requests.send(b"here")
    load_all()
    for module in pkgutil.iter_modules(cowfs.cli.__path__, "cowfs.cli."):
        if module.name not in _SELDOM_USED:
            importlib.import_module(module.name)
    gc.collect()
    gc.freeze()  # otherwise each fork copies the pages that the collector touches
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    while True:
        message, fds, _, _ = socket.recv_fds(requests, LONGEST_REQUEST, 3)
        if not message:
            return
        if os.fork() == 0:
            requests.close()
            _watch(json.loads(message), *fds)
        for fd in fds:
            os.close(fd)


def _watch(request: dict[str, Any], output: int, errors: int, answer: int) -> NoReturn:
    """Fork once more for the command, and report its exit code. Never returns."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        pid = os.fork()
        if pid == 0:
            os.close(answer)
            _run_command(request, output, errors)
        os.close(output)
        os.close(errors)
        os.write(answer, b"%d\n" % pid)
        _, status = os.waitpid(pid, 0)
        os.write(answer, b"%d\n" % os.waitstatus_to_exitcode(status))
    finally:
        os._exit(0)


def _run_command(request: dict[str, Any], output: int, errors: int) -> NoReturn:
    """Run the command as ``python -m cowfs.cli.main`` does. Never returns."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.umask(request["umask"])
        for number, (soft, hard) in request["limits"].items():
            resource.setrlimit(int(number), (soft, hard))
        os.chdir(request["directory"])
        os.dup2(output, 1)
        os.dup2(errors, 2)
        os.close(output)
        os.close(errors)
        sys.argv = [cowfs.cli.main.__file__, *request["arguments"]]
        code = main()
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(code)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as here:
        serve(here)
