"""EROFS images as lowers, which the kernel reads."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from tests.support.mounts import cowfs, mounted
from tests.support.system import needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True

pytestmark = [needs_fuse, needs_root]


@pytest.mark.skipif(shutil.which("mkfs.erofs") is None, reason="needs mkfs.erofs (erofs-utils)")
@pytest.mark.skipif("erofs" not in Path("/proc/filesystems").read_text(), reason="this kernel has no EROFS")
def test_an_erofs_image_is_a_lower(tmp_path: Path) -> None:
    lower, image, mnt, store = (tmp_path / name for name in ("lower", "image", "mnt", "store"))
    (lower / "dir").mkdir(parents=True)
    (lower / "dir/file").write_text("first\n" * 10_000)
    (lower / "gone").write_text("x")
    (lower / "link").symlink_to("dir/file")
    (lower / "name").hardlink_to(lower / "dir/file")
    os.setxattr(lower / "dir/file", "user.x", b"y")
    run("mkfs.erofs", "-zlz4hc", image, lower)
    assert re.search(r"^inodes: +5$", cowfs("info", image, check=True).stdout, re.MULTILINE)
    with mounted(image, mnt, store, engine="kernel"):
        assert (mnt / "link").read_text() == "first\n" * 10_000
        assert os.getxattr(mnt / "dir/file", "user.x") == b"y"
        number = (mnt / "name").stat().st_ino
        with (mnt / "dir/file").open("a") as file:
            file.write("second\n")
        (mnt / "gone").unlink()
        (mnt / "dir").rename(mnt / "other")
    with mounted(image, mnt, store, engine="kernel"):
        assert (mnt / "other/file").read_text() == "first\n" * 10_000 + "second\n"
        assert sorted(os.listdir(mnt)) == ["link", "name", "other"]
        assert [(mnt / name).stat().st_ino for name in ("name", "other/file")] == [number, number]
    changes = cowfs("diff", store, "--engine", "kernel", check=True).stdout
    assert "gone" in changes and "other" in changes
    assert f"mount -t erofs -o ro,loop {image}" in cowfs("info", store, "--kernel", check=True).stdout

    without = cowfs("mount", image, mnt)
    assert without.returncode and "an EROFS image" in without.stderr and "--engine kernel" in without.stderr
    run("mkfs.erofs", image, lower)
    other = cowfs("mount", image, mnt, "--store", store, "--engine", "kernel")
    assert other.returncode and f"belongs to {image} (EROFS, " in other.stderr
