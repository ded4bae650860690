"""Processes that work in a mount as its user and keep files open. Others may not have access to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support import tree
from tests.support.mounts import Mounted, project_root
from tests.support.system import as_nobody_prefix, run

WORKER = """
import os, sys
for line in sys.stdin:
    try:
        said = eval(line)
    except OSError as error:
        said = -error.errno
    print(repr(said), flush=True)
"""
WRITER = """
import os, sys
fd = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
print("started", flush=True)
number = 0
while os.path.exists(sys.argv[2]):
    os.write(fd, b"%08d\\n" % number)
    number += 1
print(number)
"""


def prefix(nobody: bool) -> list[str]:
    return as_nobody_prefix() if nobody else []


def script(text: str, here: Mounted) -> str:
    return run(*prefix(here.nobody), "sh", "-euc", f'cd "$1"\n{text}', "sh", here.path).stdout


def seen(here: Mounted) -> tree.Snapshot:
    """Return a snapshot that the mount's user takes."""
    child = "import json, sys; from tests.support import tree; print(json.dumps(tree.snapshot(sys.argv[1])))"
    command = [*prefix(here.nobody), sys.executable, "-c", child, str(here.path)]
    said = run(*command, env={**os.environ, "PYTHONPATH": project_root()}).stdout
    result: tree.Snapshot = json.loads(said)
    return result


class Worker:
    """A process of the mount's user that evaluates expressions one after the other."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, expression: str) -> Any:
        assert self._process.stdin and self._process.stdout
        self.begin(expression)
        return eval(self._process.stdout.readline())

    def begin(self, expression: str) -> None:
        """Start to evaluate *expression*, without waiting for its result."""
        assert self._process.stdin
        self._process.stdin.write(expression + "\n")
        self._process.stdin.flush()

    def end(self) -> Any:
        """Return the result of the expression that begin() has started."""
        assert self._process.stdout
        return eval(self._process.stdout.readline())


@contextmanager
def worker(here: Mounted) -> Iterator[Worker]:
    command = [*prefix(here.nobody), sys.executable, "-c", WORKER]
    with subprocess.Popen(
        command, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        work = Worker(process)
        assert isinstance(work(f"os.chdir({str(here.path)!r})"), type(None))
        yield work


@contextmanager
def writer(here: Mounted, go_on: Path) -> Iterator[Callable[[], int]]:
    """Run a process that writes numbered lines to ``log``; yield a function that stops it and counts them."""
    command = [*prefix(here.nobody), sys.executable, "-c", WRITER, str(here.path / "log"), str(go_on)]

    def end() -> int:
        go_on.unlink()
        assert process.stdout
        return int(process.stdout.read())

    go_on.touch()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "started\n"
        try:
            yield end
        finally:
            go_on.unlink(missing_ok=True)
