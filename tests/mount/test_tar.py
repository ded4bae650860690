"""A tar archive as the lower of a mount."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.mounts import cowfs, mounted
from tests.support.system import needs_fuse, run

DEV_FUSE_AT_NIGHT = True

pytestmark = needs_fuse


def test_a_tar_archive_is_a_lower(tmp_path: Path) -> None:
    lower, archive, mnt, store = (tmp_path / name for name in ("lower", "x.tar", "mnt", "store"))
    (lower / "dir").mkdir(parents=True)
    (lower / "dir/file").write_bytes(os.urandom(3 << 20))
    (lower / "gone").write_text("x")
    (lower / "alias").hardlink_to(lower / "dir/file")
    (lower / "link").symlink_to("dir/file")
    run("tar", "-C", lower, "-cf", archive, ".")
    content = (lower / "dir/file").read_bytes()
    with mounted(archive, mnt, store):
        assert (mnt / "link").read_bytes() == content
        assert (mnt / "alias").stat().st_ino == (mnt / "dir/file").stat().st_ino
        with (mnt / "dir/file").open("r+b") as file:
            file.write(b"changed")
        (mnt / "gone").unlink()
        (mnt / "dir").rename(mnt / "other")
    with mounted(archive, mnt, store):
        assert (mnt / "other/file").read_bytes() == b"changed" + content[7:] == (mnt / "alias").read_bytes()
        assert sorted(os.listdir(mnt)) == ["alias", "link", "other"]
    changes = cowfs("diff", store, check=True).stdout
    assert "gone" in changes and "other" in changes
    assert "the kernel mounts no tar archives" in cowfs("info", store, "--kernel").stderr
    (lower / "more").touch()
    run("tar", "-C", lower, "-cf", archive, ".")
    refused = cowfs("mount", archive, mnt, "--store", store)
    assert refused.returncode and f"belongs to {archive} (tar archive, " in refused.stderr
