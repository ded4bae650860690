"""`cowfs rebase`: the changes on a new version of the root, as a user sees it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.mount.test_export import script
from tests.support.mounts import COWFS, cowfs, mounted, unchanged
from tests.support.system import as_nobody_prefix, needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True

pytestmark = needs_fuse

CONFLICTS = 65
OLD = """
mkdir -p old/etc old/opt/tool old/gone/deep old/deleted
echo a >old/etc/a; echo b >old/etc/b; echo c >old/etc/c
echo one >old/opt/tool/one; echo data >old/gone/deep/file
echo d >old/deleted/d; ln old/etc/c old/etc/c2; head -c 100000 /dev/zero >old/opt/large
cp -a old new
echo new-a >new/etc/a; echo new-b >new/etc/b; echo two >new/opt/tool/two; rm -r new/gone
echo d2 >new/deleted/d2
"""
CHANGE = """
echo my-a >etc/a; echo mine >etc/mine; mv opt/tool opt/tool2; mv gone kept; echo more >>kept/deep/file
rm -r deleted; echo more >>etc/c; echo new-b >etc/b; chmod 600 opt/large
"""
TOLD = {
    ("conflict", "deleted", "deleted in the store, changed in the new root"),
    ("conflict", "etc/a", "changed in both"),
    ("dropped", "etc/b", "equal to the new root"),
    ("conflict", "kept", "renamed in the store, gone in the new root"),
    ("dropped", "gone", "deleted there, too"),
}


@pytest.mark.parametrize("fakeroot", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_a_users_store(nobody_path: Path, fakeroot: bool) -> None:
    prefix = as_nobody_prefix() if os.geteuid() == 0 else []

    def at(place: Path, text: str) -> str:
        return run(*prefix, "sh", "-ec", f"cd {place}; {text}").stdout

    at(nobody_path, OLD)
    old, new, store, mnt = (nobody_path / name for name in ("old", "new", "store", "mnt"))
    options = ["fakeroot"] if fakeroot else []
    own = "chown 5:6 etc/mine; mkdir owned; chown 7:8 owned" if fakeroot else ""
    with mounted(old, mnt, store, options=options, nobody=True):
        at(mnt, CHANGE + own)
        refused = cowfs("rebase", store, "--onto", new, nobody=True)
        assert refused.returncode == 32
        assert "in use" in refused.stderr

    def rebased(*arguments: str | Path) -> tuple[int, dict[str, object]]:
        done = cowfs("rebase", store, "--onto", new, "--json", *arguments, nobody=True)
        return done.returncode, json.loads(done.stdout)

    before = cowfs("diff", store, nobody=True).stdout
    refused = cowfs("rebase", store, "--from", new, "--onto", old, nobody=True)
    assert refused.returncode == 32
    assert "belongs to" in refused.stderr
    code, would = rebased("--dry-run")
    assert (code, would["dry_run"]) == (CONFLICTS, True)
    assert cowfs("diff", store, nobody=True).stdout == before
    look = nobody_path / "look"
    code, done = rebased("--from", old, "--conflicts", look)
    assert code == CONFLICTS
    assert {(one["kind"], one["path"], one["why"]) for one in done["told"]} == TOLD  # type: ignore[attr-defined]
    assert (done["told"], done["kept"], done["from"]) == (would["told"], would["kept"], [str(old)])
    assert cowfs("check", "-n", store, nobody=True).returncode == 0
    files = at(look, "find . -type f | xargs grep .").splitlines()
    assert sorted(files) == [
        *("./changed/etc/a:my-a", "./changed/kept/deep/file:data", "./changed/kept/deep/file:more"),
        *("./new/deleted/d2:d2", "./new/deleted/d:d", "./new/etc/a:new-a"),
        *("./old/deleted/d:d", "./old/etc/a:a", "./old/gone/deep/file:data"),
    ]
    with mounted(new, mnt, store, options=options, nobody=True):
        assert sorted(at(mnt, "find . -type f -size -9 | xargs grep .").splitlines()) == [
            *("./etc/a:my-a", "./etc/b:new-b", "./etc/c2:c", "./etc/c2:more", "./etc/c:c", "./etc/c:more"),
            *("./etc/mine:mine", "./kept/deep/file:data", "./kept/deep/file:more"),
            *("./opt/tool2/one:one", "./opt/tool2/two:two"),
        ]
        assert at(mnt, "stat -c %i etc/c etc/c2 | uniq | wc -l") == "1\n"
        assert at(mnt, "stat -c %a opt/large; cmp opt/large ../new/opt/large") == "600\n"
        if fakeroot:
            assert at(mnt, "stat -c '%u %F' etc/mine owned").splitlines() == [
                *("5 regular file", "7 directory"),
            ]
    assert "opt/tool/ -> opt/tool2/" in cowfs("diff", store, nobody=True).stdout


@needs_root
@pytest.mark.parametrize(
    ("below", "why"),
    [
        (b"7", "an incomplete store: cowfs/layers/7 is missing"),
        (b"2", "damaged: cowfs/layers/2 is below itself"),
    ],
)
def test_a_store_without_a_layer_of_a_checkpoint(tmp_path: Path, below: bytes, why: str) -> None:
    """Only the checkpoint that nothing else is above needs it, so the store can be used otherwise."""
    old, store = tmp_path / "old", tmp_path / "store"
    old.mkdir()
    with mounted(old, tmp_path / "mnt", store) as here:
        for name in ("one", "two"):
            (here.path / name).touch()
            cowfs("checkpoint", here.path, name, check=True)
        cowfs("rollback", here.path, "one", check=True)
    os.setxattr(store / "cowfs/layers/2", "trusted.overlay.cowfs.below", below)
    done = cowfs("rebase", store, "--onto", old)
    assert done.returncode == 32
    assert why in done.stderr
    assert len(done.stderr.splitlines()) == 1


@needs_root
def test_a_store_that_is_said_to_be_above_a_layer(tmp_path: Path) -> None:
    """Its header knows nothing of checkpoints; who made it has only set the attribute."""
    old, store = tmp_path / "old", tmp_path / "store"
    old.mkdir()
    with mounted(old, tmp_path / "mnt", store) as here:
        (here.path / "file").touch()
    os.setxattr(store / "upper", "trusted.overlay.cowfs.below", b"7")
    done = cowfs("rebase", store, "--onto", old)
    assert done.returncode == 32
    assert "an incomplete store: cowfs/layers/7 is missing" in done.stderr, done.stderr


@needs_root
def test_what_is_refused(tmp_path: Path) -> None:
    script(OLD, tmp_path)
    old, new, store = tmp_path / "old", tmp_path / "new", tmp_path / "store.bs"
    cowfs("create", store, "16", check=True)
    assert "give it with --from" in cowfs("rebase", store, "--onto", new).stderr
    with mounted(old, tmp_path / "mnt", store):
        script("echo 1 >etc/a", tmp_path / "mnt")
        for what in (store, tmp_path / "mnt"):
            refused = cowfs("rebase", what, "--onto", new)
            assert refused.returncode == 32
            assert "is mounted" in refused.stderr
    run(*COWFS, "revert", store, "etc/a")
    with unchanged(store):
        refused = cowfs("rebase", store, "--onto", new)
    assert (refused.returncode, "files that `cowfs revert` removed" in refused.stderr) == (32, True)
    run(*COWFS, "vacuum", store, "--trash")
    (tmp_path / "file").touch()
    with unchanged(store):
        for wrong in (tmp_path / "none", store):
            assert cowfs("rebase", store, "--onto", wrong).returncode == 32
        refused = cowfs("rebase", store, "--from", new, "--onto", old)
        assert (refused.returncode, "belongs to" in refused.stderr) == (32, True)
        for place, code in ((old, 1), (tmp_path / "file/x", 2)):
            assert cowfs("rebase", store, "--onto", new, "--conflicts", place).returncode == code
    aufs = tmp_path / "aufs.bs"
    shutil.copy(store, aufs)
    cowfs("convert", aufs, "--to", "aufs", check=True)
    with unchanged(aufs):
        refused = cowfs("rebase", aufs, "--onto", new)
    assert (refused.returncode, f"cowfs convert {aufs} --to overlayfs" in refused.stderr) == (32, True)
    with mounted(old, tmp_path / "mnt", tmp_path / "store"):
        script("echo 1 >etc/a", tmp_path / "mnt")
    for place in (tmp_path / "store", tmp_path):
        refused = cowfs("rebase", tmp_path / "store", "--onto", place)
        assert (refused.returncode, "the store is inside the lower" in refused.stderr) == (32, True)
    assert cowfs("rebase", old, "--onto", new).returncode == 32
    assert not (old / "upper").exists()
    assert cowfs("rebase", store, "--onto", new, "--conflicts", tmp_path / "look").returncode == 0
    assert not (tmp_path / "look").exists()  # there are no conflicts
    assert cowfs("info", store).stdout.count(f"{new} ") == 1


@needs_root
def test_checkpoints_come_along(tmp_path: Path) -> None:
    script(OLD, tmp_path)
    old, new, store, mnt = (tmp_path / name for name in ("old", "new", "store.bs", "mnt"))
    cowfs("create", store, "16", check=True)
    with mounted(old, mnt, store):
        script("echo my-a >etc/a; echo early >etc/mine; mv opt/tool opt/tool2", mnt)
        run(*COWFS, "checkpoint", mnt, "early")
        script("echo late >etc/mine; echo my-b >etc/b; rm opt/tool2/one", mnt)
    done = cowfs("rebase", store, "--onto", new, "--json", "--conflicts", tmp_path / "look")
    assert done.returncode == CONFLICTS
    told = {(one["checkpoint"], one["path"], one["why"]) for one in json.loads(done.stdout)["told"]}
    assert told == {("early", "etc/a", "changed in both"), (None, "etc/b", "changed in both")}
    found = run("sh", "-c", f"cd {tmp_path / 'look'}; find . -type f | xargs grep .").stdout.splitlines()
    assert sorted(found) == [
        *("./changed/etc/b:my-b", "./checkpoints/early/changed/etc/a:my-a"),
        *("./checkpoints/early/new/etc/a:new-a", "./checkpoints/early/old/etc/a:a"),
        *("./new/etc/b:new-b", "./old/etc/b:b"),
    ]
    since = cowfs("diff", store, "--since", "early").stdout.split("\n")
    assert [line.split()[:2] for line in since if line] == [
        *(["M", "etc/b"], ["M", "etc/mine"], ["D", "opt/tool2/one"]),
    ]
    with mounted(new, mnt, store):
        run(*COWFS, "rollback", mnt, "early")
        files = run("sh", "-c", f"cd {mnt}; grep . etc/a etc/b etc/mine opt/tool2/*").stdout.splitlines()
    assert files == [
        *("etc/a:my-a", "etc/b:new-b", "etc/mine:early", "opt/tool2/one:one", "opt/tool2/two:two"),
    ]
