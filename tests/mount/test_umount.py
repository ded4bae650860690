"""``cowfs umount`` of a union that is mounted in several places: success means that the store is released."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cowfs import unmounting
from cowfs.linux.mount_table import mountinfo
from tests.support.mounts import COWFS, cowfs, eventually, is_mounted, mounted, project_root
from tests.support.system import needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True

pytestmark = [needs_fuse, needs_root]


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    """A union at base/mnt, and base/other, a place to mount it too."""
    (tmp_path / "lower").mkdir()
    (tmp_path / "lower" / "file").write_text("below\n")
    (tmp_path / "other").mkdir()
    cowfs("create", tmp_path / "store", "16", check=True)
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store"):
        yield tmp_path


@contextmanager
def umounting(base: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A running ``cowfs umount``, and the file that it complains to."""
    said = base / "said"
    env = {**os.environ, "PYTHONPATH": project_root()}
    with said.open("w") as errors:
        process = subprocess.Popen([*COWFS, "umount", base / "mnt"], stderr=errors, text=True, env=env)
    try:
        yield process, said
    finally:
        process.kill()
        process.wait()


@contextmanager
def namespace() -> Iterator[subprocess.Popen[str]]:
    """A process with a mount namespace of its own, which keeps what is mounted now."""
    command = ["unshare", "-m", "--propagation", "private", "sh", "-c", "echo there; read wait"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdin
        assert process.stdout.readline() == "there\n"
        yield process
        process.stdin.close()


def released(base: Path) -> bool:
    """Whether nobody has the store."""
    return cowfs("check", "-n", base / "store").returncode == 0


def test_it_waits_for_a_bind_mount_and_says_where(base: Path) -> None:
    run("mount", "--bind", base / "mnt", base / "other")
    with umounting(base) as (process, said):
        eventually(lambda: str(base / "other") in said.read_text(), "it says where")
        assert process.poll() is None
        assert (base / "other" / "file").read_text() == "below\n"
        assert not released(base)
        run("umount", "-i", base / "other")
        assert process.wait(60) == 0
    assert said.read_text().count("\n") == 1
    assert released(base)


def test_it_waits_for_another_namespace_and_says_whose(base: Path) -> None:
    with namespace() as holder, umounting(base) as (process, said):
        eventually(lambda: f"pid {holder.pid} " in said.read_text(), "it says who", 30)
        assert str(base / "mnt") in said.read_text()
        assert process.poll() is None
        assert holder.stdin
        holder.stdin.close()
        assert process.wait(60) == 0
    assert released(base)


def test_the_wait_has_an_end(base: Path) -> None:
    run("mount", "--bind", base / "mnt", base / "other")
    done = cowfs("umount", "--timeout", "0.5", base / "mnt")
    assert done.returncode == 2
    assert str(base / "other") in done.stderr
    assert not is_mounted(base / "mnt")
    done = cowfs("umount", base / "other")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert released(base)


def test_a_bind_mount_may_go_alone(base: Path) -> None:
    """Only the bind mount goes; the first mount stays, and the message names it."""
    run("mount", "--bind", base / "mnt", base / "other")
    done = cowfs("umount", base / "other", timeout=30)
    assert done.returncode == 0, done.stderr
    assert str(base / "mnt") in done.stderr
    assert not is_mounted(base / "other")
    assert (base / "mnt" / "file").read_text() == "below\n"


def test_lazy_does_not_wait(base: Path) -> None:
    run("mount", "--bind", base / "mnt", base / "other")
    done = cowfs("umount", "-l", base / "mnt", timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    cowfs("umount", base / "other", check=True)


def test_a_daemon_that_cannot_be_asked(base: Path) -> None:
    """Without access to its control socket, nobody can tell when the daemon has finished."""
    script = 'mount -t tmpfs none /run; mount -t tmpfs none /tmp/cowfs-0 2>/dev/null; "$@"'
    command = ["unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh"]
    env = {**os.environ, "PYTHONPATH": project_root()}
    done = run(*command, *COWFS, "umount", base / "mnt", env=env, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and str(base / "mnt") in done.stderr


def test_a_dead_daemon_has_released_it(base: Path) -> None:
    pid = int(run(*COWFS, "info", base / "mnt", "--json").stdout.partition('"pid":')[2].split(",")[0])
    os.kill(pid, 9)
    eventually(lambda: not Path(f"/proc/{pid}").exists(), "it is gone")
    done = cowfs("umount", base / "mnt", timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_another_filesystem_with_the_number_of_one_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel gives a device number to the next mount at once: that one is not what is waited for."""
    found = mountinfo()[0]
    successor = dataclasses.replace(found, source=b"another", mountpoint=b"/elsewhere")
    monkeypatch.setattr(unmounting, "mountinfo", lambda: [successor])
    monkeypatch.setattr(unmounting, "mounted_elsewhere", lambda: iter([(1, [successor])]))
    assert unmounting._where(found) == ""
    assert "/elsewhere" in unmounting._where(successor)
