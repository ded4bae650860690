"""Refusals name the thing and the way out; nobody waits for a daemon that is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.ext3 import make
from tests.support.mounts import COWFS, Mounted, cowfs, eventually, is_mounted, mounted, project_root
from tests.support.system import as_nobody_prefix, needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True
pytestmark = needs_fuse


@pytest.fixture
def base(nobody_path: Path) -> Path:
    (nobody_path / "lower").mkdir()
    (nobody_path / "lower" / "file").write_text("x\n")
    (nobody_path / "lower").chmod(0o777)
    (nobody_path / "mnt").mkdir()
    return nobody_path


def advised(said: str, what: object) -> str:
    """The advice of a message, which is one line, names the thing, and has a reason."""
    assert said.count("\n") == 1 and said.isascii() and str(what) in said, said
    line = said.strip()
    assert line.startswith("cowfs: ") and line.endswith(")") and ": " in line.removeprefix("cowfs: "), said
    return line.rpartition("(")[2]


@pytest.mark.parametrize("command", [["umount"], ["top"], ["persist"], ["info"], ["diff"], ["grow"]], ids=str)
@pytest.mark.parametrize("there", [True, False])
def test_a_path_at_which_nothing_is_mounted(base: Path, command: list[str], there: bool) -> None:
    place = base / ("mnt" if there else "absent")
    more = [str(base / "new")] if command == ["persist"] else []
    done = cowfs(*command, str(place), *more)
    assert done.returncode > 0
    advised(done.stderr, place)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([], "absent"),
        (["-o", "io_uring"], "io_uring"),
        (["-o", "size"], "size"),
        (["-o", "engine="], "engine"),
        (["-o", "ro=1"], "ro"),
        (["-o", "nosuid=yes"], "nosuid"),
        (["-o", "offset=1:2:3"], "offset"),
        (["-o", "log=/proc/none/log"], "/proc/none/log"),
    ],
)
def test_mount(base: Path, options: list[str], named: str) -> None:
    done = cowfs(
        "mount", str(base / "absent" if not options else base / "lower"), str(base / "mnt"), *options
    )
    assert done.returncode in {1, 2, 32} and not is_mounted(base / "mnt")
    said = done.stderr.replace("…", "...")
    assert "unknown option" not in said
    advised(said, named)


def test_create_where_a_directory_is(base: Path) -> None:
    done = cowfs("create", str(base / "mnt"), "16")
    assert done.returncode == 32
    advice = advised(done.stderr, base / "mnt")
    assert "grow" not in advice and f"{base}/mnt/" in advice


@contextmanager
def stopped(here: Mounted) -> Iterator[int]:
    pid = here.pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGCONT)


def _through(base: Path, at: Path) -> list[list[str]]:
    """Commands that lead into a mount."""
    (base / "link").symlink_to(at)
    new, lower = str(base / "mnt"), str(base / "lower")
    return [
        ["blame", f"{at}/file"],
        ["explain", f"{base}/link/directory/file"],
        ["diff", str(at), "file"],
        ["create", f"{at}/store", "16"],
        ["mount", str(at), new],
        ["mount", lower, str(at)],
        ["mount", lower, new, "--store", f"{at}/store"],
    ]


@pytest.mark.parametrize("nobody", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_nobody_waits_for_a_stopped_daemon(base: Path, nobody: bool) -> None:
    """The message names the daemon and says how to continue it; afterwards everything works as before."""
    if nobody and os.geteuid() != 0:
        pytest.skip("needs root, to be another user")
    with mounted(base / "lower", base / "mnt2", nobody=nobody) as here:
        new = base / "kept"
        commands = [["info"], ["top"], ["diff"], ["grow"], ["umount"], ["umount", "--timeout", "1"]]
        with stopped(here) as pid:
            for command in [*commands, ["persist"]]:
                more = ["64"] if command == ["grow"] else [str(new)] if command == ["persist"] else []
                done = cowfs(*command, str(here.path), *more, nobody=nobody, timeout=20)
                assert done.returncode == 32, (command, done)
                advice = advised(done.stderr, here.path)
                if command[-1] != "1":
                    assert f"pid {pid}" in done.stderr and f"kill -CONT {pid}" in advice, done.stderr
                if command[0] == "umount":
                    assert "not unmounted" in done.stderr and "-l" in advice
                assert is_mounted(here.path) and not new.exists()
            through = _through(base, here.path)
            for command in (through[1], through[-1]) if nobody else through:
                done = cowfs(*command, nobody=nobody, timeout=20)
                assert done.returncode == 32 and f"kill -CONT {pid}" in advised(done.stderr, here.path), done
        run(*(as_nobody_prefix() if nobody else []), "touch", here.path / "new")
        assert cowfs("diff", str(here.path), nobody=nobody).stdout == "A  new\n"
        lines = here.log.read_text().splitlines()
        assert not [
            line for line in lines if "INFO cowfs.fuse.reclaim" not in line
        ]  # a machine short of memory
    assert not new.exists()


def test_nobody_waits_for_a_daemon_that_hangs(base: Path) -> None:
    """Its store is on a filesystem that does not answer any more."""
    with (
        mounted(base / "lower", base / "mnt", base / "outer") as outer,
        mounted(base / "lower", base / "mnt2", base / "mnt" / "store") as here,
    ):
        pid, said = here.pid(), ""

        def hangs() -> bool:
            nonlocal said
            done = cowfs("info", str(here.path))
            said = done.stderr
            return done.returncode == 32

        with stopped(outer):
            touch = subprocess.Popen(["touch", here.path / "new"])
            eventually(hangs, "the daemon hangs", 60)
        advised(said, here.path)
        assert f"the daemon (pid {pid}) does not answer, and does nothing" in said
        assert touch.wait(60) == 0
        assert cowfs("diff", str(here.path)).stdout == "A  new\n"


@needs_root
def test_nobody_waits_long_for_a_disk(base: Path) -> None:
    """Its store is on a filesystem that is frozen: a thread is in a disk wait."""
    disk = base / "disk"
    disk.mkdir()
    run("mount", "-o", "loop", make(base / "disk.img"), disk)
    try:
        cowfs("create", disk / "store", "16", check=True)
        with mounted(base / "lower", base / "mnt", disk / "store") as here:
            pid = here.pid()
            run("fsfreeze", "-f", disk)
            try:
                touch = subprocess.Popen(["touch", here.path / "new"])
                eventually(lambda: _waits_for_disk(pid), "the daemon waits", 60)
                for command in ("info", "diff"):
                    done = cowfs(command, str(here.path), timeout=30)
                    assert (done.returncode, done.stdout) == (32, "")
                    advised(done.stderr, here.path)
                    assert "does not answer: it waits for a disk" in done.stderr
            finally:
                run("fsfreeze", "-u", disk)
            assert touch.wait(60) == 0
            assert cowfs("diff", str(here.path)).stdout == "A  new\n"
    finally:
        run("umount", disk)


def _waits_for_disk(pid: int) -> bool:
    return any(" D " in (task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir())


def test_a_stopped_daemon_can_be_left(base: Path) -> None:
    with mounted(base / "lower", base / "mnt2") as here, stopped(here):
        done = cowfs("umount", "-l", str(here.path), timeout=20)
        assert (done.returncode, done.stderr) == (0, "")
        assert not is_mounted(here.path)


def test_a_tree_in_use_is_not_unmounted(base: Path) -> None:
    at = base / "own"
    with mounted(base / "lower", at, nobody=True):
        within = (
            *as_nobody_prefix(),
            "env",
            f"PYTHONPATH={project_root()}",
            "sh",
            "-c",
            'cd "$0" && exec "$@"',
        )
        done = run(*within, at, *COWFS, "umount", at, check=False)
        assert done.returncode == 32
        assert advised(done.stderr, at) == f"fuser -vm {at} shows who uses it; -l detaches it now)"
        assert is_mounted(at)
