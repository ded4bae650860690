"""`cowfs backup` and `restore`: a copy of one moment while others write, and back."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from cowfs.errors import StoreError
from cowfs.linux import files as linux_files
from cowfs.store.offline.backup import backup_image
from cowfs.store.offline.copy_tree import TreeCopy
from cowfs.store.offline.create import create_store
from cowfs.store.served.open import open_store
from tests.mount.test_export import script, seen
from tests.support import ext3
from tests.support.mounts import COWFS, cowfs, eventually, mounted, project_root
from tests.support.system import needs_fuse, needs_root, run
from tests.support.tree import differences

DEV_FUSE_AT_NIGHT = True

pytestmark = needs_fuse

PLACES = 160
WRITER = """
import os, struct, sys
big = os.open("big", os.O_RDWR | os.O_CREAT)
os.pwrite(big, b"." * (int(sys.argv[1]) << 19), 0)
n = 0
while True:
    n += 1
    for at in range(int(sys.argv[1])):
        os.pwrite(big, struct.pack("<Q", n), at << 19)
    os.close(os.open(f"new{n}", os.O_CREAT | os.O_WRONLY))
    os.rename(f"new{n}", "last")
    if n == 3:
        print("ready", flush=True)
"""


def values(path: Path) -> list[int]:
    with open(path, "rb") as file:
        return [struct.unpack("<Q", os.pread(file.fileno(), 8, at << 19))[0] for at in range(PLACES)]


@needs_root
@pytest.mark.parametrize("kind", ["image", "directory", pytest.param("memory", marks=pytest.mark.nightly)])
def test_one_moment_of_what_is_written_to(tmp_path: Path, kind: str) -> None:
    """A writer numbers many places again and again: those of one moment differ by one, at one place."""
    script("mkdir lower; echo a >lower/a; ln lower/a lower/b; mkdir lower/d; echo d >lower/d/d", tmp_path)
    store: Path | None = tmp_path / {"image": "store.bs", "directory": "store", "memory": ""}[kind]
    if kind == "image":
        cowfs("create", str(store), "256", check=True)
    lower, mnt, copy = tmp_path / "lower", tmp_path / "mnt", tmp_path / "copy"
    with mounted(lower, mnt, store if kind != "memory" else None, options=("passthrough=off",)):
        script("mv d e; rm b; echo more >>a; mknod null c 1 3; setfattr -n user.x -v y e", mnt)
        unnamed = os.open(mnt / "unnamed", os.O_CREAT | os.O_RDWR)
        os.unlink(mnt / "unnamed")
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(PLACES)], cwd=mnt, stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            done = cowfs("backup", mnt, copy)
            assert (done.returncode, done.stderr) == (0, "")
            last = values(mnt / "big")[0]
            eventually(lambda: values(mnt / "big")[0] > last, "the mount goes on")
            writer.kill()
        refused = cowfs("backup", mnt, copy)
        assert (refused.returncode, "already exists" in refused.stderr) == (1, True)
        refused = cowfs("backup", mnt, mnt / "copy")
        assert (refused.returncode, "inside the mount" in refused.stderr) == (1, True)
        os.close(unnamed)
    assert sorted(path.name for path in tmp_path.iterdir() if "copy" in path.name) == ["copy"]
    if kind != "directory":
        run("/sbin/e2fsck", "-fn", copy)
        assert copy.stat().st_blocks * 512 < copy.stat().st_size
    back = tmp_path / ("back" if kind == "directory" else "back.bs")
    assert cowfs("restore", copy, back).returncode == 0
    with mounted(lower, mnt, back, options=("passthrough=off",)):
        found = values(mnt / "big")
        assert found == sorted(found, reverse=True)
        assert found[0] - found[-1] <= 1
        names = set(os.listdir(mnt)) - {"big", "last"}
        assert names - {name for name in names if name.startswith("new")} == {"a", "e", "null"}
        assert ((mnt / "a").read_text(), (mnt / "e/d").read_text()) == ("a\nmore\n", "d\n")
        assert os.getxattr(mnt / "e", "user.x") == b"y"


@needs_root
@pytest.mark.parametrize("kind", ["image", pytest.param("directory", marks=pytest.mark.nightly)])
def test_a_store_that_is_not_in_use(tmp_path: Path, kind: str) -> None:
    script("mkdir lower; echo a >lower/a; echo b >lower/b", tmp_path)
    store = tmp_path / ("store.bs" if kind == "image" else "store")
    if kind == "image":
        cowfs("create", store, "16", check=True)
    lower, mnt, copy, other = (tmp_path / name for name in ("lower", "mnt", "copy", "other.bs"))
    with mounted(lower, mnt, store):
        script("rm a; echo 1 >>b; mkdir new; ln b new/b; mkfifo new/fifo", mnt)
        before = seen(mnt)
        if kind == "image":
            cowfs("create", other, "16", check=True)
            for target, why in ((store, "is mounted"), (mnt, "is mounted")):
                refused = cowfs("restore", other, target, "--force")
                assert (refused.returncode, why in refused.stderr) in {(32, True), (1, True)}
    assert cowfs("backup", store, copy).returncode == 0
    with mounted(lower, mnt, store):
        script("rm -r new; echo 2 >>b", mnt)
    if kind == "image":
        data = copy.read_bytes()
        damaged = tmp_path / "damaged.bs"
        damaged.write_bytes(data[: 1 << 20] + bytes(2 << 20) + data[3 << 20 :])
        refused = cowfs("restore", damaged, store, "--force")
        assert (refused.returncode, "damaged" in refused.stderr) == (32, True)
        run("cp", copy, damaged)
        run("debugfs", "-w", "-R", "set_inode_field /upper/b links_count 9", damaged)
        told = cowfs("backup", damaged, tmp_path / "too.bs", check=True).stderr
        assert f"{damaged}: is damaged, and so is the copy" in told
        assert cowfs("restore", copy, store).returncode == 1
        assert cowfs("restore", copy, store, "--force").returncode == 0
    else:
        store = tmp_path / "again"
        assert cowfs("restore", copy, store).returncode == 0
    with mounted(lower, mnt, store):
        assert differences(before, seen(mnt)) == []
    assert cowfs("backup", lower, tmp_path / "x").returncode == 32
    assert cowfs("restore", lower, tmp_path / "x").returncode == 32


@needs_root
@pytest.mark.nightly
def test_interrupted(tmp_path: Path) -> None:
    """Nothing stays of the copy, and the mount goes on."""
    (tmp_path / "lower").mkdir()
    mnt, store = tmp_path / "mnt", tmp_path / "store"
    with mounted(tmp_path / "lower", mnt, store):
        script("mkdir d; for i in $(seq 400); do echo $i >d/$i; done", mnt)
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with subprocess.Popen(
                [*COWFS, "backup", str(mnt), str(tmp_path / "copy")],
                env={**os.environ, "PYTHONPATH": project_root()},
                stderr=subprocess.DEVNULL,
            ) as process:
                eventually(
                    lambda: list(tmp_path.glob(".copy*")) or process.poll() is not None, "it has begun"
                )
                process.send_signal(sign)
            assert not (tmp_path / "copy").exists() or process.returncode == 0
            script("rm -rf copy", tmp_path)
            (mnt / "more").write_text("goes on")
        assert cowfs("backup", mnt, tmp_path / "copy").returncode == 0
    assert not list(tmp_path.glob(".copy*"))


@needs_root
def test_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine can say to one alone what was written to: two would each have half of it."""
    monkeypatch.setattr(linux_files, "reflink", lambda *_: False)
    create_store(str(tmp_path / "store.bs"), 16 << 20)
    with ExitStack() as stack:
        store = open_store(str(tmp_path / "store.bs"))
        stack.callback(store.close)
        targets = [stack.enter_context(open(tmp_path / name, "w+b")) for name in ("one", "two")]
        first = backup_image(store, targets[0].fileno())
        assert next(first) == "copying"
        _, file = store.layer.create(store.upper, b"written", 0o600, 0, 0)
        with closing(file):
            file.pwrite(b"meanwhile", 0)
            file.fsync(False)
        with pytest.raises(StoreError, match="another backup is being made"):
            next(backup_image(store, targets[1].fileno()))
        for step in first:
            if callable(step):
                step()
        for step in backup_image(store, targets[1].fileno()):
            if callable(step):
                step()
    for name in ("one", "two"):
        run("/sbin/e2fsck", "-fn", tmp_path / name)
        assert run("debugfs", "-R", "cat /upper/written", tmp_path / name).stdout == "meanwhile"


def copied(source: Path, target: Path, change: Callable[[], None], *, after: int = -1) -> None:
    """Copy a tree in two passes, with a change between them, or in the first, after so many inodes."""
    with ExitStack() as stack:
        fds = []
        for path in (source, target):
            fds.append(os.open(path, os.O_RDONLY))
            stack.callback(os.close, fds[-1])
        copy = TreeCopy(*fds)
        for number, _ in enumerate(copy.run()):
            if number == after:
                change()
        if after < 0:
            change()
        for _ in copy.run():
            pass


@needs_root
def test_changed_in_the_tick_in_which_it_was_copied(tmp_path: Path) -> None:
    """With times of whole seconds, a change may leave the times as they are."""
    with ext3.mounted(ext3.make(tmp_path / "image", 1024, 128, 8 << 20)) as layer:
        source = Path(layer.name) / "tree"
        source.mkdir()
        file = source / "file"
        (source / "other").touch()
        os.link(source / "other", file)
        times: list[int] = []

        def change() -> None:
            times.append(file.stat().st_ctime_ns)
            with open(file, "r+b") as out:
                out.write(b"new")
            times.append(file.stat().st_ctime_ns)

        for number in range(20):
            with open(file, "r+b") as out:
                out.write(b"old")
            target = tmp_path / f"target{number}"
            target.mkdir()
            times.clear()
            copied(source, target, change)
            assert (target / "file").read_bytes() == b"new"
            assert (target / "file").samefile(target / "other")
            if times[0] == times[1]:
                return
    raise AssertionError("no change within a second")


@pytest.mark.parametrize("after", [0, 1, -1])
@pytest.mark.parametrize("what", ["write", "link"])
def test_names_of_one_inode_stay_that(tmp_path: Path, after: int, what: str) -> None:
    """Whenever it is written to, or gets another name, between the copies of its names."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "a").write_text("old")
    if what == "write":
        os.link(source / "a", source / "b")
    else:
        (source / "b").write_text("other")

    def change() -> None:
        if what == "write":
            (source / "a").write_text("new")
        else:
            os.link(source / "a", source / "c")
            os.rename(source / "c", source / "b")

    eventually(lambda: os.stat(source / "a").st_ctime_ns + 50_000_000 < time.time_ns(), "it is old")
    copied(source, target, change, after=after)
    assert (target / "a").samefile(target / "b")
    assert (target / "a").read_text() == ("new" if what == "write" else "old")
