"""Mounts of others that hang, and a daemon that has yet to release the store of a mount that is gone."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from cowfs.linux import mount_table, mounts
from tests.support.hung import hung, hung_around_a_process
from tests.support.mounts import COWFS, cowfs, mounted, project_root
from tests.support.system import as_nobody_prefix, needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True

pytestmark = [needs_fuse, needs_root]


@pytest.fixture(params=[False, True], ids=["root", "nobody"])
def nobody(request: pytest.FixtureRequest) -> bool:
    """Whether nobody runs the commands."""
    return bool(request.param)


@pytest.fixture
def base(nobody_path: Path) -> Path:
    """A directory of nobody's with a lower in it."""
    run(*as_nobody_prefix(), "mkdir", nobody_path / "lower")
    return nobody_path


def write(path: Path, *, nobody: bool) -> None:
    """Write a file."""
    run(*(as_nobody_prefix() if nobody else []), "sh", "-c", 'echo kept > "$1"', "sh", path)


def test_a_mount_that_hangs_holds_up_nothing(base: Path, nobody: bool) -> None:
    store = base / "store"

    def does(*arguments: str | Path) -> None:
        done = cowfs(*arguments, nobody=nobody, timeout=20)
        assert done.returncode == 0, done.stderr

    link = base / "link"
    link.symlink_to(base / "hung" / "deep")
    with hung(base / "hung"), hung(base / "linked", os.fspath(link)):
        does("create", store, "16")
        does("grow", store, "24")
        does("check", store)
        with mounted(base / "lower", base / "mnt", store, nobody=nobody) as mount:
            write(base / "mnt" / "file", nobody=nobody)
            does("info", base / "mnt")
            does("info", store)
            does("diff", base / "mnt")
            cowfs("find", nobody=nobody, timeout=20)  # whatever it finds
            does("grow", base / "mnt", "32")
            mount.umount()
        does("diff", store)
        with mounted(base / "lower", base / "mnt", "memory", nobody=nobody):
            write(base / "mnt" / "file", nobody=nobody)
            does("persist", base / "mnt", base / "kept")


def test_a_directory_store_is_not_held_up_either(base: Path) -> None:
    with hung(base / "hung"), mounted(base / "lower", base / "mnt", base / "store"):
        assert cowfs("diff", base / "mnt", timeout=20).returncode == 0


def test_a_rollback_looks_for_users_and_is_not_held_up(base: Path) -> None:
    with mounted(base / "lower", base / "mnt", base / "store"):
        cowfs("checkpoint", base / "mnt", "known", check=True)
        with hung_around_a_process(base / "hung"):
            cowfs("rollback", base / "mnt", "known", timeout=20, check=True)
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE, cwd=base / "mnt") as process:
            done = cowfs("rollback", base / "mnt", "known", timeout=20)
            process.kill()
        assert done.returncode == 32
        assert f"{base}/mnt (its directory, by cat, pid {process.pid})" in done.stderr


def test_an_image_in_a_fuse_mount_is_still_known_by_its_links(base: Path) -> None:
    """The source shows it, which may be a symbolic link."""
    cowfs("create", base / "store", "16", check=True)
    (base / "one").symlink_to("two")
    (base / "two").symlink_to(base / "." / "lower" / ".." / "store")
    with hung(base / "fuse2fs", os.fspath(base / "one")):
        done = cowfs("check", base / "store", timeout=20)
    assert done.returncode != 0
    assert f"mounted on {base}/fuse2fs" in done.stderr


def mount_until_waited(pid: int, *command: str | os.PathLike[str]) -> str:
    """Run a command that mounts, and let the stopped daemon go on once something is said; what was said."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=project_root()) as mount:
        assert mount.stderr
        said = ""
        while "waiting" not in said and (line := mount.stderr.readline()):
            said += line
        os.kill(pid, signal.SIGCONT)
        said += mount.stderr.read()
        assert mount.wait() == 0, said
    return said


def leave(place: Path, *, nobody: bool = False) -> None:
    """Do what umount(8) does, which does not wait for the daemon."""
    if nobody:
        run(*as_nobody_prefix(), "fusermount3", "-u", place, timeout=10)
    else:
        mounts.umount2(str(place), 0)


@pytest.mark.parametrize("kind", ["image", "directory"])
def test_a_mount_after_umount_8_waits_for_the_release(base: Path, nobody: bool, kind: str) -> None:
    store = base / "store"
    if kind == "image":
        cowfs("create", store, "16", nobody=nobody, check=True)
    arguments: list[str | Path] = [*COWFS, "mount", base / "lower", base / "mnt", "--store", store]
    prefix = as_nobody_prefix() if nobody else []
    with mounted(base / "lower", base / "mnt", store, nobody=nobody, quiet=False) as first:
        write(base / "mnt" / "file", nobody=nobody)
        pid = first.pid()
        (base / "lower" / "other").mkdir()
        os.chown(base / "lower" / "other", 65534, 65534)
        busy = cowfs("mount", base / "lower", base / "lower" / "other", "--store", store, nobody=nobody)
        assert "in use by process" in busy.stderr, "it is mounted: nobody waits"
        os.kill(pid, signal.SIGSTOP)
        try:
            leave(base / "mnt", nobody=nobody)
            said = mount_until_waited(pid, *prefix, *arguments)
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        assert f"waiting for process {pid}" in said
        assert run(*prefix, "cat", base / "mnt" / "file").stdout == "kept\n"


def test_the_next_mount_may_have_the_number_of_the_one_that_is_waited_for(base: Path) -> None:
    cowfs("create", base / "store", "16", check=True)
    with mounted(base / "lower", base / "mnt", base / "store") as first:
        pid = first.pid()
        os.kill(pid, signal.SIGSTOP)
        leave(base / "mnt")
        with mounted(base / "lower", base / "other", "memory"):
            places = [base / "lower", base / "mnt"]
            said = mount_until_waited(pid, *COWFS, "mount", *places, "--store", base / "store")
            assert f"waiting for process {pid}" in said


def test_the_source_can_be_named(base: Path, nobody: bool) -> None:
    with mounted(base / "lower", base / "mnt", "memory", nobody=nobody, options=["fsname=my name\\,yours"]):
        found = mount_table.mount_of(base / "mnt")
        assert found is not None
        assert found.source == b"my name,yours"


@pytest.mark.parametrize("megabytes", [56, 60, 64])
def test_too_little_address_space_is_told(base: Path, megabytes: int) -> None:
    """The mount used to retry forever."""
    limit = ["prlimit", f"--as={megabytes << 20}"]
    places = base / "lower", base / "mnt"
    done = run(*limit, *COWFS, "mount", *places, check=False, timeout=20, cwd=project_root())
    assert done.returncode == 2
    assert "ulimit -v" in done.stderr
