"""Stores that become larger while they are mounted: in memory by themselves, images when they are told to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cowfs.store.served.fullness import watch
from cowfs.store.served.open import open_store
from tests.support.mounts import Mounted, cowfs, mounted
from tests.support.programs import replaced
from tests.support.system import NOBODY, needs_fuse, needs_root, run
from tests.support.worker import script, worker

DEV_FUSE_AT_NIGHT = True
pytestmark = needs_fuse

MIB = 1 << 20
both = pytest.mark.parametrize(
    "nobody", [pytest.param(False, marks=needs_root, id="root"), pytest.param(True, id="nobody")]
)


@pytest.fixture
def base(nobody_path: Path) -> Path:
    """A lower with a large file in it."""
    (nobody_path / "lower").mkdir()
    (nobody_path / "lower/big").write_bytes(bytes(range(256)) * 4096 * 60)
    if os.geteuid() == 0:
        run("chown", "-R", f"{NOBODY}:{NOBODY}", nobody_path)
    return nobody_path


def info(what: Path, *, nobody: bool) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(cowfs("info", what, "--json", nobody=nobody, check=True).stdout)
    return shown


def room(here: Mounted) -> tuple[int, int]:
    """Bytes in all, and free, as df(1) tells them."""
    found = [int(number) for number in script("stat -f -c '%S %b %f' .", here).split()]
    return found[0] * found[1], found[0] * found[2]


def taken(here: Mounted) -> int:
    """Bytes of memory that the image of a store in memory takes."""
    for fd in Path(f"/proc/{here.pid()}/fd").iterdir():
        if "memfd:cowfs-store" in os.readlink(fd):
            return fd.stat().st_blocks * 512
    raise AssertionError("no memory is open")


FILL = "dd if=/dev/zero of={} bs=1M count={} status=none 2>/dev/null || true"


# --- in memory


@both
def test_memory_is_taken_as_it_is_filled_up_to_the_limit(base: Path, nobody: bool) -> None:
    with mounted(base / "lower", base / "mnt", "memory", nobody=nobody, options=["size=300M"]) as here:
        size, free = room(here)
        assert 280 * MIB < free <= size < 300 * MIB, "what will be can be used already"
        assert taken(here) < 12 * MIB
        script(FILL.format("one", 250), here)
        assert int(script("stat -c %s one", here)) == 250 * MIB
        assert abs(room(here)[0] - size) < 16 * MIB
        assert 250 * MIB < taken(here) < 275 * MIB
        script(FILL.format("two", 250), here)
        two = int(script("stat -c %s two", here))
        assert 25 * MIB < two < 50 * MIB
        assert room(here)[1] < MIB
        with worker(here) as work:
            assert work("os.write(os.open('two', os.O_WRONLY | os.O_APPEND), bytes(2 << 20))") in {-28, MIB}
        assert " % full; cowfs grow MOUNTPOINT" in info(here.path, nobody=nobody)["store"]["hint"]
        script("rm one", here)
        assert room(here)[1] > 240 * MIB
        script(FILL.format("three", 240), here)
        assert int(script("stat -c %s three", here)) == 240 * MIB
        refused = cowfs("grow", here.path, "200", nobody=nobody)
        assert "the limit is 300 MiB, larger than the requested 200 MiB" in refused.stderr
        assert cowfs("grow", here.path, "400", nobody=nobody).stdout.endswith("resized to 400 MiB\n")
        script(FILL.format("four", 100), here)
        assert int(script("stat -c %s four", here)) == 100 * MIB


@both
def test_files_without_names_live_on_when_the_memory_grows(base: Path, nobody: bool) -> None:
    options = ["size=500M"]  # or what is free depends on the machine's memory, of which others take some
    with (
        mounted(base / "lower", base / "mnt", "memory", nobody=nobody, options=options) as here,
        worker(here) as work,
    ):
        work("globals().update(fds=[os.open('f%d' % n, os.O_CREAT | os.O_RDWR) for n in range(300)])")
        work("[os.write(fd, b'%d' % fd) for fd in fds]")
        work("[os.unlink('f%d' % n) for n in range(300)]")
        before = room(here)
        script(FILL.format("fill", 300), here)
        assert int(script("stat -c %s fill", here)) == 300 * MIB
        assert work("[os.pread(fd, 9, 0) == b'%d' % fd for fd in fds].count(True)") == 300
        work("[os.write(fd, b'+') for fd in fds]")
        assert work("{os.fstat(fd).st_nlink for fd in fds}") == {0}
        work("[os.close(fd) for fd in fds]")
        script("rm fill", here)
        assert abs(room(here)[1] - before[1]) < 16 * MIB


def test_a_large_file_is_copied_up_into_a_small_memory(base: Path) -> None:
    with (base / "lower/huge").open("wb") as huge:
        for number in range(200):
            huge.write(bytes([number]) * MIB)
    (base / "lower/huge").chmod(0o666)
    with mounted(base / "lower", base / "mnt", "memory", nobody=True) as here:
        script("printf end >> huge", here)
        script("head -c 209715200 huge | cmp - " + str(base / "lower/huge"), here)


def test_what_no_room_would_help_takes_none(base: Path) -> None:
    """ext3 has one block for an inode's attributes: that is ENOSPC too."""
    with mounted(base / "lower", base / "mnt", "memory", nobody=True) as here, worker(here) as work:
        work("os.close(os.open('x', os.O_CREAT | os.O_RDWR))")
        assert work("os.setxattr('x', 'user.a', b'a' * 8000)") == -28
        assert int(os.stat(memory_of(here)).st_size) == 128 * MIB


def memory_of(here: Mounted) -> Path:
    fds = Path(f"/proc/{here.pid()}/fd").iterdir()
    return next(fd for fd in fds if "memfd:cowfs-store" in os.readlink(fd))


# --- images


@both
@pytest.mark.parametrize("by", ["store", "mountpoint"])
def test_an_image_grows_under_its_users(base: Path, nobody: bool, by: str) -> None:
    store = base / "s"
    cowfs("create", store, "100", nobody=nobody, check=True)
    with mounted(base / "lower", base / "mnt", store, nobody=nobody) as here, worker(here) as work:
        work("os.mkdir('gone')")
        fds = [
            work("os.open('here', os.O_CREAT | os.O_RDWR)"),
            work("os.open('nameless', os.O_CREAT | os.O_RDWR)"),
        ]
        gone = work("os.open('gone', os.O_RDONLY)")
        work("[os.unlink('nameless'), os.rmdir('gone')]")
        with worker(here) as other:
            other.begin("os.open('big', os.O_WRONLY)")  # copied up meanwhile
            done = cowfs("grow", {"store": store, "mountpoint": here.path}[by], "300", nobody=nobody)
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout.endswith("resized to 300 MiB\n")
            assert other.end() > 0
        assert store.stat().st_size == 300 * MIB <= store.stat().st_blocks * 512
        for fd in fds:
            assert work(f"os.write({fd}, b'after')") == 5
        assert work(f"os.listdir({gone})") == []
        script(f"cmp big {base}/lower/big", here)
        script(FILL.format("fill", 200), here)
        assert int(script("stat -c %s fill", here)) == 200 * MIB
        refused = cowfs("grow", store, "200", nobody=nobody)
        assert (refused.returncode, "a store can only grow" in refused.stderr) == (32, True)
        assert cowfs("grow", store, "300", nobody=nobody).returncode == 0, "it has that already"
    run("e2fsck", "-fn", store)
    assert cowfs("check", "-n", store, nobody=nobody).returncode == 0
    with mounted(base / "lower", base / "mnt", store, nobody=nobody) as here:
        assert script("cat here", here) == "after"
        script(f"cmp big {base}/lower/big", here)


@needs_root
def test_an_image_that_cannot_grow_goes_on(base: Path, tmp_path: Path) -> None:
    run("mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", tmp_path)
    try:
        store = tmp_path / "s"
        cowfs("create", store, "32", check=True)
        with mounted(base / "lower", base / "mnt", store) as here:
            done = cowfs("grow", here.path, "64")
            assert (done.returncode, "needs 32 MiB more, but only 16 MiB are free" in done.stderr) == (
                32,
                True,
            )
            assert store.stat().st_size == 32 * MIB
            script("echo x > x", here)
        with mounted(base / "lower", base / "mnt", store, engine="kernel") as here:
            done = cowfs("grow", here.path, "40")
            assert (done.returncode, "cannot grow while the kernel has it" in done.stderr) == (32, True)
            assert "unmount it first" in cowfs("grow", store, "40").stderr
        assert cowfs("grow", store, "40").returncode == 0
    finally:
        run("umount", tmp_path)


@pytest.mark.parametrize("program", ["e2fsck", "resize2fs"])
def test_a_program_that_fails(tmp_path: Path, program: str) -> None:
    from cowfs.errors import StoreError
    from cowfs.store.offline.grow import grow_open_store

    def grow() -> None:
        for step in grow_open_store(store, 64 * MIB):
            if not isinstance(step, str):
                step()

    cowfs("create", tmp_path / "s", "32", check=True)
    store = open_store(str(tmp_path / "s"))
    failing = {program: "echo no luck >&2; exit 8"}
    with replaced(tmp_path / "bin", **failing), pytest.raises(StoreError, match="no luck"):
        grow()
    assert (tmp_path / "s").stat().st_size == (32 if program == "e2fsck" else 64) * MIB
    store.layer.create(store.upper, b"x", 0o644, 0, 0)[1].close()
    grow()
    store.close()
    run("e2fsck", "-fn", tmp_path / "s")


# --- being told in time


def test_a_store_that_is_nearly_full_says_so(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cowfs("create", tmp_path / "s", "32", check=True)
    store = open_store(str(tmp_path / "s"))
    look = watch(store)
    look()
    _, file = store.layer.create(store.upper, b"x", 0o644, 0, 0)
    size = store.size * 92 // 100 - (store.size - store.free)
    file.pwrite(b"x" * size, 0)
    look()
    look()
    wanted = f"{tmp_path}/s: 92 % full; cowfs grow {tmp_path}/s SIZE makes it larger"
    assert [record.getMessage() for record in caplog.records] == [wanted]
    file.truncate(size // 2)
    store.layer.sync()
    look()
    file.pwrite(b"x" * size, 0)
    look()
    assert len(caplog.records) == 2
    file.close()
    store.close()
    said = cowfs("info", tmp_path / "s", check=True).stdout
    assert "SIZE makes it larger" in said and "hint:" in said
    with mounted(base / "lower", base / "mnt", tmp_path / "s") as here:
        assert f"92 % full; cowfs grow {tmp_path}/s SIZE" in cowfs("info", here.path, check=True).stdout
