"""ACLs in archives: GNU tar's --acls and --xattrs read what `cowfs export` writes, and cowfs reads theirs."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.mounts import cowfs, mounted
from tests.support.system import needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True

pytestmark = [needs_fuse, needs_root]

ACLS = ("d:u:77:rwx", "u:1234:rw,u:nobody:-,g:daemon:r")


def acls(top: Path) -> str:
    return run("getfacl", "-nR", ".", cwd=top).stdout


def test_acls_go_through_archives(tmp_path: Path) -> None:
    (tmp_path / "lower").mkdir()
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as here:
        (here.path / "dir").mkdir()
        (here.path / "dir/file").write_text("x")
        (here.path / "link").symlink_to("dir")
        run("setfacl", "-m", ACLS[0], here.path / "dir")
        run("setfacl", "-m", ACLS[1], here.path / "dir/file", here.path / "dir")
        meant = acls(here.path)
        cowfs("export", here.path, "--to", "tar", tmp_path / "x.tar", check=True)
    xattrs = ["--xattrs", "--xattrs-include=*"]
    for options in (["--acls"], xattrs, ["--acls", *xattrs]):
        unpacked = tmp_path / " ".join(options)
        unpacked.mkdir()
        assert run("tar", "-C", unpacked, *options, "-xpf", tmp_path / "x.tar").stderr == ""
        assert acls(unpacked) == meant
    run("tar", "-C", tmp_path / "--acls", "--acls", "-cf", tmp_path / "theirs.tar", ".")
    with mounted(tmp_path / "theirs.tar", tmp_path / "mnt", tmp_path / "other") as here:
        assert acls(here.path) == meant
        os.chmod(here.path / "dir/file", 0o640)
        assert "mask::r--" in run("getfacl", "-n", here.path / "dir/file").stdout
