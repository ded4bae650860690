"""``cowfs overlay``: the command line of fuse-overlayfs, with an upper and a work dir anywhere."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.mounts import COWFS, cowfs, eventually, is_mounted, project_root
from tests.support.system import needs_fuse, needs_root, run

pytestmark = [needs_fuse, needs_root]
DEV_FUSE_AT_NIGHT = True


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two lowers, an upper behind a symbolic link, a work dir elsewhere, and a place to mount."""
    for name in ("low/d", "l:2,", "deep/up", "work/w,k", "mnt"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "UP").symlink_to("deep/up")
    (tmp_path / "low/a").write_text("a\n")
    (tmp_path / "low/d/x").write_text("x\n")
    (tmp_path / "l:2,/b").write_text("b" * 100_000)
    (tmp_path / "low/.wh.hidden").touch()  # as fuse-overlayfs writes it where it may make no devices
    (tmp_path / "l:2,/hidden").touch()
    os.chown(tmp_path / "low/a", 5, 6)
    os.chown(tmp_path / "low/d/x", 5000, 6000)
    return tmp_path


@contextmanager
def overlay(place: Path, *options: str, upper: bool = True) -> Iterator[Path]:
    """Mount as podman does: relative paths, one ``-o``; unmounted as it does, by umount(8)."""
    words = [r"lowerdir=low:l\:2\,"]
    if upper:
        words += ["upperdir=UP", r"workdir=work/w\,k"]
    done = cowfs("-o", ",".join([*words, *options]), "mnt", cwd=str(place))
    assert done.returncode == 0, done.stderr
    try:
        yield place / "mnt"
    finally:
        run("umount", place / "mnt")
        eventually(lambda: not held(place), "the daemon lets go of the store")


def held(place: Path) -> bool:
    """Whether somebody has the lock of the store."""
    lock = place / "work/w,k/cowfs/lock"
    if not lock.exists():
        return False
    return subprocess.run(["flock", "-n", lock, "true"], check=False).returncode != 0


def owners(*paths: Path) -> list[tuple[int, int]]:
    return [(info.st_uid, info.st_gid) for info in map(os.lstat, paths)]


def test_two_directories_and_maps(place: Path) -> None:
    with overlay(place, "uidmapping=0:1000:100", "gidmapping=0:2000:100") as top:
        assert owners(top / "a", top / "d/x") == [(1005, 2006), (65534, 65534)]
        assert {p.name for p in top.iterdir()} == {"a", "b", "d"}
        (top / "new").touch()
        os.chown(top / "new", 1007, 2008)
        run("setfacl", "-m", "u:1003:r", top / "new")
        (top / "a").unlink()
        with pytest.raises(OSError) as refused:
            os.rename(top / "d", top / "e")
        assert refused.value.errno == errno.EXDEV
        os.chmod(top / "b", 0o600)
    up = place / "deep/up"
    assert owners(up / "new") == [(7, 8)]
    assert "user:3:r--" in run("getfacl", "-n", up / "new").stdout
    assert stat.S_ISCHR(os.lstat(up / "a").st_mode) and os.lstat(up / "a").st_rdev == 0
    assert (up / "b").read_text() == "b" * 100_000, "no metacopy: the upper means the same to all who read it"
    assert {p.name for p in up.iterdir()} == {"a", "b", "new"}

    with overlay(place, "squash_to_root") as top:
        assert owners(top / "new", top / "d/x") == [(0, 0), (0, 0)]
        assert not (top / "a").exists()
    with overlay(place, "squash_to_uid=77", "redirect_dir=on") as top:
        assert owners(top / "new", top / "d/x") == [(77, 8), (77, 6000)]
        os.rename(top / "d", top / "e")
        assert (top / "e/x").read_text() == "x\n"
        refusal = cowfs("checkpoint", top, "before")
        assert refusal.returncode != 0 and "upperdir of another program" in refusal.stderr


def test_link_counts_and_attributes_can_be_off(place: Path) -> None:
    """And what fuse-overlayfs reads as nothing: colons at the ends, an empty map."""
    os.setxattr(place / "low/a", "user.x", b"1")
    (place / "low/d/sub").mkdir()
    words = r"lowerdir=:low:,upperdir=UP,workdir=work/w\,k,uidmapping="
    cowfs("-o", f"{words},static_nlink,noxattrs=1", "mnt", cwd=str(place), check=True)
    try:
        top = place / "mnt"
        (top / "new").mkdir()
        (top / "d/y").touch()
        assert [(top / name).stat().st_nlink for name in (".", "d", "new", "a")] == [1, 1, 1, 1]
        for call in (
            lambda: os.getxattr(top / "a", "user.x"),
            lambda: os.listxattr(top / "a"),
            lambda: os.setxattr(top / "d", "user.y", b"1"),
            lambda: os.removexattr(top / "a", "user.x"),
        ):
            with pytest.raises(OSError) as refused:
                call()
            assert refused.value.errno == errno.EOPNOTSUPP
        assert run("setfacl", "-m", "u:5:r", top / "a", check=False).returncode != 0
    finally:
        cowfs("umount", place / "mnt", check=True)
    assert os.listxattr(place / "deep/up/d") != ["user.y"]
    with overlay(place, "noxattrs=0") as top:
        assert os.getxattr(top / "a", "user.x") == b"1"
        assert (top / "d").stat().st_nlink == 3


def test_mount_and_fstab_give_a_source(place: Path) -> None:
    """``mount -t fuse.cowfs-overlay none mnt`` runs it so, by mount.fuse3(8)."""
    cowfs("overlay", "none", "mnt", "-o", "rw,lowerdir=low,dev,suid", cwd=str(place), check=True)
    assert (place / "mnt/a").exists()
    run("umount", place / "mnt")


def test_without_an_upper_it_is_read_only(place: Path) -> None:
    quoted = 'context="system_u:object_r:container_file_t:s0:c1,c2"'
    with overlay(place, "ro", quoted, "nodev", "xino=off", upper=False) as top:
        assert (top / "b").exists()
        with pytest.raises(OSError) as refused:
            (top / "new").touch()
        assert refused.value.errno == errno.EROFS


def test_an_upper_with_named_whiteouts_is_read(place: Path) -> None:
    """Podman mounts an unpacked layer of an image as the upper, to list its changes."""
    up = place / "deep/up"
    (up / ".wh.a").touch()
    (up / "d").mkdir()
    (up / "d/.wh..wh..opq").touch()
    (up / "d/new").touch()
    with overlay(place) as top:
        assert sorted(str(p.relative_to(top)) for p in top.rglob("*")) == ["b", "d", "d/new"]
        with pytest.raises(OSError) as refused:
            (top / "d/newer").touch()
        assert refused.value.errno == errno.EROFS
    with overlay(place, "whiteouts=overlayfs") as top:
        assert {".wh.a", "a", "b", "hidden"} <= {p.name for p in top.iterdir()}
        (top / "d/newer").touch()
    with overlay(place) as top:
        assert {".wh.a", "a", "b"} <= {p.name for p in top.iterdir()}, "files"
        (top / "d/newest").touch()


def test_opaque_directories_of_lowers_hide_what_is_below(place: Path) -> None:
    """Those that it has written itself, and those of overlayfs and of fuse-overlayfs."""
    marks = ("trusted.overlay.opaque", "user.overlay.opaque", "user.fuseoverlayfs.opaque")
    for mark in marks:
        for lower, name in (("low", "new"), ("l:2,", "old")):
            (place / lower / mark).mkdir()
            (place / lower / mark / name).touch()
        os.setxattr(place / "low" / mark, mark, b"y")
    with overlay(place) as top:
        for mark in marks:
            assert os.listdir(top / mark) == ["new"]
            (top / mark / "more").touch()
            assert os.listxattr(top / mark) == []
        (top / "d/x").unlink()
        (top / "d").rmdir()
        (top / "d").mkdir()
    (place / "next").mkdir()
    cowfs("-o", r"lowerdir=UP:low:l\:2\,,upperdir=next,workdir=work", "mnt", cwd=str(place), check=True)
    try:
        assert os.listdir(place / "mnt/d") == []
        assert {frozenset(os.listdir(place / "mnt" / mark)) for mark in marks} == {frozenset({"new", "more"})}
    finally:
        cowfs("umount", place / "mnt", check=True)


def test_what_is_in_its_place_is_not_called_replaced(place: Path) -> None:
    words = r"lowerdir=low,upperdir=UP,workdir=work/w\,k"
    cowfs("-o", words, "mnt", cwd=str(place), check=True)
    done = cowfs("umount", place / "mnt")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
def test_volatile_waits_for_no_disk(place: Path) -> None:
    """strace tells: fsync(2), O_SYNC and the unmount make the daemon sync nothing."""
    arguments = ["-o", r"lowerdir=low,upperdir=UP,workdir=work/w\,k,volatile", "-f", "mnt"]
    log = place / "strace"
    with subprocess.Popen(
        ["strace", "-f", "-o", log, "-e", "trace=fsync,fdatasync,syncfs,sync", *COWFS, "overlay", *arguments],
        cwd=place,
        env={**os.environ, "PYTHONPATH": project_root()},
    ) as daemon:
        eventually(lambda: is_mounted(place / "mnt"), "it is mounted")
        with open(place / "mnt/f", "w") as file:
            file.write("new")
            file.flush()
            os.fsync(file.fileno())
        fd = os.open(place / "mnt/g", os.O_CREAT | os.O_WRONLY | os.O_SYNC)
        os.write(fd, b"new")
        os.close(fd)
        (place / "mnt/a").write_text("changed")
        run("umount", place / "mnt")
        daemon.wait(20)
    assert (place / "deep/up/f").read_text() == "new"
    assert not [line for line in log.read_text().splitlines() if "sync" in line]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ("upperdir=UP,workdir=work", "no lowerdir given"),
        ("lowerdir=low,upperdir=UP", "upperdir without workdir"),
        ("lowerdir=low,upperdir=UP,workdir=missing", "missing: not a directory"),
        ("lowerdir=low,upperdir=UP,workdir=deep/up", "the same, or one is in the other"),
        ("lowerdir=low,upperdir=UP,workdir=deep", "the same, or one is in the other"),
        ("lowerdir=low,upperdir=UP,workdir=/proc", "different mounts"),
        ("lowerdir=low,uidmapping=0:1", "uidmapping=0:1: not FILE:SHOWN:COUNT"),
        ("lowerdir=low,squash_to_uid=me", "squash_to_uid=me: not the number"),
        (f"lowerdir=low,squash_to_gid={'1' * 5000}", "1: not the number"),
        ("lowerdir=low,xattr_permissions=1", "xattr_permissions=1: cowfs does not keep owners"),
        ("lowerdir=low,xattr_permissions=2", "xattr_permissions=2: cowfs does not keep owners"),
        ("lowerdir=low,fsync=no", "fsync=no: not a number"),
        ("lowerdir=:", "no lowerdir given"),
        ("lowerdir=low:::low", "an empty lower"),
    ],
)
def test_what_cannot_be(place: Path, options: str, what: str) -> None:
    done = cowfs("overlay", "-o", options, "mnt", cwd=str(place))
    assert done.returncode != 0
    assert what in done.stderr and done.stderr.count("\n") == 1
    assert not is_mounted(place / "mnt")


@pytest.mark.parametrize("layer", ["low", "deep/up"])
def test_layers_with_owners_in_attributes_are_refused(place: Path, layer: str) -> None:
    """storage.conf with force_mask makes such layers, whose files have other owners and modes."""
    os.setxattr(place / layer, "user.containers.override_stat", b"0:0:0755")
    done = cowfs("overlay", "-o", r"lowerdir=low,upperdir=UP,workdir=work/w\,k", "mnt", cwd=str(place))
    assert done.returncode == 1
    assert "keeps owners and modes in attributes (user.containers.override_stat)" in done.stderr
    assert not is_mounted(place / "mnt")


def test_an_unknown_option_is_named_and_ignored(place: Path) -> None:
    done = cowfs("overlay", "-o", "lowerdir=low,bogus=1", "mnt", cwd=str(place))
    assert (done.returncode, done.stderr) == (0, "cowfs: option bogus is unknown and ignored\n")
    run("umount", place / "mnt")
