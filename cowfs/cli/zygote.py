"""A process with all modules loaded that forks for each command, for programs that mount often.

``python -m cowfs.cli.zygote FD``. Each command is a message on the socket *FD*: the arguments, the
environment and the working directory in JSON, with two descriptors: a file for the command's output and a
socket. On that socket the command sends its process ID and, at its end, its exit code, each on a line. The
process ends after the message GOODBYE. If the other end of FD is closed without it, the program was killed.
Then the process first unmounts everything that it has mounted.
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

from cowfs.cli import encrypted, helper_requests, mount
from cowfs.cli.background import may_become_the_daemon
from cowfs.cli.main import main, prepare
from cowfs.cli.own_files import load_all
from cowfs.command import GOODBYE, LONGEST_REQUEST
from cowfs.linux import offspring, seccomp
from cowfs.linux.mount_table import mountinfo
from cowfs.linux.signals import raise_keyboard_interrupts
from cowfs.store.served.memory import keep_template

_LOADED = (encrypted, helper_requests, mount)
"""The modules that most commands load."""
_PATIENCE = 60.0
"""How long the daemons may take to write all changes, in seconds."""


def serve(requests: socket.socket) -> None:
    """Fork for each command, until the other end of *requests* is closed."""
    load_all()
    prepare(["mount", ".", ".", "--store=memory", "-o", "x"])
    keep_template()
    if os.geteuid() == 0:  # daemons of other users have no filter
        with suppress(OSError):  # without libseccomp, the daemon logs it
            seccomp.prepare()
    mountinfo()  # its lines need not be parsed again
    gc.collect()
    gc.freeze()  # otherwise each fork would copy the pages that the collector writes to
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller gets Ctrl-C, and signals the command
    offspring.become_subreaper()  # of the daemons, whose parents end
    temporary: set[str] = set()
    while True:
        message, fds, _, _ = socket.recv_fds(requests, LONGEST_REQUEST, 2)
        if message == GOODBYE:
            return
        if not message:
            _unmount_all(temporary)
            return
        asked = json.loads(message)
        if asked["temporary"]:
            temporary.add(asked["temporary"])
        if os.fork() == 0:
            requests.close()
            _be(asked, *fds)
        for fd in fds:
            os.close(fd)


def _unmount_all(temporary: set[str]) -> None:
    """Make all daemons unmount and write back; remove the directories created as mountpoints."""
    offspring.end_all(set(), _PATIENCE)
    for directory in temporary:
        with suppress(OSError):  # removed already
            os.rmdir(directory)


def _be(asked: dict[str, Any], output: int, answer: int) -> NoReturn:
    """Run the command. Never returns."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise_keyboard_interrupts()
        os.write(answer, b"%d\n" % os.getpid())
        if os.environ != asked["environment"]:
            os.environ.clear()
            os.environ.update(asked["environment"])
        os.chdir(asked["directory"])
        for fd in (1, 2):
            os.dup2(output, fd)
        os.close(output)
        sys.argv = ["cowfs", *asked["arguments"]]
        may_become_the_daemon(answer)
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
