"""Changes of what chattr(1) has made synchronous (S, D) are on disk at once; copy-up keeps the flags."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cowfs.linux import inode_flags
from cowfs.linux.inode_flags import DIRSYNC, NOATIME, SYNC
from tests.support.mounts import Mounted, cowfs, kernel_overlay, mounted
from tests.support.system import needs_fuse, needs_root, run

pytestmark = [needs_fuse, needs_root]
DEV_FUSE_AT_NIGHT = True


def flags_of(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        return inode_flags.get(fd) & (SYNC | DIRSYNC | NOATIME)
    finally:
        os.close(fd)


def set_flags(path: Path, flags: int) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        inode_flags.put(fd, inode_flags.get(fd) | flags)
    finally:
        os.close(fd)


def begin(root: Path, flag: int) -> None:
    """Make two files and two directories, which have the flag or inherit it."""
    root.mkdir()
    for name in ("names", "others"):
        (root / name).mkdir()
        set_flags(root / name, flag)
    for name in ("a", "b", "c"):
        (root / "names" / name).write_text("old")
    (root / "names" / "empty").mkdir()
    (root / "file").write_text("0123456789")
    set_flags(root / "file", flag & SYNC)
    (root / "low").write_text("low")
    set_flags(root / "low", flag & SYNC)


def on_disk(store: Path, request: str) -> str:
    """Return what debugfs(8) says about the store as a power failure would leave it now."""
    copy = store.with_name("copy")
    shutil.copyfile(store, copy)
    subprocess.run(["e2fsck", "-fy", copy], capture_output=True, check=False)  # it knows only the journal
    return run("debugfs", "-R", request, copy).stdout


def write(path: Path, flags: int, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | flags)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def copy_range(root: Path) -> None:
    with open(root / "low", "rb") as source, open(root / "file", "r+b") as target:
        assert os.copy_file_range(source.fileno(), target.fileno(), 3, 0, 20) == 3


Change = tuple[Callable[[Path], object], str, str, bool]
OF_FILES: dict[str, Change] = {
    "append": (lambda root: write(root / "file", os.O_APPEND, b"more"), "cat upper/file", "9more", True),
    "append_again": (lambda root: write(root / "low", os.O_APPEND, b"er"), "cat upper/low", "lower", True),
    "truncate": (lambda root: os.truncate(root / "file", 70), "stat upper/file", "Size: 70", True),
    "open": (lambda root: write(root / "file", os.O_TRUNC, b"xxx"), "stat upper/file", "Size: 3", True),
    "copy_file_range": (copy_range, "stat upper/file", "Size: 23", True),
    "xattr": (lambda root: os.setxattr(root / "file", "user.x", b"v"), "ea_list upper/file", "user.x", True),
    "in_new_file": (
        lambda root: write(root / "names/new", os.O_CREAT, b"inside"), "cat upper/names/new", "inside", True
    ),
}  # fmt: skip
OF_NAMES: dict[str, Change] = {
    "create": (lambda root: (root / "names/new").touch(), "ls upper/names", "new", True),
    "mkdir": (lambda root: (root / "names/new").mkdir(), "ls upper/names", "new", True),
    "symlink": (lambda root: (root / "names/new").symlink_to("a"), "ls upper/names", "new", True),
    "mkfifo": (lambda root: os.mkfifo(root / "names/new"), "ls upper/names", "new", True),
    "link": (lambda root: (root / "names/new").hardlink_to(root / "file"), "ls upper/names", "new", True),
    "unlink": (lambda root: (root / "names/a").unlink(), "ls upper/names", ") a ", False),
    "rmdir": (lambda root: (root / "names/empty").rmdir(), "ls upper/names", "empty", False),
    "rename": (lambda root: (root / "names/a").rename(root / "x"), "ls upper/names", ") a ", False),
    "rename_to": (lambda root: (root / "names/b").rename(root / "others/x"), "ls upper/others", ") x ", True),
}


@contextmanager
def with_store(place: Path) -> Iterator[tuple[Path, Mounted]]:
    lower = place / "lower"
    lower.mkdir()
    cowfs("create", place / "store", "16", check=True)
    with mounted(lower, place / "mnt", place / "store", engine="process") as mount:
        yield place / "store", mount


@pytest.mark.parametrize(
    ("flag", "changes"),
    [pytest.param(SYNC, OF_FILES | OF_NAMES, id="S"), pytest.param(DIRSYNC, OF_NAMES, id="D")],
)
def test_synchronous_changes_survive_a_power_failure(
    flag: int, changes: dict[str, Change], tmp_path: Path
) -> None:
    with with_store(tmp_path) as (store, mount):
        for name in changes:
            begin(mount.path / name, flag)
        fd = os.open(mount.path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        wrong = []
        for name, (do, request, expected, there) in changes.items():
            request = request.replace("upper", f"upper/{name}")
            assert (expected in on_disk(store, request)) is not there
            do(mount.path / name)
            if (expected in on_disk(store, request)) is not there:
                wrong.append(name)
        assert not wrong, "a power failure would undo these"


def test_flags_outlast_a_mount_and_are_seen_by_listings(tmp_path: Path) -> None:
    with with_store(tmp_path) as (store, mount):
        begin(mount.path / "d", SYNC)
        mount.umount()
        with mounted(tmp_path / "lower", mount.path, store, engine="process"):
            assert [entry.stat().st_size for entry in os.scandir(mount.path / "d/names") if entry.name == "a"]
            write(mount.path / "d/names/a", os.O_APPEND, b"er")
            assert on_disk(store, "cat upper/d/names/a") == "older"


@pytest.mark.parametrize("kind", ["process", "kernel", "directory", "overlayfs"])
def test_copy_up_keeps_synchronous_and_no_atime(kind: str, ext3: Path, tmp_path: Path) -> None:
    place = ext3 / tmp_path.name
    lower = place / "lower"
    (lower / "dir").mkdir(parents=True)
    sizes = {"small": 10, "large": 300_000}
    for name, size in sizes.items():
        (lower / name).write_bytes(b"x" * size)
    wanted = {"small": SYNC, "large": NOATIME | SYNC, "dir": NOATIME | DIRSYNC}
    for name, flags in wanted.items():
        set_flags(lower / name, flags)
    engine = kind if kind in {"process", "kernel"} else None
    if engine:
        cowfs("create", place / "store", "16", check=True)
    manager = (
        kernel_overlay([lower], place / "up", place / "mnt")
        if kind == "overlayfs"
        else mounted(lower, place / "mnt", place / "store", engine=engine)
    )
    try:
        with manager:
            for name in sizes:
                write(place / "mnt" / name, os.O_APPEND, b"y")
            (place / "mnt/dir/new").touch()
            found = {name: flags_of(place / "mnt" / name) for name in wanted}
        assert found == wanted | {"dir": NOATIME}
    finally:
        shutil.rmtree(place)
