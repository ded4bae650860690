"""``cowfs persist``: a store in memory is kept, under its users."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from cowfs.client import ask, find_mount
from cowfs.errors import CowfsError, StoreError
from cowfs.store.offline.persist import persist
from cowfs.store.served.open import open_store
from cowfs.store.served.store import Store
from tests.support import tree
from tests.support.mounts import (
    COWFS,
    KERNEL_OPTIONS,
    Mounted,
    cowfs,
    eventually,
    is_mounted,
    mounted,
    project_root,
)
from tests.support.programs import replaced
from tests.support.system import NOBODY, as_nobody_prefix, needs_fuse, needs_root, run
from tests.support.tree import Node, link, symlink
from tests.support.worker import script, seen, worker, writer

DEV_FUSE_AT_NIGHT = True
pytestmark = needs_fuse

MIB = 1 << 20
both = pytest.mark.parametrize(
    "nobody", [pytest.param(False, marks=needs_root, id="root"), pytest.param(True, id="nobody")]
)

LOWER: tree.Tree = {
    "etc/hosts": b"127.0.0.1 localhost\n",
    "etc/passwd": b"root:x:0:0::/root:/bin/sh\n",
    "usr/bin/tool": Node(data=b"#!/bin/sh\necho tool\n", mode=0o755),
    "usr/lib/big": Node(data=b"library" * 100_000),
    "usr/lib/alias": link("usr/lib/big"),
    "usr/lib/link": symlink("big"),
    "old": b"old",
}
WORK = r"""
echo more >> etc/hosts
rm etc/passwd
mv usr user
chmod 700 user/bin/tool
ln user/lib/big hard && echo more >> hard
mkdir -p new/er && mkfifo new/pipe && ln -s er new/link
for number in $(seq 100); do echo $number > new/er/$number; done
setfattr -n user.color -v red new
truncate -s 1G sparse && printf end >> sparse
"""
LATER = "echo later > later && rm hard && mv new newer && rm newer/er/1"


@pytest.fixture
def base(nobody_path: Path) -> Path:
    tree.build(nobody_path / "lower", LOWER)
    (nobody_path / "kept").mkdir()
    if os.geteuid() == 0:
        run("chown", "-R", f"{NOBODY}:{NOBODY}", nobody_path)
    return nobody_path


def in_memory(base: Path, *, nobody: bool, **more: Any) -> Any:
    return mounted(base / "lower", base / "mnt", "memory", nobody=nobody, **more)


def info(what: Path, *, nobody: bool = False) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(cowfs("info", what, "--json", nobody=nobody, check=True).stdout)
    return shown


def refused(done: subprocess.CompletedProcess[str], said: str, code: int = 32) -> None:
    assert said in done.stderr, done.stdout + done.stderr
    assert done.returncode == code
    assert done.stderr.startswith("cowfs: ") and done.stderr.count("\n") == 1


# --- persist, through a mount


@both
def test_a_store_in_memory_is_kept_under_its_users(base: Path, nobody: bool) -> None:
    store, go_on = base / "kept/sysrcd.bs", base / "go-on"
    with in_memory(base, nobody=nobody) as here, worker(here) as work:
        script(WORK, here)
        work("os.mkdir('gone')")
        fds = [work("os.open('nameless', os.O_CREAT | os.O_RDWR)"), work("os.open('old', os.O_RDWR)")]
        fds.append(work("os.open('gone', os.O_RDONLY)"))
        for fd in fds[:2]:
            work(f"os.write({fd}, b'before')")
        work("[os.unlink('nameless'), os.unlink('old'), os.rmdir('gone')]")
        numbers = [work(f"os.fstat({fd}).st_ino") for fd in fds]
        with writer(here, go_on) as written_until_then:
            done = cowfs("persist", here.path, store, "160", nobody=nobody)
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout.endswith(f"now kept in {store} (160 MiB)\n")
            shown = info(here.path, nobody=nobody)["store"]
            assert (shown["kind"], shown["path"]) == ("image", str(store))
            assert store.stat().st_size == 160 * MIB <= store.stat().st_blocks * 512
            work("os.mkdir('after')")
            written = written_until_then()
        for fd in fds[:2]:
            assert work(f"os.pread({fd}, 9, 0)") == b"before"
            assert work(f"os.write({fd}, b', after')") == 7
            assert work(f"os.pread({fd}, 20, 0)") == b"before, after"
        assert [work(f"os.fstat({fd}).st_ino") for fd in fds] == numbers
        assert [work(f"os.fstat({fd}).st_nlink") for fd in fds[:2]] == [0, 0]
        assert work(f"os.listdir({fds[2]})") == []
        script(LATER, here)
        before = seen(here)
        assert script("cat log", here).split() == [f"{number:08}" for number in range(written)]
    run("e2fsck", "-fn", store)
    assert cowfs("check", "-n", store, nobody=nobody).returncode == 0
    with mounted(base / "lower", base / "mnt", store, nobody=nobody) as here:
        assert tree.differences(tree.stable(before), tree.stable(seen(here))) == []
        assert info(here.path, nobody=nobody)["store"]["path"] == str(store)
    if os.geteuid() == 0:
        the_kernel_shows(before, base, store)


def the_kernel_shows(before: tree.Snapshot, base: Path, store: Path) -> None:
    at, merged = base / "store", base / "merged"
    at.mkdir()
    merged.mkdir()
    run("mount", "-t", "ext3", "-o", "loop", store, at)
    try:
        assert os.listdir(at / "work/work") == [], "nothing of what is hidden while the store moves"
        options = f"lowerdir={base}/lower,upperdir={at}/upper,workdir={at}/work,{KERNEL_OPTIONS}"
        run("mount", "-t", "overlay", "-o", options, "overlay", merged)
        try:
            theirs = tree.snapshot(merged)
        finally:
            run("umount", merged)
    finally:
        run("umount", at)
    ignore = ("ino", "same_dev", "d_ino")
    assert tree.differences(tree.stable(before, ignore=ignore), tree.stable(theirs, ignore=ignore)) == []


@both
def test_what_is_kept_has_the_size_asked_for_and_survives_a_kill(base: Path, nobody: bool) -> None:
    store = base / "kept/s"
    with in_memory(base, nobody=nobody, quiet=False) as here:
        # mke2fs leaves the last 2 MiB unused: they are too few for a block group.
        cowfs("persist", here.path, store, "130", nobody=nobody, check=True)
        assert store.stat().st_size == 130 * MIB
        refused(cowfs("persist", here.path, base / "kept/t", nobody=nobody), "changes are already kept")
        script("echo kept > kept && sync kept", here)
        refused(cowfs("check", store, nobody=nobody), "in use by process", 8)
        os.kill(here.pid(), signal.SIGKILL)
        cowfs("umount", here.path, nobody=nobody)
        eventually(lambda: not is_mounted(here.path), "the dead mount is gone")
    assert os.listdir(base / "kept") == ["s"]
    with mounted(base / "lower", base / "mnt", store, nobody=nobody) as here:
        assert script("cat kept", here) == "kept\n"


@both
def test_persist_is_refused(base: Path, nobody: bool) -> None:
    """Each time with a reason; the mount goes on, and nothing is left behind."""
    kept = base / "kept"
    (kept / "there").write_text("mine")
    with in_memory(base, nobody=nobody) as here:
        script("echo x > x", here)
        for path, size, said, code in (
            (kept / "there", [], "already exists", 32),
            (here.path / "s", [], "is inside the mount whose changes it would hold", 32),
            (here.path / "etc/s", [], "is inside the mount", 32),
            (base / "no/s", [], "No such file or directory", 32),
            (base / "lower/old/s", [], "Not a directory", 32),
            (kept / "s", ["64"], "64 MiB is too small: the store in memory has 128 MiB", 1),
            (kept / "s", ["20T"], "too large for ext3", 1),
            (kept / "s", ["15T"], "are free", 32),
            (kept / "s", ["x"], "is not a size", 1),
            (kept / ("n" * 256), [], "File name too long", 32),
        ):
            refused(cowfs("persist", here.path, path, *size, nobody=nobody), said, code)
            assert os.listdir(kept) == ["there"]
        refused(cowfs("persist", base, kept / "s", nobody=nobody), "not a cowfs mountpoint")
        assert info(here.path, nobody=nobody)["store"]["kind"] == "memory"
        assert script("cat x", here) == "x\n"
        cowfs("persist", here.path, kept / "s", nobody=nobody, check=True)
    assert (kept / "there").read_text() == "mine"


@pytest.mark.parametrize("kind", ["directory", "image"])
def test_what_is_no_memory_is_kept_already(base: Path, kind: str) -> None:
    if kind == "image":
        cowfs("create", base / "s", "16", nobody=True, check=True)
    with mounted(base / "lower", base / "mnt", base / "s", nobody=True) as here:
        refused(
            cowfs("persist", here.path, base / "kept/s", nobody=True),
            f"{base}/s: its changes are already kept",
        )
        said = "a directory store has no size" if kind == "directory" else "a store can only grow"
        refused(cowfs("grow", here.path, "15", nobody=True), said)


@needs_root
def test_a_tmpfs_of_the_kernels_cannot_be_kept(base: Path) -> None:
    with in_memory(base, nobody=False, engine="kernel") as here:
        refused(
            cowfs("persist", here.path, base / "kept/s"),
            "changes in a tmpfs (--engine kernel) cannot be kept",
        )
        refused(cowfs("grow", here.path, "300"), "cannot grow")
    assert os.listdir(base / "kept") == []


@needs_root
def test_another_user_is_not_obeyed(base: Path) -> None:
    with in_memory(base, nobody=False) as here:
        for command in (["persist", here.path, base / "kept/s"], ["grow", here.path, "1G"]):
            refused(cowfs(*command, nobody=True), "this mount belongs to another user (uid 0)")
    assert os.listdir(base / "kept") == []
    os.chown(base / "mnt", NOBODY, NOBODY)
    log = base / "nobody.log"
    with in_memory(base, nobody=True, log=log) as here:  # root is, but hands a user's daemon no directory
        refused(cowfs("persist", here.path, base / "kept/s"), "who gets none of your files")
        os.chown(base / "kept", 0, 0)
        refused(cowfs("persist", here.path, base / "kept/s", nobody=True), "Permission denied")
        os.chown(base / "kept", NOBODY, NOBODY)
        assert cowfs("persist", here.path, base / "kept/s", nobody=True).returncode == 0


@needs_root
def test_persist_without_room(base: Path) -> None:
    small = base / "kept"
    run("mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", small)
    try:
        with in_memory(base, nobody=False) as here:
            refused(cowfs("persist", here.path, small / "s"), "needs 128 MiB more, but only 48 MiB are free")
            assert os.listdir(small) == []
            assert info(here.path)["store"]["kind"] == "memory"
    finally:
        run("umount", small)


def test_a_file_may_not_become_that_large(base: Path) -> None:
    (base / "mnt").mkdir()
    os.chown(base / "mnt", NOBODY, NOBODY)
    limited = [*as_nobody_prefix(), "prlimit", f"--fsize={200 * MIB}", *COWFS]
    env = {**os.environ, "PYTHONPATH": project_root()}
    run(*limited, "mount", base / "lower", base / "mnt", "-o", f"log={base}/log", env=env)
    here = Mounted(base / "mnt", base / "log", nobody=True)
    try:
        refused(cowfs("persist", here.path, base / "kept/s", "300", nobody=True), "ulimit -f")
        assert os.listdir(base / "kept") == []
        script("echo x > x", here)
        cowfs("persist", here.path, base / "kept/s", nobody=True, check=True)
    finally:
        here.umount()


def requested(here: Mounted, directory: Path, name: str) -> Generator[dict[str, Any], None, None]:
    """Ask for it without the command line, to be able to go away in the middle."""
    found = find_mount(str(here.path))
    assert found
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield from ask(found.dev, "persist", fd=fd, name=name, path=str(directory / name), size=None)
    finally:
        os.close(fd)


def test_whoever_asked_goes_away(base: Path) -> None:
    """Then it is given up: no file is left, and the changes are in memory as before."""
    kept = base / "kept"
    with in_memory(base, nobody=False) as here:
        script("dd if=/dev/urandom of=big bs=1M count=90 status=none", here)
        pid = here.pid()
        with closing(requested(here, kept, "s")) as replies:
            assert any(reply["said"] == "copying" for reply in replies)
            with closing(requested(here, kept, "t")) as second, pytest.raises(CowfsError) as failure:
                next(second)
            assert f"is already being written to {kept}/s" in str(failure.value)
        eventually(lambda: not any(path.startswith(f"{kept}/") for path in open_by(pid)), "it is given up")
        assert os.listdir(kept) == []
        assert info(here.path)["store"]["kind"] == "memory"
        script("test $(stat -c %s big) = 94371840 && rm big", here)
        cowfs("persist", here.path, kept / "s", check=True)


def open_by(pid: int) -> list[str]:
    """What a process has open; a file without a name is shown below its directory."""
    found = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(os.readlink(fd))
    return found


# --- persist, step by step


@pytest.fixture
def opened() -> Iterator[Store]:
    store = open_store("memory", memory_size=512 * MIB)
    yield store
    store.close()


def write(store: Store, name: bytes, size: int) -> None:
    _, file = store.layer.create(store.upper, name, 0o644, 0, 0)
    for start in range(0, size, MIB):
        file.pwrite(b"x" * min(MIB, size - start), start)
    file.close()


def moving(store: Store, directory: Path, size: int | None = None) -> Generator[str, None, None]:
    """What is said, and "" for what is done between; the last step of all is done while users wait."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for step in persist(store, fd, "s", str(directory / "s"), size):
            if isinstance(step, str):
                yield step
            else:
                step()
                yield ""
    finally:
        os.close(fd)


def is_whole(path: Path) -> None:
    run("e2fsck", "-fn", path)
    store = open_store(str(path))
    assert store.layer.lookup(store.upper, b"x") is not None
    store.close()


def test_a_name_that_is_taken_meanwhile_is_left_alone(opened: Store, tmp_path: Path) -> None:
    write(opened, b"x", 100)
    steps = moving(opened, tmp_path)
    assert "copying" in steps
    (tmp_path / "s").write_text("mine")
    with pytest.raises(StoreError, match="already exists"):
        list(steps)
    assert (tmp_path / "s").read_text() == "mine"
    assert (opened.kind, opened.path) == ("memory", "memory")
    assert opened.make_room() and opened.layer.lookup(opened.upper, b"x")
    write(opened, b"y", 200 * MIB)
    (tmp_path / "s").unlink()
    assert list(moving(opened, tmp_path))
    opened.close()
    is_whole(tmp_path / "s")


@pytest.mark.parametrize("size", [None, 128 * MIB, 256 * MIB])
def test_a_store_that_grows_while_it_is_kept(opened: Store, tmp_path: Path, size: int | None) -> None:
    write(opened, b"x", 100)
    steps = moving(opened, tmp_path, size)
    assert "copying" in steps
    assert opened.make_room()
    write(opened, b"y", 150 * MIB)
    if size == 128 * MIB:
        with pytest.raises(StoreError, match="have outgrown 128 MiB in the meantime"):
            list(steps)
        assert (os.listdir(tmp_path), opened.kind) == ([], "memory")
        return
    list(steps)
    assert opened.kind == "image"
    opened.close()
    assert (tmp_path / "s").stat().st_size == 256 * MIB
    is_whole(tmp_path / "s")


def test_resize2fs_fails(opened: Store, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    write(opened, b"x", 100)
    with (
        replaced(tmp_path / "bin", resize2fs="echo no luck; exit 1"),
        pytest.raises(StoreError, match="resize2fs failed: no luck"),
    ):
        list(moving(opened, tmp_path / "kept", 256 * MIB))
    assert (os.listdir(tmp_path / "kept"), opened.kind) == ([], "memory")
    assert opened.layer.lookup(opened.upper, b"x")
    list(moving(opened, tmp_path / "kept"))
    opened.close()
    is_whole(tmp_path / "kept/s")


def test_a_file_system_without_nameless_files(
    opened: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAT: what is unfinished has a name, and it is gone when it is given up."""
    real_open = os.open

    def fat_open(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real_open(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", fat_open)
    write(opened, b"x", 100)
    with closing(moving(opened, tmp_path)) as steps:
        assert "copying" in steps
        assert len(os.listdir(tmp_path)) == 1
    assert os.listdir(tmp_path) == []
    list(moving(opened, tmp_path))
    assert os.listdir(tmp_path) == ["s"]
    opened.close()
    is_whole(tmp_path / "s")
