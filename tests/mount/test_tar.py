"""A tar or zip archive, or an ISO 9660 image, as the lower of a mount."""

from __future__ import annotations

import json
import os
from pathlib import Path
from shutil import which

import pytest

from cowfs.formats.archives import NAMES
from tests.support.mounts import cowfs, mounted
from tests.support.system import needs_fuse, run

DEV_FUSE_AT_NIGHT = True

pytestmark = needs_fuse


PACK = {
    "tar": lambda lower, archive: run("tar", "-C", lower, "-cf", archive, "."),
    "iso9660": lambda lower, archive: run(
        *("xorriso", "-as", "mkisofs", "-quiet", "-R", "-o", archive, lower)
    ),
    "zip": lambda lower, archive: run("zip", "-qry", archive, ".", cwd=lower),
}


_MADE_BY = {"tar": "tar", "iso9660": "xorriso", "zip": "zip"}


@pytest.mark.parametrize("kind", PACK)
def test_an_archive_is_a_lower(tmp_path: Path, kind: str) -> None:
    if which(_MADE_BY[kind]) is None:
        pytest.skip(f"needs {_MADE_BY[kind]}")
    lower, archive, mnt, store = (tmp_path / name for name in ("lower", f"x.{kind}", "mnt", "store"))
    (lower / "dir").mkdir(parents=True)
    (lower / "dir/file").write_bytes(os.urandom(1 << 20) + bytes(2 << 20))
    (lower / "gone").write_text("x")
    (lower / "alias").hardlink_to(lower / "dir/file")
    (lower / "link").symlink_to("dir/file")
    PACK[kind](lower, archive)
    about = json.loads(cowfs("info", archive, "--json", check=True).stdout)
    assert (about["kind"], about["format"], about["size"]) == (kind, NAMES[kind], archive.stat().st_size)
    assert about["inodes"] == (5 if kind == "tar" else 6)
    content = (lower / "dir/file").read_bytes()
    with mounted(archive, mnt, store):
        assert (mnt / "link").read_bytes() == content
        assert (mnt / "alias").read_bytes() == content
        is_linked = (mnt / "alias").stat().st_ino == (mnt / "dir/file").stat().st_ino
        assert is_linked == (kind == "tar")  # the others are packed without hard links
        with (mnt / "dir/file").open("r+b") as file:
            file.write(b"changed")
        (mnt / "gone").unlink()
        (mnt / "dir").rename(mnt / "other")
    with mounted(archive, mnt, store):
        changed = b"changed" + content[7:]
        assert (mnt / "other/file").read_bytes() == changed
        assert (mnt / "alias").read_bytes() == (changed if is_linked else content)
        assert sorted(os.listdir(mnt)) == ["alias", "link", "other"]
    changes = cowfs("diff", store, check=True).stdout
    assert "gone" in changes and "other" in changes
    what = {"tar": "tar archives", "zip": "zip archives", "iso9660": "ISO 9660 images"}[kind]
    assert f"the kernel mounts no {what}" in cowfs("info", store, "--kernel").stderr
    (lower / "more").touch()
    PACK[kind](lower, archive)
    refused = cowfs("mount", archive, mnt, "--store", store)
    assert about["fingerprint"] not in cowfs("info", archive, check=True).stdout
    assert refused.returncode and f"belongs to {archive} ({NAMES[kind]}, " in refused.stderr
