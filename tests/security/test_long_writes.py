"""Writes that wait are held with their data; that is bounded, and what is too much is written later."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mounts import cowfs, mounted
from tests.support.system import as_nobody_prefix, needs_fuse, needs_root

pytestmark = [needs_fuse, needs_root]

THREADS = 600
MORE = 320 << 20
"""Bytes by which the daemon's memory may grow. A user's waiting writes hold 80 MiB of 24 GiB at most; each
request that waits takes some 0.1 MiB beside."""

_WRITE = """
import os, sys, threading
def go(number):
    data = bytes([number % 256]) * (1 << 20)
    fd = os.open(f"{sys.argv[1]}/{number}", os.O_WRONLY | os.O_CREAT | os.O_SYNC)
    together.wait()
    os.pwrite(fd, b"x", 0)  # first all wait, and then all have data at once
    together.wait()
    assert os.pwrite(fd, data, 0) == os.fstat(fd).st_size
    os.close(fd)
    written.append(number)
threading.stack_size(1 << 16)
number = int(sys.argv[2])
together = threading.Barrier(number)
written = []
all = [threading.Thread(target=go, args=(number,)) for number in range(number)]
for thread in all: thread.start()
for thread in all: thread.join()
assert len(written) == number
"""


def most_memory_of(pid: int) -> int:
    """The most bytes of memory that a process has had so far (proc_pid_status(5))."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmHWM")


@pytest.mark.parametrize("io_uring", ["auto", pytest.param("off", marks=pytest.mark.nightly)])
def test_waiting_writes_do_not_fill_the_memory(nobody_path: Path, io_uring: str) -> None:
    (nobody_path / "lower").mkdir(mode=0o777)
    (nobody_path / "lower").chmod(0o777)
    cowfs("create", nobody_path / "store", "1024", check=True)
    options = ["allow_other", f"io_uring={io_uring}", "fault=*:write:DELAY=2"]
    with mounted(nobody_path / "lower", nobody_path / "mnt", nobody_path / "store", options=options) as here:
        before = most_memory_of(here.pid())
        user = [*as_nobody_prefix(), sys.executable, "-c", _WRITE, str(here.path), f"{THREADS}"]
        subprocess.run(user, check=True, timeout=100)
        grown = most_memory_of(here.pid()) - before
        lengths = set()
        for number in range(THREADS):
            written = (here.path / f"{number}").read_bytes()
            lengths.add(len(written))
            assert written == bytes([number % 256]) * len(written)
    assert lengths == {4096, 1 << 20}
    assert grown < MORE, f"the daemon's memory grew by {grown >> 20} MiB"
