"""The upper of an overlayfs on cowfs: of the kernel's, which wants RENAME_WHITEOUT, and of fuse-overlayfs."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cowfs.linux import files
from tests.support.mounts import Mounted, cowfs, mounted
from tests.support.system import needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True
needs_it = pytest.mark.skipif(shutil.which("fuse-overlayfs") is None, reason="needs fuse-overlayfs")
pytestmark = [needs_fuse, needs_root]


SET_ID = {"both": 0o6755, "user": 0o4711, "group": 0o2755}


@pytest.fixture(params=["s.bs", "store"])
def mount(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mounted]:
    (tmp_path / "lower").mkdir()
    (tmp_path / "lower" / "file").write_text("below\n")
    (tmp_path / "below" / "dir" / "sub").mkdir(parents=True)
    for name in ("one", "dir/two", "dir/three", "dir/sub/four"):
        (tmp_path / "below" / name).write_text(f"{name}\n")
    for name, mode in SET_ID.items():
        (tmp_path / "below" / name).write_text("")
        os.chown(tmp_path / "below" / name, 7, 8)
        (tmp_path / "below" / name).chmod(mode)
    store = tmp_path / request.param
    if store.suffix:
        cowfs("create", store, "32", check=True)
    with mounted(tmp_path / "lower", tmp_path / "mnt", store) as made:
        (made.path / "upper").mkdir()
        (made.path / "work").mkdir()
        (tmp_path / "above").mkdir()
        yield made
    if store.suffix:
        assert run("e2fsck", "-fn", store, check=False).returncode == 0


@contextmanager
def above(mount: Mounted, kind: str) -> Iterator[Path]:
    at, layers = mount.path.with_name("above"), mount.path.with_name("below")
    options = f"lowerdir={layers},upperdir={mount.path}/upper,workdir={mount.path}/work"
    if kind == "kernel":
        run("mount", "-t", "overlay", "above", "-o", f"{options},redirect_dir=on,metacopy=on", at)
    else:
        subprocess.run(["fuse-overlayfs", "-o", options, at], check=True, capture_output=True)
    try:
        yield at
    finally:
        run("umount", at)


def shown(root: Path) -> dict[str, str]:
    """The tree: what is in files, and that the rest is a directory."""
    return {str(p.relative_to(root)): "" if p.is_dir() else p.read_text() for p in root.rglob("*")}


@pytest.mark.parametrize("kind", ["kernel", pytest.param("fuse-overlayfs", marks=needs_it)])
def test_an_overlay_has_its_upper_here(mount: Mounted, kind: str) -> None:
    """What is deleted, renamed and written there is so after a mount of both anew."""
    with above(mount, kind) as at:
        (at / "one").unlink()
        (at / "dir" / "two").rename(at / "dir" / "second")
        run("mv", at / "dir" / "sub", at / "moved")  # fuse-overlayfs says EXDEV, and mv copies
        (at / "dir" / "three").write_text("changed\n")
        os.link(at / "dir" / "three", at / "third")
        (at / "new").mkdir()
        for name, mode in SET_ID.items():
            os.utime(at / name)
            seen = (at / name).stat()
            left = mode if kind == "kernel" else mode & 0o777  # fuse-overlayfs: as on every filesystem
            assert (seen.st_mode & 0o7777, seen.st_uid, seen.st_gid) == (left, 7, 8)
        wanted = {
            "dir": "", "dir/second": "dir/two\n", "dir/three": "changed\n", "moved": "",
            "moved/four": "dir/sub/four\n", "third": "changed\n", "new": "",
            **dict.fromkeys(SET_ID, ""),
        }  # fmt: skip
        assert shown(at) == wanted
        (at / "dir" / "three").unlink()  # by this name the kernel's overlayfs has found the third
        del wanted["dir/three"]
    assert stat.S_ISCHR((mount.path / "upper" / "one").lstat().st_mode)
    with above(mount, kind) as at:
        assert shown(at) == wanted


def test_a_whiteout_is_left(mount: Mounted) -> None:
    """renameat2(2): where there is something below, and where not; of the directory's group if it says so."""
    os.chown(mount.path, 0, 2000)
    mount.path.chmod(0o2755)
    for name in ("file", "new"):
        path = mount.path / name
        path.write_text(f"{name}\n")
        files.renameat2(
            -100, os.fsencode(path), -100, os.fsencode(mount.path / f"{name}2"), files.RENAME_WHITEOUT
        )
        assert (mount.path / f"{name}2").read_text() == f"{name}\n"
        left = path.lstat()
        assert stat.S_ISCHR(left.st_mode)
        assert (left.st_rdev, left.st_nlink, left.st_uid, left.st_gid) == (0, 1, 0, mount.path.stat().st_gid)
    os.mknod(mount.path / "made", 0o640 | stat.S_IFCHR, 0)
    with pytest.raises(FileExistsError):
        os.mknod(mount.path / "file", stat.S_IFCHR, 0)
    mount.umount()
    with mounted(mount.path.with_name("lower"), mount.path, next(mount.path.parent.glob("s*"))):
        for name in ("file", "new", "made"):
            assert stat.S_ISCHR((mount.path / name).lstat().st_mode), name
            (mount.path / name).unlink()
        assert not {"file", "new", "made"} & set(os.listdir(mount.path))
        (mount.path / "file").write_text("again")
