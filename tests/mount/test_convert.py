"""``cowfs convert``: a store of aufs becomes one of overlayfs, and the other way round, in place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cowfs.converting import convert
from cowfs.errors import StoreError
from cowfs.offline_changes import Lowers
from tests.mount.test_aufs_store import branch, change, lower, raw, without_times
from tests.support.mounts import cowfs, kernel_overlay, mounted, unchanged
from tests.support.system import as_nobody_prefix, needs_fuse, needs_root, run
from tests.support.tree import Snapshot, snapshot

__all__ = ["lower"]
pytestmark = [needs_fuse, needs_root]
DEV_FUSE_AT_NIGHT = True


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """One of aufs, with names that are those of the parts of a store, too."""
    top = branch(tmp_path / "branch")
    for name in ("upper", "work", "cowfs/upper"):
        (top / name).mkdir(parents=True)
        (top / name / "file").write_text(name)
    os.setxattr(top / "upper", "user.kept", b"x")
    os.mknod(top / "work/null", 0o020666, 0)
    path = tmp_path / "sysrcd.bs"
    run("mke2fs", "-q", "-t", "ext3", "-d", top, path, "16M")
    return path


def seen(lower: Path, store: Path, at: Path, *options: str) -> Snapshot:
    with mounted(lower, at, store, options=options) as mount:
        return comparable(snapshot(mount.path))


def modified(lower: Path, store: Path, at: Path) -> dict[str, int]:
    """When the directories of a merged tree were modified last."""
    with mounted(lower, at, store) as mount:
        return {
            os.path.relpath(path, mount.path): os.stat(path).st_mtime_ns for path, *_ in os.walk(mount.path)
        }


def comparable(tree: Snapshot) -> Snapshot:
    """Return what a conversion keeps of a tree; inode numbers may change."""
    kept = without_times(tree)
    return {
        path: {key: value for key, value in facts.items() if key not in {"ino", "d_ino"}}
        for path, facts in kept.items()
    }


def converted(store: Path, to: str, *more: str | Path) -> dict[str, Any]:
    done = cowfs("convert", store, "--to", to, "--json", *more, check=True)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_there_and_back(store: Path, lower: Path, tmp_path: Path) -> None:
    with mounted(lower, tmp_path / "m", store) as mount:
        change(mount.path)
        (mount.path / "kept").touch()
        run("chattr", "+i", mount.path / "kept")
    first = seen(lower, store, tmp_path / "m")
    told = converted(store, "overlayfs")
    assert (told["format"], told["continued"]) == ("overlayfs", False)
    assert (told["whiteouts"], told["copied_from_the_lower"]) == (3, 0)
    assert told["opaque_directories"] >= 2
    assert json.loads(cowfs("info", store, "--json", check=True).stdout)["format"] == "overlayfs"
    assert raw(store, "/") == {"upper", "work", "cowfs"}
    assert cowfs("check", store, check=True).stdout.endswith(": clean\n")
    assert seen(lower, store, tmp_path / "m") == first
    (tmp_path / "s").mkdir()
    run("mount", "-o", "loop", store, tmp_path / "s")
    try:
        with kernel_overlay([str(lower)], tmp_path / "s", tmp_path / "k") as merged:
            names = {path for path in first if path != "work/null"}  # to it, a whiteout's stand-in is a file
            assert set(snapshot(merged)) - {"work/null"} == names
    finally:
        run("umount", tmp_path / "s")
    told = converted(store, "aufs")
    assert told["whiteouts"] == 3
    assert raw(store, "/usr") == {"a", "hard", ".wh.b", ".wh.c", "moved"}
    assert raw(store, "/") >= {
        ".wh..wh.aufs",
        ".wh..wh.plnk",
        ".wh..wh.orph",
        ".wh..wh.cowfs",
        "upper",
        "work",
    }
    assert raw(store, "/.wh..wh.cowfs") == {"work", "cowfs"}
    assert cowfs("check", store, check=True).stdout.endswith(": clean\n")
    assert seen(lower, store, tmp_path / "m") == first
    with mounted(lower, tmp_path / "m", store) as mount:
        with pytest.raises(PermissionError):
            (mount.path / "kept").unlink()
        run("chattr", "-i", mount.path / "kept")
        (mount.path / "kept").unlink()
    with unchanged(store):
        refused = cowfs("convert", store, "--to", "aufs")
    assert refused.returncode and "has the aufs format already" in refused.stderr


def test_what_only_the_lower_has_comes_along(lower: Path, tmp_path: Path) -> None:
    """Redirects, metacopies and the index are written out."""
    big = os.urandom(200_000)
    (lower / "usr/big").write_bytes(big)
    (lower / "dir/kept").write_text("kept\n")
    (lower / "dir/below/second").write_text("second\n")
    os.link(lower / "dir/kept", lower / "dir/below/linked")
    os.link(lower / "usr/b", lower / "dir/far")
    os.mkfifo(lower / "dir/fifo")
    os.link(lower / "dir/fifo", lower / "dir/below/fifo")
    store = tmp_path / "o.bs"
    cowfs("create", store, "16", check=True)
    with mounted(lower, tmp_path / "m", store) as mount:
        top = mount.path
        (top / "dir").rename(top / "renamed")
        (top / "renamed/below/file").unlink()
        (top / "usr/big").chmod(0o600)
        (top / "usr/a").write_text("one inode\n")
        (top / "usr/b").write_text("one more\n")
        (top / "etc/motd").unlink()
        os.mknod(top / "device", 0o020600, 0)
    first = seen(lower, store, tmp_path / "m")
    told = converted(store, "aufs")
    assert told["copied_from_the_lower"] == 2
    assert told["devices_00"] == 1
    assert raw(store, "/renamed") == {"below", "kept", "far", "fifo", ".wh..wh..opq"}
    assert raw(store, "/renamed/below") == {"second", "linked", "fifo"}
    assert raw(store, "/usr") == {"big", "a", "hard", "b"}
    assert raw(store, "/etc") == {".wh.motd"}
    told_of = run("debugfs", "-R", "stat /device", store).stdout
    assert "character special" in told_of
    del first["device"]
    again = seen(lower, store, tmp_path / "m")
    again.pop("device", None)
    assert again == first


@pytest.mark.timeout(900)
@pytest.mark.nightly
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize(("to", "kills"), [("overlayfs", 2), ("aufs", 2), ("overlayfs", 30), ("aufs", 30)])
def test_killed_anywhere(store: Path, lower: Path, tmp_path: Path, to: str, kills: int, by: int) -> None:
    """At each of its changes: until it is completed nobody mounts the store, and then nothing is missing."""
    with mounted(lower, tmp_path / "m", store) as mount:
        change(mount.path)
    if to == "aufs":
        converted(store, "overlayfs")
    first, times = seen(lower, store, tmp_path / "m"), modified(lower, store, tmp_path / "m")
    before = tmp_path / "before"
    run("cp", "--sparse=always", store, before)
    whole = calls(store, to, -1)
    assert whole > 60
    ended = set()
    for number in range(whole // (kills + 1), whole, max(whole // (kills + 1), 1)):
        run("cp", "--sparse=always", before, store)
        calls(store, to, number, by)
        now = json.loads(cowfs("info", store, "--json", check=True).stdout)["format"]
        ended.add(now)
        if now == "converting":
            refused = cowfs("mount", lower, tmp_path / "m", "--store", store)
            assert refused.returncode and f"conversion to the {to} format was interrupted" in refused.stderr
            assert cowfs("check", "-n", store).returncode == 4
            other = "aufs" if to == "overlayfs" else "overlayfs"
            with unchanged(store):
                refused = cowfs("convert", store, "--to", other)
            assert refused.returncode and f"--to {to} completes it" in refused.stderr
        if now != to:
            assert converted(store, to)["continued"] is (now == "converting")
        assert cowfs("check", "-n", store, check=True).stdout.endswith(": clean\n")
        if kills < 3 or number % 3 == 1:
            assert modified(lower, store, tmp_path / "m") == times
            assert seen(lower, store, tmp_path / "m") == first
    assert "converting" in ended


def test_a_copy_whose_conversion_is_killed_at_its_end_is_used(
    store: Path, lower: Path, tmp_path: Path
) -> None:
    """Unless the image knows its file, its unreplayed journal makes it a copy of a store in use."""
    with mounted(lower, tmp_path / "m", store) as mount:
        change(mount.path)
    first = seen(lower, store, tmp_path / "m")
    copy = tmp_path / "copy.bs"
    run("cp", store, copy)
    ends = calls(copy, "overlayfs", -1)
    run("cp", "--remove-destination", store, tmp_path / "another.bs")
    (tmp_path / "another.bs").replace(copy)
    calls(copy, "overlayfs", ends)
    if json.loads(cowfs("info", copy, "--json", check=True).stdout)["format"] == "converting":
        converted(copy, "overlayfs")
    assert seen(lower, copy, tmp_path / "m") == first


_COUNTING = """
import os, signal, sys
from cowfs.layers.ext3 import Ext3Layer
from cowfs.cli.main import main
left = int(sys.argv[1])
seen = 0
def counted(method):
    def call(*arguments, **more):
        global seen
        seen += 1
        if seen == left:
            os.kill(os.getpid(), int(os.environ["BY"]))
        return method(*arguments, **more)
    return call
names = "create mkdir mknod link unlink rmdir rename setxattr removexattr utimens"
for name in names.split():
    setattr(Ext3Layer, name, counted(getattr(Ext3Layer, name)))
code = main(sys.argv[2:])
print(seen)
sys.exit(code)
"""


def calls(store: Path, to: str, number: int, by: int = signal.SIGKILL) -> int:
    """Convert, killed at a change of this number; return how many there were, if it was not."""
    words = ["convert", str(store), "--to", to]
    done = subprocess.run(
        [sys.executable, "-c", _COUNTING, str(number), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "BY": str(int(by))},
    )
    if number > 0:
        assert done.returncode == (-by if by == signal.SIGKILL else 130), done.stderr
        return number
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def test_refused_and_unchanged(lower: Path, tmp_path: Path) -> None:
    store = tmp_path / "o.bs"
    cowfs("create", store, "16", check=True)
    with mounted(lower, tmp_path / "m", store) as mount:
        (mount.path / "etc/.wh.name").touch()
        (mount.path / ("n" * 250)).touch()
        refused = cowfs("convert", store, "--to", "aufs")
        assert refused.returncode and "is mounted" in refused.stderr
    before = raw(store, "/upper")
    with unchanged(store):
        refused = cowfs("convert", store, "--to", "aufs")
    assert refused.returncode and "and 1 more" in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert raw(store, "/upper") == before
    with mounted(lower, tmp_path / "m", store) as mount:
        (mount.path / "etc/.wh.name").unlink()
        (mount.path / ("n" * 250)).unlink()
        (mount.path / "usr/a").write_text("x")
        cowfs("revert", mount.path / "usr", check=True)
    with unchanged(store):
        refused = cowfs("convert", store, "--to", "aufs")
        again = cowfs("convert", store, "--to", "overlayfs")
        none = cowfs("convert", store, "--to", "aufs", "--lower", tmp_path / "none")
    assert again.returncode and "has the overlayfs format already" in again.stderr
    assert none.returncode
    assert refused.returncode and "vacuum" in refused.stderr and "--trash" in refused.stderr
    with mounted(lower, tmp_path / "m", store) as mount:
        cowfs("checkpoint", mount.path, "one", check=True)
    with unchanged(store):
        refused = cowfs("convert", store, "--to", "aufs")
        for asked in (["rollback"], ["checkpoint", "--delete"]):
            none = cowfs(*asked, store, "two")
            assert none.returncode and "no such checkpoint" in none.stderr
    assert refused.returncode and "checkpoints" in refused.stderr
    refused = cowfs("convert", store, "--to", "ext4")
    assert refused.returncode == 1


@pytest.mark.nightly
def test_a_directory(lower: Path, tmp_path: Path) -> None:
    store = branch(tmp_path / "branch")
    with mounted(lower, tmp_path / "m", store) as mount:
        change(mount.path)
    first = seen(lower, store, tmp_path / "m")
    for to in ("overlayfs", "aufs"):
        converted(store, to)
        assert seen(lower, store, tmp_path / "m") == first


def test_what_nobody_sees_does_not_come_along(lower: Path, tmp_path: Path) -> None:
    """Remains of a crash of aufs, whiteouts in opaque directories, and the time of the root are dropped."""
    top = branch(tmp_path / "branch")
    names = ".wh..wh.half.1a2b/x", "etc/new/.wh..wh.half.1a2b/x", "etc/conf/a", "etc/.wh.tree/x"
    for name in names:
        (top / name).mkdir(parents=True)
    for name in ("etc/new/.wh..", "etc/new/.wh...", "etc/new/.wh.", ".wh.lost+found", "etc/conf/.wh.a"):
        os.link(top / ".wh..wh.aufs", top / name)
    os.setxattr(top / "etc/new", "user.cowfs.mine", b"x")
    store = tmp_path / "sysrcd.bs"
    run("mke2fs", "-q", "-t", "ext3", "-d", top, store, "16M")
    run("debugfs", "-w", "-R", "set_inode_field / mtime @1000000000", store)
    run("cp", store, tmp_path / "copy.bs")
    first = seen(lower, tmp_path / "copy.bs", tmp_path / "m")
    with mounted(lower, tmp_path / "m", tmp_path / "copy.bs") as mount:  # a whiteout can be a directory
        (mount.path / "etc/tree").mkdir()
    converted(store, "overlayfs")
    after = seen(lower, store, tmp_path / "m")
    for path in ("etc/new", "etc/conf", "etc"):  # what nobody sees was counted
        assert first[path].pop("nlink") - after[path].pop("nlink") == 1
    assert after == first
    assert first["."]["mtime"] == 10**18
    assert cowfs("check", store, check=True).stdout.endswith(": clean\n")
    assert raw(store, "/") == {"upper", "work", "cowfs"}
    assert (raw(store, "/upper/etc/new"), raw(store, "/upper/etc/conf")) == (set(), {"mine"})


def test_a_users_directory(nobody_path: Path) -> None:
    """Whom things belong to, and what stands for devices, is noted there; what aufs wrote hides the same."""
    prefix = as_nobody_prefix()
    lower, store, mnt = (nobody_path / name for name in ("lower", "store", "mnt"))
    run(
        *prefix,
        "sh",
        "-ec",
        f"cd {nobody_path}; mkdir -p lower/gone lower/anew store/gone; echo a >lower/a; touch lower/gone/x"
        " lower/anew/y; touch store/.wh..wh.aufs store/gone/.wh..wh..opq",
    )
    change = "rm -r anew; mkdir anew; setfattr -n user.a -v b anew; "
    change += "echo n >new; chown 5:6 new; mkdir d; chown 7:8 d; ln -s new link; chown -h 9:9 link; rm a"
    facts = "find . -printf '%p %y %U:%G %m %l\\n' | sort"
    with mounted(lower, mnt, store, options=["fakeroot"], nobody=True):
        run(*prefix, "sh", "-ec", f"cd {mnt}; {change}")
        first = run(*prefix, "sh", "-ec", f"cd {mnt}; {facts}").stdout
        look = f"cd {mnt}; find . -name [xy]; getfattr -m - anew new"
        assert run(*prefix, "sh", "-ec", look).stdout == "# file: anew\nuser.a\n\n"
    assert (store / "anew/.wh..wh..opq").exists()
    for to in ("overlayfs", "aufs"):
        done = cowfs("convert", store, "--to", to, nobody=True)
        assert (done.returncode, f"converted to the {to} format" in done.stderr) == (0, True)
        with mounted(lower, mnt, store, options=["fakeroot"], nobody=True):
            assert run(*prefix, "sh", "-ec", f"cd {mnt}; {facts}").stdout == first


def test_data_that_only_the_lowers_have_is_never_given_up(
    lower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor if another mount has changed a file's mode since what it needs of the lowers was copied."""
    store = tmp_path / "o.bs"
    cowfs("create", store, "16", check=True)
    (lower / "usr/b").write_bytes(bytes(200_000))
    with mounted(lower, tmp_path / "m", store) as mount:
        (mount.path / "usr/b").chmod(0o600)
    monkeypatch.setattr("cowfs.converting.flatten", lambda *_: 0)
    with pytest.raises(StoreError, match="was changed meanwhile"):
        convert(str(store), "aufs", Lowers([str(lower)]), tell=lambda _: None)
    assert json.loads(cowfs("info", store, "--json", check=True).stdout)["format"] == "overlayfs"
