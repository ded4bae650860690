"""Limits of the system (setrlimit(2)) that are too low: told in one line, and nobody hangs."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mounts import COWFS, eventually, is_mounted, mounted, project_root
from tests.support.system import NOBODY, needs_fuse, needs_root, run

pytestmark = needs_fuse


def limited(limit: str, *command: object, user: int = 0) -> subprocess.CompletedProcess[str]:
    prefix = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--"] if user else []
    words = [*prefix, "prlimit", limit, "--", *map(str, command)]
    # What measures coverage needs memory too.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    return run(*words, check=False, env={**environment, "PYTHONPATH": project_root()})


@pytest.mark.parametrize("limit", ["--nofile=16", "--nofile=40", "--nproc=1", "--nproc=2", "--data=20000000"])
@needs_root
def test_what_is_too_low_is_told(nobody_path: Path, limit: str) -> None:
    """Run as another user, because root may start any number of processes."""
    for name in ("lower", "mnt"):
        (nobody_path / name).mkdir(mode=0o777)
        (nobody_path / name).chmod(0o777)
    done = limited(limit, *COWFS, "mount", nobody_path / "lower", nobody_path / "mnt", user=NOBODY + 1000)
    assert done.returncode == 2, done
    assert done.stderr.count("\n") == 1 and "ulimit" in done.stderr, done.stderr
    assert not is_mounted(nobody_path / "mnt")


_LOAD = """
import os, sys, threading
def go(number):
    for step in range(40):
        path = f"{sys.argv[1]}/{number}-{step % 3}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT)
            os.pwrite(fd, b"x" * 100_000, step * 1000)
            os.fsync(fd)
            os.close(fd)
            os.truncate(f"{sys.argv[1]}/big{number}", 2_500_000)
            os.unlink(path)
        except OSError:
            pass
threads = [threading.Thread(target=go, args=(number,)) for number in range(12)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def writes(path: Path) -> bool:
    try:
        path.write_text("x")
    except OSError as error:
        assert error.errno == errno.ENOMEM, error
        return False
    return True


@needs_root
def test_threads_that_cannot_be_started(nobody_path: Path) -> None:
    """The daemon gets no more memory once it serves: requests are answered, the mount ends in order."""
    lower = nobody_path / "lower"
    lower.mkdir()
    for number in range(12):
        (lower / f"big{number}").write_bytes(os.urandom(3_000_000))
    with mounted(lower, nobody_path / "mnt", quiet=False) as here:
        pid = here.pid()
        size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * 4096
        run("prlimit", f"--as={size + (4 << 20)}:", "--pid", str(pid))
        run(sys.executable, "-c", _LOAD, here.path, timeout=60)
        assert here.pid() == pid
        run("prlimit", "--as=unlimited:", "--pid", str(pid))
        eventually(lambda: writes(here.path / "after"), "changes are taken again")
        assert (here.path / "after").read_text() == "x"
