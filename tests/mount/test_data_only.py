"""Data-only lowers (``l::d``): no name of theirs shows, and metacopies with absolute redirects have their
data there, as with the kernel's overlayfs."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.mounts import MOUNT_MANY, cowfs, is_mounted
from tests.support.system import needs_fuse, needs_root, run

pytestmark = [needs_fuse, needs_root]
DEV_FUSE_AT_NIGHT = True

Seen = dict[str, object]
NAMES = [
    "meta", "second", "relative", "unnamed", "lost", "dir", "link", "chain", "own", "objects", "objects/aa",
    "objects/moved",
]  # fmt: skip


def put(path: Path, content: str, redirect: str | None = None, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(mode)
    if redirect is not None:
        os.truncate(path, 0)
        os.truncate(path, len(content))
        os.setxattr(path, "trusted.overlay.metacopy", b"")
        if redirect:
            os.setxattr(path, "trusted.overlay.redirect", redirect.encode())


@pytest.fixture
def lowers(tmp_path: Path) -> list[Path]:
    """Two ordinary lowers, and two data-only ones."""
    top, low, first, second = layers = [tmp_path / name for name in ("top", "low", "first", "second")]
    put(top / "chain", "in first\n", "/meta", 0o600)
    put(low / "meta", "in first\n", "/objects/aa", 0o640)
    put(low / "second", "in second\n", "/objects/bb")
    put(low / "relative", "in first\n", "hidden")
    put(low / "unnamed", "in first\n", "")
    put(low / "lost", "nowhere\n", "/objects/none")
    put(low / "dir", "in second\n", "/kind")
    put(low / "link", "in first\n", "/symlink")
    put(low / "own", "own\n")
    put(low / "objects" / "own", "own\n")
    put(first / "objects" / "aa", "in first\n", mode=0o600)
    put(first / "hidden", "in first\n")
    put(first / "unnamed", "in first\n")
    (first / "symlink").symlink_to("hidden")
    (first / "kind").mkdir()
    put(second / "kind", "in second\n")
    put(second / "objects" / "aa", "second!!\n")
    put(second / "objects" / "bb", "in second\n")
    return layers


def seen(top: Path) -> Seen:
    """Return what can be read, and which of it is listed. The kernel lists files without data too."""
    found: Seen = {}
    for name in NAMES:
        try:
            info = (top / name).stat()
            content = "" if stat.S_ISDIR(info.st_mode) else (top / name).read_text()
            found[name] = (stat.filemode(info.st_mode), info.st_size if content else 0, content)
        except OSError as failure:
            assert failure.errno in {errno.EIO, errno.ENOENT}
            found[name] = "not read"
    listed = {str(p.relative_to(top)) for p in top.rglob("*")}
    return found | {"listed": listed - {name for name, what in found.items() if isinstance(what, str)}}


@contextmanager
def kernel(lowers: list[Path], store: Path, at: Path) -> Iterator[Path]:
    top, low, *data = map(str, lowers)
    for name in ("upper", "work"):
        (store / name).mkdir(parents=True, exist_ok=True)
    at.mkdir(exist_ok=True)
    layers = f"lowerdir={top}:{low}" + "".join(f"::{one}" for one in data)
    features = "redirect_dir=on,metacopy=on,index=on,xino=on"
    options = f"{layers},upperdir={store}/upper,workdir={store}/work,{features}"
    run(*MOUNT_MANY, "-t", "overlay", "overlay", at, "-o", options)
    try:
        yield at
    finally:
        run("umount", at)


def change(top: Path) -> None:
    (top / "meta").chmod(0o604)
    (top / "chain").rename(top / "objects" / "moved")
    with (top / "second").open("a") as file:
        file.write("more\n")
    (top / "dir").unlink()
    (top / "hidden").write_text("new\n")


def test_they_give_data_and_show_no_names(lowers: list[Path], tmp_path: Path) -> None:
    mnt, store, place = tmp_path / "mnt", tmp_path / "store", tmp_path / "kernel"
    given = "{}:{}::{}::{}".format(*lowers)
    with kernel(lowers, place, tmp_path / "merged") as merged:
        before = seen(merged)
        change(merged)
        after = seen(merged)
    assert before["chain"] == ("-rw-------", 9, "in first\n") and before["unnamed"] == "not read"
    mnt.mkdir()
    assert cowfs("mount", given, str(mnt), "--store", str(store)).returncode == 0
    try:
        assert seen(mnt) == before
        assert "its data is shown" in cowfs("explain", str(mnt), "chain").stdout
        change(mnt)
        assert seen(mnt) == after
        wanted = cowfs("diff", str(mnt)).stdout
        assert cowfs("info", str(mnt)).stdout.count(", data only") == 2
    finally:
        cowfs("umount", str(mnt))
    assert not is_mounted(mnt)
    assert "hidden" in wanted and "unnamed" not in wanted and "lost" not in wanted
    assert cowfs("diff", str(store)).stdout == wanted == cowfs("diff", str(store), "--lower", given).stdout
    assert cowfs("du", str(store)).returncode == 0
    assert "+more" in cowfs("diff", "-p", str(store), "second").stdout
    assert f"{lowers[1]}::{lowers[2]}::{lowers[3]}," in cowfs("info", "--kernel", str(store)).stdout
    with kernel(lowers, store, tmp_path / "merged") as merged:
        assert seen(merged) == after
    done = cowfs("mount", ":".join(map(str, lowers)), str(mnt), "--store", str(store))
    assert done.returncode == 32 and "data only" in done.stderr, done
    done = cowfs("mount", f"{lowers[0]}::{lowers[2]}:{lowers[1]}", str(mnt))
    assert done.returncode == 1 and "an ordinary lower below a data-only one (" in done.stderr, done
