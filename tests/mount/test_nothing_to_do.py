"""A command that has nothing to do in a store, or that is refused, changes no byte of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.mount.test_diff_patch import script
from tests.support.mounts import cowfs, make_store, mounted, unchanged
from tests.support.system import needs_fuse, needs_root

DEV_FUSE_AT_NIGHT = True

pytestmark = needs_fuse

MAKE = """
    mkdir -p lower/etc/apt lower/usr/bin other target
    echo a >lower/etc/fstab; echo b >lower/etc/hosts; echo c >lower/etc/apt/list; echo d >lower/usr/bin/tool
    echo other >other/file; cp -a lower/. target
"""
WORK = """
    echo new >etc/fstab; rm etc/hosts; echo x >etc/new; chmod 700 etc
    mv usr/bin usr/sbin; rm -r etc/apt; mkdir etc/apt; echo e >etc/apt/list; touch usr/bin
    ln etc/new etc/again; setfattr -n user.a -v b etc/new
"""
NOTHING = "nothing to revert there"


@needs_root
@pytest.mark.parametrize("kind", ["image", "directory"])
def test_it_changes_no_byte(tmp_path: Path, kind: str) -> None:
    script(MAKE, tmp_path)
    lower, mnt, store = tmp_path / "lower", tmp_path / "mnt", make_store(tmp_path, kind)
    with mounted(lower, mnt, store):
        script(WORK, mnt)
    (tmp_path / "two").mkdir()
    same, empty = make_store(tmp_path / "two", kind), tmp_path / "empty"
    for place in (same, empty):
        with mounted(lower, mnt, place):
            pass
    cowfs("apply", store, same, check=True)
    root = tmp_path / "target"
    os.utime(root, ns=(10**18, 10**18))
    cases: list[tuple[list[str | Path], int, str]] = [
        (["revert", store, "usr/lib", "nothing*"], 1, NOTHING),
        (["revert", store, "etc/new", "--metadata"], 1, NOTHING),
        (["revert", store, "usr/lib", "nothing*", "-n"], 1, "no usr/lib in it, now or before"),
        (["revert", store, "etc/new", "--metadata", "-n"], 1, NOTHING),
        (["revert", store, "etc/apt/list", "-n"], 32, "etc/apt was deleted and created again"),
        (["revert", store, "usr/sbin", "-n"], 32, "there is another usr/bin now"),
        (["revert", empty, "--all", "-n"], 1, NOTHING),
        (["revert", store, "--all", "-n"], 0, ""),
        (["revert", store, "etc/apt/list"], 32, "etc/apt was deleted and created again"),
        (["revert", store, "usr/sbin"], 32, "there is another usr/bin now"),
        (["revert", store, "--undo"], 32, "nothing was reverted"),
        (["revert", store, "--all", "--lower", tmp_path / "other"], 32, "belongs to"),
        (["vacuum", store], 0, "0 removed"),
        (["vacuum", store, "--trash"], 0, ""),
        (["checkpoint", store, "a/b"], 1, "it has a slash"),
        (["checkpoint", store, "--delete", "none"], 1, "no such checkpoint"),
        (["rollback", store, "none"], 1, "no such checkpoint"),
        (["rebase", store, "--onto", root, "--dry-run"], 0, ""),
        (["convert", store, "--to", "overlayfs"], 32, "already"),
        (["mount", tmp_path / "other", mnt, "--store", store], 32, "belongs to"),
        (["apply", empty, store], 0, ""),
        (["apply", store, store], 1, "is the store whose changes are meant"),
    ]
    for words, code, said in cases:
        with unchanged(store):
            done = cowfs(*words)
        assert (done.returncode, said in done.stderr) == (code, True), done
    with unchanged(same):
        assert cowfs("apply", store, same, check=True).stderr == ""
    with unchanged(root):
        assert cowfs("apply", empty, root, check=True).stderr == ""
    cowfs("checkpoint", store, "one", check=True)
    with unchanged(store):
        assert "already exists" in cowfs("checkpoint", store, "one").stderr
        assert NOTHING in cowfs("revert", store, "--all").stderr
        assert NOTHING in cowfs("revert", store, "--all", "-n").stderr
        cowfs("rollback", store, "one", check=True)
