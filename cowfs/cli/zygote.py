"""A process with all modules loaded, which forks for each command: for programs that mount often.

``python -m cowfs.cli.zygote FD``. Each command is a message on the socket *FD*: the arguments, the
environment and the working directory in JSON, with two descriptors, a file for the command's output and a
socket. On this socket the command sends its process ID and, at its end, its exit code, each on a line. The
process ends when nobody has the other end of FD any more.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import Any, NoReturn

from cowfs.cli import mount, umount
from cowfs.cli.main import main
from cowfs.cli.own_files import load_all
from cowfs.command import LONGEST_REQUEST

_LOADED = (mount, umount)
"""What most commands load."""


def serve(requests: socket.socket) -> None:
    """Fork for each command, until nobody can ask for one."""
    load_all()
    gc.collect()
    gc.freeze()  # else each fork would copy what the collector touches
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who tells the command
    while True:
        message, fds, _, _ = socket.recv_fds(requests, LONGEST_REQUEST, 2)
        if not message:
            return
        if os.fork() == 0:
            requests.close()
            _be(json.loads(message), *fds)
        for fd in fds:
            os.close(fd)


def _be(asked: dict[str, Any], output: int, answer: int) -> NoReturn:
    """Run the command. Never returns."""
    code = 1
    try:
        for number in (signal.SIGCHLD, signal.SIGINT):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.write(answer, b"%d\n" % os.getpid())
        os.environ.clear()
        os.environ.update(asked["environment"])
        os.chdir(asked["directory"])
        for fd in (1, 2):
            os.dup2(output, fd)
        os.close(output)
        sys.argv = ["cowfs", *asked["arguments"]]
        code = main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        with suppress(OSError):
            os.write(answer, b"%d\n" % code)
        os._exit(code)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as here:
        serve(here)
