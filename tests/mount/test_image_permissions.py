"""Permissions on a lower without access control lists, such as a squashfs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.mounts import mounted
from tests.support.system import needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True

pytestmark = [needs_root, needs_fuse, pytest.mark.root]


def test_a_directory_that_belongs_to_another_is_entered_by_its_mode_bits(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "theirs").mkdir(parents=True)
    (tree / "theirs" / "file").write_text("text")
    os.chown(tree / "theirs", 1000, 1000)
    os.chmod(tree / "theirs", 0o755)
    image = tmp_path / "image.sqsh"
    run("mksquashfs", tree, image, "-noappend", "-quiet", "-no-progress")
    with mounted(image, tmp_path / "merged", tmp_path / "store") as merged:
        assert os.listdir(merged.path / "theirs") == ["file"]
        assert (merged.path / "theirs" / "file").read_text() == "text"
        (merged.path / "theirs" / "file").unlink()
