"""The daemon of a root filesystem, without a machine: what it accepts and refuses, and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from cowfs.linux.mount_table import mount_of
from cowfs.linux.pids import wait_pid_gone
from tests.boot.root import Root
from tests.support.mounts import cowfs, is_mounted, mounted
from tests.support.system import needs_fuse, needs_root, run
from tests.support.transport import IO_URING, available_transports

pytestmark = [needs_root, needs_fuse]


@pytest.mark.parametrize("engine", ["auto", "kernel"])
def test_serves_and_outlives(root: Root, store: Path, engine: str) -> None:
    code, said = root.start(store, engine=engine)
    assert (code, "are free" in said) == (0, True), said
    (root.root / "new").write_text("x")
    pid = root.pid()
    assert Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"@")
    for number in (
        signal.SIGTERM,
        signal.SIGINT,
        signal.SIGHUP,
        signal.SIGQUIT,
        signal.SIGTSTP,
        signal.SIGUSR1,
    ):
        os.kill(pid, number)
    assert not wait_pid_gone(pid, 0.3)
    (root.root / "after").write_text("y")
    assert (root.shown / "upper/new").read_text() == "x"
    shown = json.loads(cowfs("info", root.root, "--json", check=True).stdout)
    assert shown["transport"].startswith("io_uring" if IO_URING in available_transports() else "/dev/fuse")
    root.stop()
    assert mount_of(root.shown) is None
    assert run("debugfs", "-R", "cat /upper/after", store).stdout == "y"
    assert cowfs("check", "-n", store).returncode == 0


def test_memory(root: Root) -> None:
    assert root.start("memory")[0] == 0
    (root.root / "new").write_text("x")
    assert (root.root / "file").read_text() == "lower"


def test_repairs_what_was_not_unmounted(root: Root, store: Path) -> None:
    with mounted(root.image, root.top / "first", store):
        pass
    run("debugfs", "-w", "-R", "ssv state 2", store)
    code, said = root.start(store)
    assert code == 0, said
    assert "has errors; repaired by e2fsck" in said


def test_full_store_is_told_of(root: Root, store: Path) -> None:
    with (
        mounted(root.image, root.top / "first", store) as here,
        (here.path / "ballast").open("wb", buffering=0) as file,
        pytest.raises(OSError, match="No space"),
    ):
        while True:
            file.write(bytes(1 << 20))
            os.fsync(file.fileno())
    code, said = root.start(store)
    assert code == 0, said
    assert "WARNING: the store is full" in said


@pytest.mark.parametrize("megabytes", [64, 24])
def test_a_copy_with_holes_is_given_its_room(root: Root, tmp_path: Path, megabytes: int) -> None:
    """Otherwise the disk might be full later; the daemon reports it if the disk is full already."""
    cowfs("create", tmp_path / "whole.bs", "32", check=True)
    disk, at = tmp_path / "disk", tmp_path / "at"
    at.mkdir()
    run("mke2fs", "-q", "-t", "ext4", disk, f"{megabytes}M")
    run("mount", "-o", "loop", disk, at)
    try:
        store = at / "sysrcd.bs"
        run("cp", "--sparse=always", tmp_path / "whole.bs", store)
        assert store.stat().st_blocks * 512 < 1 << 20
        code, said = root.start(store)
        assert code == 0, said
        assert (store.stat().st_blocks * 512 >= 32 << 20) == (megabytes == 64)
        assert ("WARNING: " in said and "the file still needs 3" in said) == (megabytes == 24), said
        root.stop()
    finally:
        root.stop()
        run("umount", at)


def test_store_in_use_is_refused(root: Root, store: Path) -> None:
    with mounted(root.image, root.top / "first", store):
        code, said = root.start(store)
        assert (code, "in use by process" in said) == (32, True), said


def test_store_on_read_only_media_is_a_layer(root: Root, store: Path) -> None:
    with mounted(root.image, root.top / "first", store) as here:
        (here.path / "file").write_text("changed")
        (here.path / "gone").unlink()
    before = store.read_bytes()
    code, said = root.start(store, "ro")
    assert code == 0, said
    assert (root.root / "file").read_text() == "changed"
    assert sorted(os.listdir(root.root)) == ["file"]
    shown = mount_of(root.shown)
    assert shown is not None and (shown.fstype, shown.options[:2]) == ("ext3", "ro")
    (root.root / "file").write_text("once more")
    (root.root / "gone").write_text("back")
    assert (root.root / "gone").read_text() == "back"
    root.stop()
    assert store.read_bytes() == before


@pytest.mark.parametrize("engine", ["auto", "kernel"])
def test_several_systems_in_one_store(root: Root, store: Path, engine: str) -> None:
    for number in range(2):
        for name in ("one", "two"):
            code, said = root.start(store, engine=engine, more=("--subdir", name))
            assert code == 0, said
            assert sorted(os.listdir(root.root)) == sorted(["file", "gone", *[name] * number])
            (root.root / name).write_text("x")
            assert (root.shown / "upper" / name).read_text() == "x"
            root.stop()
    code, said = root.start(store, "ro", more=("--subdir", "two"))
    assert code == 0, said
    assert sorted(os.listdir(root.root)) == ["file", "gone", "two"]
    root.stop()
    code, said = root.start(store, "ro", more=("--subdir", "three"))
    assert (code, "no such store in the image" in said) == (32, True), said
    assert cowfs("check", "-n", store).returncode == 0


def test_what_was_kept_above_a_read_only_store_stands_on_it(root: Root, store: Path, tmp_path: Path) -> None:
    """Changes on top of those on a CD are saved to a stick: the next boot has both, if the CD is there."""
    with mounted(root.image, root.top / "first", store) as here:
        (here.path / "file").write_text("changed")
        (here.path / "gone").unlink()
    other = tmp_path / "other.bs"
    cowfs("create", other, "16", check=True)
    before = store.read_bytes()
    assert root.start(store, "ro")[0] == 0
    (root.root / "new").write_text("new")
    kept = tmp_path / "kept.bs"
    cowfs("persist", root.root, kept, check=True)
    (root.root / "more").write_text("more")
    root.stop()

    for wrong in ((), (other,)):
        code, said = root.start(kept, below=wrong)
        assert (code, "is based on a store on read-only media, which was not found" in said) == (32, True), (
            said
        )
    code, said = root.start(kept, below=(other, store))
    assert (code, f"{kept} is based on {store}" in said) == (0, True), said
    assert sorted(os.listdir(root.root)) == ["file", "more", "new"]
    assert [(root.root / name).read_text() for name in ("file", "new")] == ["changed", "new"]
    (root.root / "file").write_text("once more")
    root.stop()
    assert run("debugfs", "-R", "cat /upper/file", kept).stdout == "once more"
    assert store.read_bytes() == before
    assert cowfs("check", "-n", kept).returncode == 0

    # And the stick may be locked too, by then.
    assert root.start(kept, "ro", below=(store,))[0] == 0
    assert (root.root / "file").read_text() == "once more"
    assert sorted(os.listdir(root.root)) == ["file", "more", "new"]


def link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def text(path: Path) -> None:
    path.write_text("dear diary\n" * 500)


def empty(path: Path) -> None:
    path.touch()


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 64 << 30)


def ext4(path: Path) -> None:
    run("mke2fs", "-q", "-t", "ext4", "-O", "metadata_csum,64bit", path, "16M")


def unknown(path: Path) -> None:
    cowfs("create", path, "16", check=True)
    with path.open("r+b") as image:  # s_feature_incompat
        image.seek(1024 + 96)
        image.write(b"\x02\x00\x00\x40")


def aufs_too(path: Path) -> None:
    cowfs("create", path, "16", check=True)
    with mounted(path.parent / "sysrcd.dat", path.with_suffix(".mnt"), path):
        pass
    run("debugfs", "-w", "-R", "mkdir .wh..wh.aufs", path)


def foreign(path: Path) -> None:
    other = path.with_suffix(".lower")
    other.mkdir()
    cowfs("create", path, "16", check=True)
    with mounted(other, path.with_suffix(".mnt"), path):
        pass


def newer(path: Path) -> None:
    cowfs("create", path, "16", check=True)
    header = path.with_suffix(".header")
    header.write_text('{"version": 99}')
    run("debugfs", "-w", "-R", "rm /cowfs/header.json", path)
    run("debugfs", "-w", "-R", f"write {header} /cowfs/header.json", path)


def beyond_repair(path: Path) -> None:
    cowfs("create", path, "16", check=True)
    run("debugfs", "-w", "-R", "clri <8>", path)  # the journal
    run("debugfs", "-w", "-R", "clri <2>", path)  # and the root
    run("debugfs", "-w", "-R", "ssv state 2", path)


BAD: dict[Callable[[Path], object], str] = {
    link: "not a store",
    text: "not a store but a text file",
    empty: "not a store",
    sparse: "not a store",
    ext4: "ext4 filesystem",
    unknown: "filesystem",
    aufs_too: "aufs has written to it",
    foreign: "belongs to",
    newer: "format version 99",
    beyond_repair: "needs manual repair",
}


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
@pytest.mark.parametrize("mode", ["rw", "ro"])
def test_what_is_no_store_is_refused_and_untouched(
    root: Root, mode: str, make: Callable[[Path], object]
) -> None:
    path = root.top / "sysrcd.bs"
    make(path)
    size = path.stat().st_size
    before = path.read_bytes() if size < 1 << 30 else b""
    code, said = root.start(path, mode)
    assert code != 0
    assert not is_mounted(root.root)
    assert len(said.splitlines()) >= 1
    if mode == "rw":
        assert BAD[make] in said, said
        assert path.stat().st_size == size
        if make is not beyond_repair and before:
            assert path.read_bytes() == before


def of_aufs(path: Path) -> Path:
    """Make a store as SystemRescueCd 1 to 5 wrote it."""
    content = path.with_suffix(".content")
    for name in (".wh..wh.plnk", ".wh..wh.orph"):
        (content / name).mkdir(parents=True)
    (content / ".wh..wh.aufs").touch(0o444)
    os.link(content / ".wh..wh.aufs", content / ".wh.gone")
    (content / "file").write_text("changed by aufs")
    run("mke2fs", "-q", "-t", "ext3", "-d", content, path, "16M")
    return path


@pytest.mark.parametrize("mode", ["rw", "ro"])
def test_boots_with_a_store_of_aufs(root: Root, tmp_path: Path, mode: str) -> None:
    store = of_aufs(tmp_path / "aufs.bs")
    before = store.read_bytes()
    code, said = root.start(store, mode)
    assert code == 0, said
    assert sorted(name for name in os.listdir(root.root) if name != "lost+found") == ["file"]
    assert (root.root / "file").read_text() == "changed by aufs"
    (root.root / "file").write_text("once more")
    (root.root / "gone").mkdir()
    assert (root.shown / ".wh..wh.aufs").exists(), "the filesystem of the store as it is"
    root.stop()
    if mode == "ro":
        assert store.read_bytes() == before
        return
    assert run("debugfs", "-R", "cat /file", store).stdout == "once more"
    listed = run("debugfs", "-R", "ls /gone", store).stdout
    assert ".wh..wh..opq" in listed
    assert ".wh.gone" not in run("debugfs", "-R", "ls /", store).stdout


def test_half_a_world_leaves_nothing(root: Root, store: Path) -> None:
    shutil.rmtree(root.root)
    code, said = root.start(store)
    assert code != 0 and said
