"""Stores of aufs, as SystemRescueCd 1 to 5 wrote them: mounted, read and written in their own format."""

from __future__ import annotations

import errno
import json
import os
import stat
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cowfs.layers.directory import open_directory
from cowfs.overlay.aufs import AufsStore
from tests.support.mounts import Mounted, cowfs, eventually, mounted
from tests.support.system import needs_fuse, needs_root, run
from tests.support.tree import Snapshot, snapshot

pytestmark = [needs_fuse, needs_root]
DEV_FUSE_AT_NIGHT = True


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    top = tmp_path / "lower"
    for name in (
        "etc/conf/a",
        "etc/conf/b",
        "etc/motd",
        "usr/a",
        "usr/b",
        "usr/c",
        "gone/x",
        "dir/below/file",
    ):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(f"lower {name}\n")
    os.link(top / "usr/a", top / "usr/hard")
    return top


def branch(top: Path) -> Path:
    """Make a branch as aufs writes it: its whiteouts are hard links of one file."""
    for name in (".wh..wh.plnk", ".wh..wh.orph", "etc/conf", "etc/new"):
        (top / name).mkdir(parents=True)
    base = top / ".wh..wh.aufs"
    base.touch(0o444)
    for name in ("etc/.wh.motd", ".wh.gone", "etc/conf/.wh..wh..opq"):
        os.link(base, top / name)
    (top / "etc/conf/mine").write_text("mine\n")
    (top / ".wh..wh.plnk/12.13").write_text("left by a crash\n")
    return top


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "sysrcd.bs"
    run("mke2fs", "-q", "-t", "ext3", "-d", branch(tmp_path / "branch"), path, "16M")
    return path


def paths(top: Path) -> set[str]:
    return {str(path.relative_to(top)) for path in top.rglob("*")}


AS_AUFS_SHOWS_IT = {
    "dir", "dir/below", "dir/below/file", "etc", "etc/conf", "etc/conf/mine", "etc/new",
    "usr", "usr/a", "usr/b", "usr/c", "usr/hard",
}  # fmt: skip


def change(top: Path) -> None:
    """Change the tree as users do."""
    (top / "usr/a").write_text("changed\n")
    (top / "usr/b").unlink()
    (top / "usr/c").rename(top / "usr/moved")
    run("rm", "-r", top / "etc/conf", top / "dir/below")
    (top / "gone").mkdir()
    (top / "etc/motd").write_text("new\n")
    (top / "tree/deep").mkdir(parents=True)
    (top / "tree").rename(top / "tree2")
    (top / "tree2/link").symlink_to("nowhere")
    os.mkfifo(top / "tree2/deep/fifo")
    os.setxattr(top / "etc/motd", "user.kept", b"x")
    (top / "dir/below").write_text("a file over a deleted directory\n")


def raw(store: Path, directory: str) -> set[str]:
    """The names that the image has in a directory, as debugfs(8) says."""
    told = run("debugfs", "-R", f"ls -p {directory}", store).stdout
    return {line.split("/")[5] for line in told.splitlines() if line.startswith("/")} - {
        ".",
        "..",
        "lost+found",
    }


def test_read_and_written(store: Path, lower: Path, tmp_path: Path) -> None:
    told = json.loads(cowfs("info", store, "--json", check=True).stdout)
    assert (told["format"], told["version"]) == ("aufs", None)
    with mounted(lower, tmp_path / "m", store) as mount:
        assert paths(mount.path) == AS_AUFS_SHOWS_IT
        assert mount.path.stat().st_nlink == 2 + 3, "aufs's own directories do not count"
        assert "D  gone/" in cowfs("diff", mount.path, check=True).stdout
        change(mount.path)
        must_be_refused(mount)
        before = snapshot(mount.path)
        assert os.path.samefile(mount.path / "usr/a", mount.path / "usr/hard")
        live = cowfs("diff", mount.path, check=True).stdout
        said = cowfs("explain", mount.path / "usr/b").stdout
        assert "whiteout" in said and "deleted" in said
        assert "changed" in cowfs("du", mount.path, check=True).stdout
    assert cowfs("diff", store, check=True).stdout == live
    assert cowfs("check", store, check=True).stdout.endswith(": clean\n")
    as_written(store)
    with mounted(lower, tmp_path / "m", store) as mount:
        assert without_times(snapshot(mount.path)) == without_times(before)
    with mounted(lower, tmp_path / "m", store, engine="kernel") as mount:
        assert without_times(snapshot(mount.path)) == without_times(before)
        (mount.path / "usr/a").unlink()
        (mount.path / "usr/a").mkdir()
    assert raw(store, "/usr/a") == {".wh..wh..opq"}
    copies(store, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    refused = cowfs("mount", other, tmp_path / "m", "--store", store)
    assert refused.returncode and "belongs to" in refused.stderr


def copies(store: Path, place: Path) -> None:
    """The store can be copied, grown and shrunk like any other; it has one root."""
    copy = place / "copy.bs"
    cowfs("backup", store, copy, check=True)
    cowfs("grow", copy, "24", check=True)
    cowfs("shrink", copy, "16", check=True)
    assert cowfs("diff", copy, check=True).stdout == cowfs("diff", store, check=True).stdout
    refused = cowfs("rebase", copy, "--onto", place)
    assert refused.returncode and "aufs format, which cannot be rebased" in refused.stderr


def must_be_refused(mount: Mounted) -> None:
    """Check that the mount refuses what the aufs format cannot express."""
    top = mount.path
    for call, code in (
        ((top / ".wh.name").touch, errno.EPERM),
        (lambda: (top / "etc/new").rename(top / "etc/.wh.new"), errno.EPERM),
        (lambda: (top / "usr").rename(top / "usr2"), errno.EXDEV),
        ((top / ("n" * 243)).touch, errno.ENAMETOOLONG),
        (lambda: os.listxattr(top / ".wh..wh.aufs"), errno.ENOENT),
    ):
        with pytest.raises(OSError) as failure:
            call()
        assert failure.value.errno == code
    (top / ("n" * 242)).touch()
    (top / ("n" * 242)).unlink()
    assert os.statvfs(top).f_namemax == 242
    refused = cowfs("checkpoint", top, "now")
    assert refused.returncode and "aufs format, which has no checkpoints" in refused.stderr


def as_written(store: Path) -> None:
    """The image is what aufs itself would have left."""
    ours = {".wh..wh.aufs", ".wh..wh.plnk", ".wh..wh.orph", ".wh..wh.cowfs"}
    assert raw(store, "/") == {*ours, "etc", "usr", "gone", "tree2", "dir"}
    assert raw(store, "/.wh..wh.plnk") == set(), "what aufs keeps while it is mounted"
    assert raw(store, "/usr") == {"a", "hard", ".wh.b", ".wh.c", "moved"}, "hard links stay hard links"
    assert raw(store, "/etc") == {".wh.conf", "motd", "new"}
    assert raw(store, "/gone") == {".wh..wh..opq"}
    assert raw(store, "/dir") == {"below"}, "what was deleted to make room is hidden by what stands there"
    assert raw(store, "/tree2") == {"deep", "link", ".wh..wh..opq"}
    numbers = {
        run("debugfs", "-R", f"stat {name}", store).stdout.split("Type")[0]
        for name in ("/.wh..wh.aufs", "/usr/.wh.b", "/gone/.wh..wh..opq")
    }
    assert len(numbers) == 1, "one inode for all"


def without_times(seen: Snapshot) -> Snapshot:
    """Reading changes some, and a directory's size is the filesystem's business."""
    left_out = {"atime", "ctime", "blocks", "dev"}
    return {
        path: {
            key: value
            for key, value in facts.items()
            if key not in left_out and not (key == "size" and facts["type"] == "dir")
        }
        for path, facts in seen.items()
    }


def test_a_directory(lower: Path, tmp_path: Path) -> None:
    """A branch may be a directory, too, and what is taken back comes back."""
    store = branch(tmp_path / "branch")
    with mounted(lower, tmp_path / "m", store) as mount:
        assert "MOVED" not in cowfs("info", mount.path, check=True).stdout
        before = snapshot(mount.path)
        change(mount.path)
        changed = snapshot(mount.path)
        cowfs("revert", mount.path / "usr", check=True)
        assert paths(mount.path / "usr") == {"a", "b", "c", "hard"}
        cowfs("revert", mount.path, "--undo", check=True)
        assert without_times(snapshot(mount.path)).keys() == changed.keys()
        run("sh", "-c", f"cd {mount.path} && rm -r tree2 gone && mkdir -p etc/conf && touch etc/conf/mine")
        assert paths(mount.path / "etc") == {"conf", "conf/mine", "motd", "new"}
    assert (store / "etc/conf/.wh..wh..opq").exists() and (store / ".wh.gone").exists()
    assert stat.S_IMODE((store / ".wh.gone").stat().st_mode) == 0o444
    assert before


def test_killed(store: Path, lower: Path, tmp_path: Path) -> None:
    """After a kill, acknowledged changes and hard links are there, in the same format."""
    with mounted(lower, tmp_path / "m", store) as mount:
        change(mount.path)
        before = snapshot(mount.path)
        pid = mount.pid()
        os.kill(pid, 9)
        run("umount", "-l", mount.path)
    eventually(lambda: not os.path.exists(f"/proc/{pid}"), "the daemon is gone")
    with mounted(lower, tmp_path / "m", store) as mount:
        assert without_times(snapshot(mount.path)) == without_times(before)
    as_written(store)


def test_a_deletion_cut_short(store: Path, lower: Path, tmp_path: Path) -> None:
    """A whiteout beats the name beside it: aufs makes it first, and removes it last."""
    for request in (
        "mkdir /usr",
        "mkdir /usr/b",
        "write /dev/null /usr/b/inside",
        "write /dev/null /usr/.wh.b",
    ):
        run("debugfs", "-w", "-R", request, store)
    with mounted(lower, tmp_path / "m", store) as mount:
        assert paths(mount.path / "usr") == {"a", "c", "hard"}
        (mount.path / "usr/b").write_text("new\n")
        assert (mount.path / "usr/b").read_text() == "new\n"
    assert raw(store, "/usr") == {"b"}


def test_a_store_of_both_is_refused(store: Path, lower: Path, tmp_path: Path) -> None:
    cowfs("create", tmp_path / "o.bs", "16", check=True)
    with mounted(lower, tmp_path / "m", tmp_path / "o.bs"):
        pass
    run("debugfs", "-w", "-R", "mkdir .wh..wh.aufs", tmp_path / "o.bs")
    refused = cowfs("mount", lower, tmp_path / "m", "--store", tmp_path / "o.bs")
    assert refused.returncode and "a store of overlayfs, and aufs has written to it, too" in refused.stderr
    assert json.loads(cowfs("info", tmp_path / "o.bs", "--json", check=True).stdout)["format"] == "mixed"
    refused = cowfs("mount", lower, tmp_path / "m", "--store", store, "-o", "subdir=x")
    assert refused.returncode and "it cannot contain other stores" in refused.stderr


def test_names_that_no_whiteout_can_hide(store: Path, lower: Path, tmp_path: Path) -> None:
    """A lower may have names that aufs keeps to itself: they can be read, and neither changed nor deleted."""
    for name in (".wh.x", "etc/.wh..opq", "lost+found/file"):
        (lower / name).parent.mkdir(exist_ok=True)
        (lower / name).write_text("kept\n")
    with mounted(lower, tmp_path / "m", store) as mount:
        top = mount.path
        for call in (
            (top / ".wh.x").unlink,
            (top / "etc/.wh..opq").unlink,
            (top / "lost+found/file").unlink,
            (top / "lost+found/new").touch,
            lambda: (top / ".wh.x").write_text("other"),
        ):
            with pytest.raises(PermissionError):
                call()
        for name in (".wh.x", "etc/.wh..opq", "lost+found/file"):
            assert (top / name).read_text() == "kept\n"
        assert paths(top / "etc") == {".wh..opq", "conf", "conf/mine", "new"}
        assert os.listdir(top / "lost+found") == ["file"]


def test_what_aufs_left_however_deep(lower: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Deleted while it was open, or cut short: it goes, and a directory with nothing else in it can go."""
    store = branch(tmp_path / "branch")
    at, depth = store / ".wh..wh.orph/1", 1200
    at.mkdir()
    request.addfinalizer(partial(run, "rm", "-rf", at))  # else pytest cannot remove it
    fd = os.open(at, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=fd)
        fd, above = os.open("d", os.O_RDONLY, dir_fd=fd), fd
        os.close(above)
    os.close(fd)
    (store / "etc/new/.wh..wh.half.1a2b/x").mkdir(parents=True)
    (store / "etc/new/.wh..").touch()
    os.utime(store, ns=(10**18, 10**18))
    with mounted(lower, tmp_path / "m", store) as mount:
        assert not os.listdir(store / ".wh..wh.orph")
        assert mount.path.stat().st_mtime_ns == 10**18, "what is made in the branch is not for users"
        assert os.listdir(mount.path / "etc/new") == []
        (mount.path / "etc/new").rmdir()
        assert paths(mount.path / "etc") == {"conf", "conf/mine"}


def test_a_conversion_that_none_of_ours_began(lower: Path, tmp_path: Path) -> None:
    """Digits that are none of ASCII's are no phase, and no reason for a traceback."""
    store = branch(tmp_path / "branch")
    (store / ".wh..wh.cowfs/converting-aufs-²").mkdir(parents=True)
    (tmp_path / "m").mkdir()
    refused = cowfs("mount", lower, tmp_path / "m", "--store", store)
    assert refused.returncode == 32 and len(refused.stderr.splitlines()) == 1
    assert "conversion to the aufs format was interrupted" in refused.stderr


def test_whiteouts_when_no_inode_takes_more_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then they are names of another: each as an inode of its own would be an image without inodes soon."""
    with closing(open_directory(str(branch(tmp_path / "branch")))) as inner:
        layer, link = AufsStore(inner), inner.link

        def at_most_five(key: Any, directory: Any, name: bytes) -> None:
            if inner.stat(key).st_nlink >= 5:
                raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))
            link(key, directory, name)

        monkeypatch.setattr(inner, "link", at_most_five)
        names = [b"n%d" % number for number in range(30)]
        for name in names:
            layer.mknod(layer.branch, name, stat.S_IFCHR, 0, 0, 0)
        layer.unlink(layer.branch, names.pop(), None)  # of which others would be links
        layer.mknod(layer.branch, b"more", stat.S_IFCHR, 0, 0, 0)
        assert set(names) | {b"more"} <= {entry.name for entry in layer.readdir(layer.branch)}
    inodes = {path.stat().st_ino for path in (tmp_path / "branch").glob(".wh.[nm]*")}
    assert len(inodes) <= 10
