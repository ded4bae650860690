"""What becomes of the command of `cowfs run`, and of what is mounted, when cowfs is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.mount.test_sandbox import made, with_programs
from tests.support.commits import one_run_at_a_time  # noqa: F401 - a fixture for all
from tests.support.mounts import COWFS, cowfs, eventually, project_root
from tests.support.system import needs_fuse, needs_root

DEV_FUSE_AT_NIGHT = True
pytestmark = [needs_fuse, needs_root]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return made(tmp_path / "root")


@contextmanager
def waiting(*words: str | Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start a run whose command waits; yield it, and a process that the command has started."""
    script = "sleep 1000 & echo $!; read _"
    with subprocess.Popen(
        [*COWFS, "run", "--discard", *words, "--", "sh", "-c", script],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=project_root(), process_group=0,
    ) as process:  # fmt: skip
        try:
            assert process.stdout
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def guard_of(process: subprocess.Popen[str]) -> int:
    """Return the parent of the command. It is the last child: the daemon may be one too."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[-1])


def living_in(namespace: str) -> list[str]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if os.readlink(f"/proc/{pid}/ns/mnt") == namespace:
                found.append(pid)
    return found


@pytest.mark.parametrize(
    ("whom", "shown"), [("cowfs", "root"), ("group", "root"), ("guard", "root"), ("cowfs", "mountpoint")]
)
def test_with_a_killed_run_all_ends_that_it_started(
    root: Path, tmp_path: Path, whom: str, shown: str
) -> None:
    (tmp_path / "mnt").mkdir()
    words = ("--root", root) if shown == "root" else (root, tmp_path / "mnt")
    with with_programs(root), waiting(*words) as (process, below):
        namespace = os.readlink(f"/proc/{process.pid}/ns/mnt")
        left = re.search(r"\S+/cowfs-run-[\w-]+", Path(f"/proc/{process.pid}/mountinfo").read_text())
        if whom == "guard":
            os.kill(guard_of(process), signal.SIGKILL)
            assert process.wait() == 128 + signal.SIGKILL
        elif whom == "group":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        eventually(lambda: not os.path.exists(f"/proc/{below}"), "the command's processes end")
        eventually(lambda: living_in(namespace) == [], "nothing stays mounted")
    assert bool(left) == (shown == "root")
    assert not (left and os.path.lexists(left[0]))


def test_what_a_killed_run_leaves_is_removed_by_the_next(root: Path) -> None:
    with with_programs(root):
        with waiting("--root", root) as (process, below):
            left = re.search(r"\S+/cowfs-run-[\w-]+", Path(f"/proc/{process.pid}/mountinfo").read_text())
            process.send_signal(signal.SIGSTOP)
            os.kill(guard_of(process), signal.SIGKILL)  # at the same time
            process.kill()
            process.wait()
            os.kill(below, signal.SIGKILL)
        assert left and os.path.lexists(left[0])
        assert cowfs("run", "--root", root, "--discard", "--", "true").returncode == 0
    assert not os.path.lexists(left[0])
