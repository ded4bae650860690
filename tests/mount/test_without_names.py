"""Removed files that are still in use can be changed like any other, as on ext3."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounts import Mounted, cowfs, mounted
from tests.support.squashfs import needs_mksquashfs
from tests.support.system import NOBODY, needs_fuse, needs_root, run

pytestmark = [needs_fuse, needs_root, needs_mksquashfs]
DEV_FUSE_AT_NIGHT = True
LONG_AGO, LATE = -(1 << 31) * 10**9, 15_000_000_000_000_000_000


@pytest.fixture(
    params=[
        ("image", "image", None),
        ("dir", "dir", None),
        ("image", "image", "kernel"),
        ("dir", "image", None),
    ],
    ids=lambda param: "-".join(part or "process" for part in param),
)
def mount(request: pytest.FixtureRequest, nobody_path: Path) -> Iterator[Mounted]:
    """A tree of each kind, with a store of each kind."""
    lower_kind, store_kind, engine = request.param
    lower, store = nobody_path / "lower", nobody_path / "store"
    (lower / "dir" / "sub").mkdir(parents=True)
    (lower / "dir" / "sub" / "file").write_text("here\n")
    (lower / "empty" / "too").mkdir(parents=True)
    if lower_kind == "image":
        run("mksquashfs", lower, nobody_path / "lower.squashfs", "-quiet", "-no-progress", "-no-xattrs")
        lower = nobody_path / "lower.squashfs"
    if store_kind == "image":
        cowfs("create", store, "64", check=True)
    with mounted(lower, nobody_path / "mnt", store, engine=engine) as made:
        yield made
    if store_kind == "image":
        assert run("e2fsck", "-fn", store, check=False).returncode == 0


def change(fd: int) -> None:
    """Change all attributes of what has no name, and look at them."""
    os.fchmod(fd, 0o710)
    os.fchown(fd, NOBODY, 5)
    os.utime(fd, ns=(LONG_AGO, 2))
    os.setxattr(fd, "user.color", b"blue")
    with pytest.raises(OSError) as caught:
        os.getxattr(fd, "user.none")
    assert caught.value.errno == errno.ENODATA
    found = os.fstat(fd)
    assert (found.st_mode & 0o7777, found.st_uid, found.st_gid, found.st_nlink) == (0o710, NOBODY, 5, 0)
    assert (found.st_atime_ns, found.st_mtime_ns) == (LONG_AGO, 2)
    assert os.getxattr(fd, "user.color") == b"blue"
    assert os.listxattr(fd) == ["user.color"]


def test_directories(mount: Mounted) -> None:
    """One inside another, with and without anything in the store."""
    os.mkdir(mount.path / "new")
    names = ["dir/sub", "dir", "empty/too", "empty", "new"]
    opened = [os.open(mount.path / name, os.O_RDONLY | os.O_DIRECTORY) for name in names]
    try:
        (mount.path / "dir" / "sub" / "file").unlink()
        for name in names:
            os.rmdir(mount.path / name)
        for fd in opened:
            change(fd)
            assert os.listdir(fd) == []
            for make in (os.mkdir, os.mkfifo):
                with pytest.raises(FileNotFoundError):
                    make("inside", dir_fd=fd)
            os.fsync(fd)
            os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY))
        assert os.listdir(mount.path) == []
    finally:
        for fd in opened:
            os.close(fd)


def test_files(mount: Mounted) -> None:
    """Whoever opened them, to read only too."""
    (mount.path / "new").write_text("here\n")
    names = ["dir/sub/file", "new"]
    opened = [os.open(mount.path / name, os.O_RDONLY) for name in names]
    try:
        for name in names:
            os.unlink(mount.path / name)
        for fd in opened:
            change(fd)
            again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
            os.pwrite(again, b"Th", 0)
            os.pwrite(again, b"e", 2)
            os.ftruncate(again, 3)
            os.close(again)
            assert os.pread(fd, 10, 0) == b"The"
    finally:
        for fd in opened:
            os.close(fd)


def test_times_of_other_centuries(mount: Mounted) -> None:
    """Times are kept in the range of the store's filesystem: in an image up to 2446."""
    path = mount.path / "dir" / "sub" / "file"
    store = mount.path.parent / "store"
    os.utime(store, ns=(LONG_AGO, LATE))
    first, last = (store.stat().st_atime_ns, store.stat().st_mtime_ns) if store.is_dir() else (LONG_AGO, LATE)
    os.utime(path, ns=(LONG_AGO, LATE))
    os.utime(mount.path / "dir", ns=(LATE, LATE))
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (first, last)
    assert (mount.path / "dir").stat().st_mtime_ns == last
    path.rename(mount.path / "dir" / "other")
    assert (mount.path / "dir" / "other").stat().st_mtime_ns == last


def test_attributes_that_are_not_there(mount: Mounted) -> None:
    """ENODATA, whatever the lower knows of attributes; EOPNOTSUPP for names that nobody knows."""
    file = mount.path / "dir" / "sub" / "file"
    for name, code in (
        ("user.none", errno.ENODATA),
        ("trusted.none", errno.ENODATA),
        ("security.capability", errno.ENODATA),
        ("system.posix_acl_access", errno.ENODATA),
        ("unknown.none", errno.EOPNOTSUPP),
    ):
        for call in (os.getxattr, os.removexattr):
            if call is os.removexattr and name.startswith("system"):
                continue
            with pytest.raises(OSError) as caught:
                call(file, name)
            assert caught.value.errno == code, (call, name)
