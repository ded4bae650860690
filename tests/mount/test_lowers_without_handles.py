"""A lower on a filesystem without lasting file handles: the names of one file are apart."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.mounts import cowfs, mounted
from tests.support.system import needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True
pytestmark = [needs_fuse, needs_root]
NAMES = ("dir/one", "dir/two", "three")


def shown(top: Path) -> dict[str, tuple[str, int]]:
    """Return the content and the link count of each name."""
    return {
        name: ((top / name).read_text(), (top / name).stat().st_nlink)
        for name in NAMES
        if os.path.lexists(top / name)
    }


@pytest.mark.parametrize("kind", ["image", pytest.param("directory", marks=pytest.mark.nightly)])
def test_hard_links(kind: str, tmp_path: Path) -> None:
    """A change shows only at the name where it was made, as with overlayfs, which has no index here."""
    lower, store = tmp_path / "lower", tmp_path / "store"
    (lower / "dir").mkdir(parents=True)
    (lower / NAMES[0]).write_text("old")
    for name in NAMES[1:]:
        os.link(lower / NAMES[0], lower / name)
    if kind == "image":
        cowfs("create", store, "16", check=True)
    with mounted(lower, tmp_path / "below", tmp_path / "other") as below:
        with mounted(below.path, tmp_path / "m", store) as here:
            assert shown(here.path) == dict.fromkeys(NAMES, ("old", 1))
            assert len({(here.path / name).stat().st_ino for name in NAMES}) == len(NAMES)
            os.utime(here.path / "dir/two")
            with (here.path / "dir/two").open("a") as file:
                file.write(" and new")
            (here.path / "dir/one").unlink()
            expected = {"dir/two": ("old and new", 1), "three": ("old", 1)}
            assert shown(here.path) == expected
            run("sh", "-c", "echo 2 > /proc/sys/vm/drop_caches")
            assert shown(here.path) == expected
            assert cowfs("diff", here.path, check=True).stdout.split()[::2][:2] == ["D", "M"]
        with mounted(below.path, tmp_path / "m", store) as here:
            assert shown(here.path) == expected
            os.link(here.path / "three", here.path / "four")
            (here.path / "four").write_text("both")
            assert shown(here.path)["three"] == ("both", 2)
