"""``-o fault=`` and ``tree.inject()``: requests that fail, wait, or are the last before a crash."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import cowfs
from cowfs.errors import CowfsError, UsageError
from tests.support.mounts import cowfs as command
from tests.support.mounts import is_mounted
from tests.support.system import needs_fuse

pytestmark = needs_fuse
DEV_FUSE_AT_NIGHT = True
DEAD = {"ENOTCONN", "ECONNABORTED", "ECANCELED"}
"""The errors of a mount whose daemon has died, just now or some time ago."""


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    made = tmp_path / "lower"
    (made / "etc").mkdir(parents=True)
    for name in ("etc/a.conf", "etc/b:c", "d.conf", "plain"):
        (made / name).write_text(name)
    return made


def outcome(call: Callable[..., object], *arguments: object) -> object:
    """Return the result of a call, or the name of its errno."""
    try:
        return call(*arguments)
    except OSError as failure:
        return errno.errorcode[failure.errno or 0]


def test_requests_fail_as_asked(lower: Path) -> None:
    faults = ["*.conf:read:EIO", r"/etc/b\:c:open:EACCES", "/new:write:ENOSPC:AFTER=2:TIMES=1"]
    with cowfs.mount(lower, fault=faults) as tree:
        top = tree.path
        assert [outcome((top / name).read_text) for name in ("etc/a.conf", "d.conf", "etc/b:c", "plain")] == [
            *("EIO", "EIO", "EACCES", "plain")
        ]
        fd = os.open(top / "new", os.O_CREAT | os.O_RDWR)
        assert [outcome(os.write, fd, b"x") for _ in range(5)] == [1, 1, "ENOSPC", 1, 1]

        tree.inject(
            "*:fsync:DELAY=0.3", "new:truncate:EDQUOT", "new:fallocate:ENOSPC", "/:rename:EXDEV:TIMES=1"
        )
        begun = time.monotonic()
        os.fsync(fd)
        assert time.monotonic() - begun >= 0.3
        assert outcome(os.ftruncate, fd, 1) == "EDQUOT"
        assert outcome(os.posix_fallocate, fd, 0, 100) == "ENOSPC"
        assert os.pread(fd, 9, 0) == b"xxxx"
        os.close(fd)
        assert [outcome(os.rename, top / "new", top / "old") for _ in range(2)] == ["EXDEV", None]

        tree.inject("/etc:statfs:EACCES")
        assert outcome(os.statvfs, top / "etc") == "EACCES"
        assert os.statvfs(top).f_blocks

        tree.inject("/etc:*:EPERM")
        made = [
            outcome(os.mkdir, top / "etc/d"),
            outcome(os.unlink, top / "etc/a.conf"),
            outcome(os.chmod, top / "etc/a.conf", 0o600),
            outcome(os.link, top / "plain", top / "etc/plain"),
            outcome(os.symlink, "x", top / "etc/x"),
            outcome(os.setxattr, top / "etc", "user.x", b"x"),
            outcome(os.listdir, top / "etc"),
        ]
        assert made == ["EPERM"] * 7
        with pytest.raises(CowfsError, match="unknown operation 'wirte'"):
            tree.inject("*:wirte:EIO")
        tree.inject()
        assert (top / "d.conf").read_text() == "d.conf"
        assert [(change.kind, change.path) for change in tree.diff()] == [("A", b"old")]


def test_a_crash_leaves_what_was_synced(lower: Path, tmp_path: Path) -> None:
    store = tmp_path / "store.bs"
    command("create", store, "32M", check=True)
    with cowfs.mount(lower, store, fault="none") as tree:
        (tree.path / "early").write_text("early")
        with (tree.path / "synced").open("w") as file:
            file.write("synced" * 20_000)
            file.flush()
            os.fsync(file.fileno())
        (tree.path / "late").write_text("late")
        (tree.path / "plain").unlink()
        held = os.open(tree.path / "synced", os.O_WRONLY)
        os.unlink(tree.path / "synced")
        os.pwrite(held, b"lost", 0)
        tree.crash()
        assert outcome(os.listdir, tree.path) in DEAD
        os.close(held)
    assert not is_mounted(tree.path)
    assert subprocess.run(["e2fsck", "-fn", store], capture_output=True, check=False).returncode == 0

    with cowfs.mount(lower, store, fault="/x:rename:CRASH") as tree:
        assert (tree.path / "synced").read_text() == "synced" * 20_000
        assert sorted(path.name for path in tree.path.iterdir()) == [
            "d.conf",
            "early",
            "etc",
            "plain",
            "synced",
        ]
        (tree.path / "x").touch()
        fd = os.open(tree.path / "last", os.O_CREAT | os.O_WRONLY | os.O_SYNC)
        os.write(fd, b"last")
        os.close(fd)
        (tree.path / "x").write_text("lost")
        assert outcome(os.rename, tree.path / "x", tree.path / "y") in DEAD
    with cowfs.mount(lower, store, fault="none") as tree:
        assert [(tree.path / name).read_text() for name in ("last", "x")] == ["last", ""]
        (tree.path / "unmounted").touch()
    with cowfs.mount(lower, store) as tree:
        assert (tree.path / "unmounted").exists()
        with pytest.raises(CowfsError, match="no faults can be asked for on this mount"):
            tree.inject("*:read:EIO")


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("*:write", "not a fault"),
        ("*:wirte:EIO", "unknown operation 'wirte'"),
        ("*:write:ENOSPACE", "unknown effect 'ENOSPACE'"),
        ("*:setxattr:ENOSYS", "ENOSYS would last until the unmount (give EOPNOTSUPP)"),
        ("*:write:DELAY=soon", "unknown effect 'DELAY=soon'"),
        ("*:write:EIO:AFTER=-1", "neither AFTER=N nor TIMES=N"),
    ],
)
def test_what_is_no_fault_is_refused(lower: Path, tmp_path: Path, fault: str, what: str) -> None:
    (tmp_path / "mnt").mkdir()
    done = command("mount", lower, tmp_path / "mnt", "-o", f"fault={fault}")
    assert done.returncode == 1
    assert what in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("options", [[], ["-f"]], ids=["background", "foreground"])
def test_a_root_that_cannot_be_read_is_no_mount(lower: Path, tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "mnt").mkdir()
    done = command("mount", lower, tmp_path / "mnt", "-o", "fault=/:stat:EIO", *options)
    assert done.returncode == 32
    assert done.stderr.startswith(f"cowfs: {tmp_path}/mnt: the root cannot be read: Input/output error")
    assert done.stderr.count("\n") == 1
    assert not is_mounted(tmp_path / "mnt")


def test_a_directory_cannot_crash(lower: Path, tmp_path: Path) -> None:
    """Neither one that is there, nor one that the mount would make; other faults can be."""
    refused = "a directory keeps what was not synced"
    here = cowfs.mount(lower, tmp_path / "store", fault="*:write:CRASH")
    with pytest.raises(UsageError, match=refused), here:
        raise AssertionError("not reached")
    with cowfs.mount(lower, tmp_path / "store", fault="none") as tree:
        tree.inject("*:mkdir:EIO")
        assert outcome(os.mkdir, tree.path / "dir") == "EIO"
        with pytest.raises(CowfsError, match=refused):
            tree.inject("*:write:CRASH")
        with pytest.raises(CowfsError, match=refused):
            tree.crash()
        assert sorted(os.listdir(tree.path / "etc")) == ["a.conf", "b:c"], "it is still there"
    with (
        pytest.raises(UsageError, match=refused),
        cowfs.mount(lower, tmp_path / "store", fault="*:write:CRASH"),
    ):
        raise AssertionError("not reached")
