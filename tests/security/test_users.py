"""Hostile users on one mount: nothing that one of them does stops the others."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.mounts import Mounted, eventually, is_mounted, mount_arguments, project_root
from tests.support.system import as_nobody_prefix, needs_fuse, needs_root, run
from tests.support.victim import VICTIM

pytestmark = [needs_fuse, needs_root]

BIG, SMALL = b"0123456789abcdef" * (1 << 15), b"0123456789abcdef"
_GATED = """
import os, sys, time
from cowfs.cli.main import main
from cowfs.fuse.adapter import Adapter
from cowfs.layers.kernel_file import KernelFile
begin, copy_to = Adapter.__init__, KernelFile.copy_to
def beginning(self, *arguments, **more):
    global gate  # a daemon reaches no file by its name once it is mounted
    gate = os.open(sys.argv[1], os.O_RDONLY)
    begin(self, *arguments, **more)
def gated(self, target, size=None):
    while os.fstat(gate).st_nlink:
        time.sleep(0.005)
    copy_to(self, target, size)
Adapter.__init__, KernelFile.copy_to = beginning, gated
sys.exit(main(sys.argv[2:]))
"""
"""A daemon that copies no data up as long as some file exists: a lower that is very slow."""


@contextmanager
def gated(lower: Path, place: Path) -> Iterator[tuple[Mounted, Path]]:
    """A mount for all users whose copy-ups of data wait while the file that is given, too, exists."""
    at, gate = place / "mnt", place / "gate"
    at.mkdir()
    gate.touch()
    arguments = mount_arguments(lower, at, place / "store", None, ["allow_other", f"log={place / 'log'}"])
    environment = {**os.environ, "PYTHONPATH": project_root()}
    run(sys.executable, "-c", _GATED, gate, *arguments, env=environment)
    here = Mounted(at, place / "log")
    try:
        yield here, gate
    finally:
        gate.unlink(missing_ok=True)
        if is_mounted(at):
            here.umount()


def as_victim(*command: str | Path) -> str:
    """Return what a command of another user prints."""
    prefix = ["setpriv", f"--reuid={VICTIM}", f"--regid={VICTIM}", "--clear-groups", "--"]
    return run(*prefix, *command, timeout=20).stdout


_CALLS = """
import os, sys, threading
calls = (
    lambda path: os.close(os.open(path, os.O_RDWR)),
    lambda path: os.setxattr(path, "user.x", b"y"),
    lambda path: os.rename(path, path + "-moved"),
    lambda path: os.link(path, path + "-linked"),
    lambda path: os.truncate(path, 8),
)
def go(number):
    path = sys.argv[2 + number % (len(sys.argv) - 2)]
    calls[number % len(calls) if sys.argv[1] == "all" else 0](path)
all = [threading.Thread(target=go, args=(number,)) for number in range(128)]
for thread in all: thread.start()
print("started", flush=True)
for thread in all: thread.join()
print("opened", flush=True)
"""


@pytest.mark.parametrize(("files", "data", "calls"), [(1, BIG, "opens"), (128, SMALL, "all")])
def test_any_number_may_wait_for_copy_ups(nobody_path: Path, files: int, data: bytes, calls: str) -> None:
    """128 calls of a user's wait; all others read, write, list, copy up large files and sync as ever."""
    lower = nobody_path / "lower"
    lower.mkdir()
    for number in range(files):
        (lower / f"big{number}").mkdir()  # of its own: a rename locks it
        (lower / f"big{number}" / "file").write_bytes(data)
    (lower / "file").write_text("content\n")
    (lower / "theirs").mkdir()
    for path in (lower, *lower.rglob("*")):
        os.chown(path, 65534, 65534)
    os.chown(lower / "theirs", VICTIM, VICTIM)
    with gated(lower, nobody_path) as (here, gate):
        paths = [here.path / f"big{number}" / "file" for number in range(files)]
        attack = subprocess.Popen(
            [*as_nobody_prefix(), sys.executable, "-c", _CALLS, calls, *paths],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert attack.stdout is not None and attack.stdout.readline() == "started\n"
            eventually(lambda: asleep_in_fuse(attack.pid) == 128, "all wait for copy-ups")
            script = "cd $0 && cat file && ls && echo x > theirs/new && sync theirs/new && rm theirs/new"
            assert as_victim("sh", "-c", script, here.path).startswith("content\nbig0\n")
            run("sh", "-c", "echo y > $0/roots && sync $0/roots && mv $0/roots $0/moved", here.path)
        finally:
            gate.unlink()
            said = attack.communicate(timeout=60)[0]
        assert said == "opened\n"
        assert run("cat", here.path / "moved").stdout == "y\n"
    assert here.trouble() == []


def asleep_in_fuse(pid: int) -> int:
    """Return how many threads of a process, except the first, wait for something other than each other."""
    count = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            said = (task / "syscall").read_text().split()[0]
        except OSError:
            continue
        count += task.name != f"{pid}" and said not in {"running", "202", "98"}  # futex
    return count
