"""The disk that a store is on fills up to the last byte, in ten ways: what was acknowledged is there."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.hosts import MIB, fill, free, host, lower_and_store, sparse_copy
from tests.support.mounts import Mounted, cowfs, mounted
from tests.support.system import needs_fuse, needs_root, run
from tests.support.worker import Worker, script, worker

DEV_FUSE_AT_NIGHT = True
pytestmark = [needs_fuse, needs_root]


def on(*kinds: str) -> pytest.MarkDecorator:
    """The filesystems to be full: what differs among them is told at :func:`host`."""
    return pytest.mark.parametrize("kind", kinds)


@pytest.fixture
def base(nobody_path: Path) -> Path:
    return lower_and_store(nobody_path)


def info(what: Path) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(cowfs("info", what, "--json", check=True).stdout)
    return shown


class Files:
    """Small files, made and fsynced until that is refused: which of them are promised to be there."""

    def __init__(self, work: Worker) -> None:
        self._work = work
        self.kept: list[str] = []
        self.refused: set[int] = set()

    def make(self, names: list[str]) -> None:
        for name in names:
            fd = self._work(f"os.open({name!r}, os.O_CREAT | os.O_WRONLY)")
            if fd < 0:
                self.refused.add(-fd)
                continue
            written, synced = (
                self._work(f"os.write({fd}, {name!r}.encode() * 500)"),
                self._work(f"os.fsync({fd})"),
            )
            self._work(f"os.close({fd})")
            if written == 500 * len(name) and synced is None:
                self.kept.append(name)
            else:
                self.refused |= {-code for code in (written, synced) if code is not None and code < 0}

    def check(self, here: Mounted) -> None:
        for name in self.kept:
            content = script(f"cat -- '{name}'", here)
            assert content == name * 500, f"{name} was fsynced"


def whole(store: Path) -> None:
    """e2fsck has nothing to say about it."""
    done = run("e2fsck", "-fn", store, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("kind", "flags"), [("image", 0), ("image", os.O_DSYNC), ("directory", 0)])
def test_a_write_that_does_not_fit_says_how_much_it_wrote(base: Path, kind: str, flags: int) -> None:
    with host("ext3", base / "host", 16) as at:
        store = base / "small" if kind == "image" else at / "store"
        if kind == "image":
            cowfs("create", store, "16", check=True)
        with mounted(base / "lower", base / "mnt", store, options=["passthrough=off"]) as here:
            fd = os.open(here.path / "data", os.O_CREAT | os.O_RDWR | flags)
            try:
                written = [0]
                with pytest.raises(OSError) as caught:
                    while True:
                        written.append(os.write(fd, bytes([len(written)]) * 300_001))
                assert caught.value.errno == errno.ENOSPC
                assert len(written) > 5 and written[-1] < 300_001
                assert os.fstat(fd).st_size == sum(written)
                assert os.pread(fd, 1, sum(written) - 1) == bytes([len(written) - 1])
                os.ftruncate(fd, sum(written) - 200_000)
                with (here.path / "copy").open("wb") as copy:
                    copied = os.copy_file_range(fd, copy.fileno(), 400_000, 0)
                    assert copied == os.fstat(copy.fileno()).st_size < 400_000
            finally:
                os.close(fd)


# --- 1, 2, 3, 4: file data, somebody else's data, copy-up, names


@on("tmpfs", "ext3", "ext4")
def test_filled_by_the_mount_itself(base: Path, kind: str) -> None:
    """ENOSPC at the write; what was fsynced before and after is there, and removing something else helps."""
    with host(kind, base / "host", 48) as at:
        store = sparse_copy(base / "whole", at / "store")
        other = fill(at, 10 * MIB)
        with (
            mounted(base / "lower", base / "mnt", store, quiet=False) as here,
            worker(here) as work,
        ):
            files = Files(work)
            files.make([f"before{number}" for number in range(5)])
            fd = work("os.open('data', os.O_CREAT | os.O_WRONLY)")
            sizes = [work(f"os.write({fd}, b'd' * (128 << 10))") for _ in range(100)]
            assert -errno.ENOSPC in sizes and sum(size for size in sizes if size > 0) > MIB
            assert set(sizes) <= {128 << 10, -errno.ENOSPC} or kind != "tmpfs"
            assert work(f"os.fsync({fd})") is None, "what was written has its place"
            size = work(f"os.fstat({fd}).st_size")
            files.make([f"full{number}" for number in range(300)])
            assert files.refused <= {errno.ENOSPC}
            assert free(here.path) < 4 * MIB
            other.unlink()
            files.make([f"after{number}" for number in range(5)])
            assert files.kept[-1] == "after4"
            assert work(f"os.close({fd})") is None
        whole(store)
        with mounted(base / "lower", base / "mnt", store, quiet=False) as here:
            files.check(here)
            assert int(script("tr -d d < data | wc -c; stat -c %s data", here).split()[1]) == size
            assert script("tr -d d < data | wc -c", here).strip() == "0"


@on("tmpfs", "ext3", "ext4")
def test_filled_by_somebody_else(base: Path, kind: str) -> None:
    """Whatever is refused is refused with ENOSPC, by the call itself; the warning comes before, in info."""
    with host(kind, base / "host", 48) as at:
        store = sparse_copy(base / "whole", at / "store")
        with (
            mounted(base / "lower", base / "mnt", store, quiet=False) as here,
            worker(here) as work,
        ):
            files = Files(work)
            shown = info(here.path)["store"]
            assert shown["disk"]["missing"] > 48 * MIB and shown["disk"]["free"] == free(at)
            assert "its disk has" in shown["hint"] and "free space there" in shown["hint"]
            room = os.statvfs(here.path)
            assert abs(room.f_bavail * room.f_frsize - free(at)) < 8 * MIB, "df says what can be written"
            files.make(["before"])
            other = fill(at)
            files.make([f"full{number}" for number in range(400)])
            assert files.refused == {errno.ENOSPC}
            assert " free; the store's file may still need " in cowfs("info", here.path).stdout
            assert "before" in os.listdir(here.path) and len(files.kept) < 401
            other.unlink()
            files.make(["after"])
            assert files.kept[-1] == "after"
        whole(store)
        with mounted(base / "lower", base / "mnt", store, quiet=False) as here:
            files.check(here)


@on("ext4")
def test_filled_while_a_file_is_copied_up(base: Path, kind: str) -> None:
    """The lower's file is shown as before, and no temporary stays."""
    with host(kind, base / "host", 48) as at:
        store = sparse_copy(base / "whole", at / "store")
        other = fill(at, 5 * MIB)
        with (
            mounted(base / "lower", base / "mnt", store, quiet=False) as here,
            worker(here) as work,
        ):
            assert work("os.open('big', os.O_WRONLY | os.O_APPEND)") == -errno.ENOSPC
            run("cmp", here.path / "big", base / "lower/big")
            assert work("os.stat('big').st_nlink") == 1
            other.unlink()
            fd = work("os.open('big', os.O_WRONLY | os.O_APPEND)")
            assert work(f"os.write({fd}, b'end')") == 3
            assert work(f"os.fsync({fd})") is None
        whole(store)
        with mounted(base / "lower", base / "mnt", store, quiet=False) as here:
            assert script("tail -c 3 big", here) == "end"


STORM = r"""
import os, sys
os.chdir(sys.argv[1])
refused = 0
def listing():
    return set(os.listdir(".") + ["many/" + name for name in os.listdir("many")])
expected = listing()
def attempt(call, *names):
    global refused
    try:
        call(*names)
        return True
    except OSError as error:
        assert error.errno == 28, error
        refused += 1
        return False
for number in range(int(sys.argv[2]), int(sys.argv[3])):
    old, new, gone = f"many/{number}", f"many/moved{number}", f"many/{299 - number}"
    made = f"{number}" + "x" * 200
    if attempt(os.mkdir, made):
        expected.add(made)
    if attempt(os.rename, old, new):
        expected = expected - {old} | {new}
    if attempt(os.unlink, gone):
        expected.remove(gone)
    assert listing() == expected, number
os.fsync(os.open(".", os.O_RDONLY))
print(refused, *sorted(expected))
"""


@on("tmpfs", "ext3")
def test_filled_in_a_storm_of_names(base: Path, kind: str) -> None:
    """mkdir, rename and unlink write no data: each of them is refused, or is there."""
    with host(kind, base / "host", 48) as at:
        store = sparse_copy(base / "whole", at / "store")
        with mounted(base / "lower", base / "mnt", store, quiet=False) as here:
            other = fill(at, 64 << 10)
            command: list[str | Path] = [sys.executable, "-c", STORM, here.path]
            refused, *_ = run(*command, "0", "120").stdout.split()
            assert int(refused) > 50
            other.unlink()
            refused, *names = run(*command, "120", "140").stdout.split()
            assert refused == "0"
        whole(store)
        with mounted(base / "lower", base / "mnt", store, quiet=False) as here:
            shown = os.listdir(here.path) + [f"many/{name}" for name in os.listdir(here.path / "many")]
            assert sorted(shown) == names


@on("tmpfs", "ext3")
def test_full_already(base: Path, kind: str) -> None:
    """A store whose journal has no room is refused and left alone; so is one that cannot be used for that."""
    with host(kind, base / "host", 48) as at:
        store = sparse_copy(base / "whole", at / "store")
        other = fill(at)
        before = store.read_bytes()
        (base / "mnt").mkdir()
        command: list[str | Path] = ["mount", base / "lower", base / "mnt", "--store", store]
        refused = cowfs(*command)
        assert refused.returncode == 32
        assert (
            "its disk has no space for the journal" in refused.stderr and "free space there" in refused.stderr
        )
        assert store.read_bytes() == before
        os.truncate(other, other.stat().st_size - 4 * MIB)
        refused = cowfs(*command)
        assert refused.returncode in {0, 32}
        if refused.returncode:
            assert "space" in refused.stderr and "Traceback" not in refused.stderr
        else:
            cowfs("umount", base / "mnt", check=True)
        other.unlink()
        with mounted(base / "lower", base / "mnt", store, quiet=False) as here:
            (here.path / "file").write_text("content")
        whole(store)


def test_a_limit_is_told_by_the_calls(base: Path) -> None:
    """With a limit such as ulimit -f or a quota, nothing is acknowledged that cannot be written."""
    with mounted(base / "lower", base / "mnt", base / "whole", quiet=False) as here, worker(here) as work:
        run("prlimit", f"--pid={here.pid()}", "--fsize=65536:unlimited")  # its log is not so long
        assert work("os.mkdir('lost')") == -errno.EFBIG
        assert work("os.open('data', os.O_CREAT | os.O_WRONLY)") == -errno.EFBIG
        assert set(work("os.listdir('.')")) == {"big", "many"}
        run("prlimit", f"--pid={here.pid()}", "--fsize=unlimited")
        assert work("os.mkdir('made')") is None
    whole(base / "whole")


# --- 10: the kernel's engine, directories, persist


@on("tmpfs", "ext3")
def test_the_kernel_gets_a_store_that_cannot_run_out_of_its_disk(base: Path, kind: str) -> None:
    """A sparse store gets its blocks first: the kernel would lose what it cannot write, without an error."""
    with host(kind, base / "host", 128) as at:
        store = sparse_copy(base / "whole", at / "store")
        other = fill(at, 40 * MIB)
        (base / "mnt").mkdir()
        refused = cowfs("mount", base / "lower", base / "mnt", "--store", store, "--engine", "kernel")
        assert refused.returncode == 32
        assert "free space there" in refused.stderr and "--engine process" in refused.stderr
        assert free(at) > 30 * MIB, "none was taken"
        other.unlink()
        with (
            mounted(base / "lower", base / "mnt", store, engine="kernel", quiet=False) as here,
            worker(here) as work,
        ):
            fill(at)
            assert free(at) < 8192
            files = Files(work)
            files.make([f"name{number}" for number in range(50)])
            assert len(files.kept) == 50
            assert info(here.path)["store"]["disk"] == {"free": free(at), "missing": 0}
            fd = work("os.open('data', os.O_CREAT | os.O_WRONLY)")
            sizes = [work(f"os.write({fd}, b'd' * (1 << 20))") for _ in range(100)]
            assert -errno.ENOSPC in sizes and sizes.count(MIB) > 70, "the store's own end, not the disk's"
            assert work(f"os.fsync({fd})") is None
        whole(store)
        with mounted(base / "lower", base / "mnt", store, quiet=False) as here:
            files.check(here)


@on("ext4")
def test_a_directory_store_says_it_itself(base: Path, kind: str) -> None:
    with host(kind, base / "host", 48) as at:
        with mounted(base / "lower", base / "mnt", at / "dir", quiet=False) as here, worker(here) as work:
            files = Files(work)
            files.make(["before"])
            other = fill(at)
            assert "its disk has" in info(here.path)["store"]["hint"]
            fd = work("os.open('before', os.O_WRONLY | os.O_APPEND)")
            assert -errno.ENOSPC in [work(f"os.write({fd}, b'd' * 8192)") for _ in range(40)]
            assert work("os.open('big', os.O_WRONLY | os.O_APPEND)") == -errno.ENOSPC
            run("cmp", here.path / "big", base / "lower/big")
            other.unlink()
            files.make(["after"])
            assert files.kept[-1] == "after"
            files.kept.remove("before")  # it has got more since
        with mounted(base / "lower", base / "mnt", at / "dir", quiet=False) as here:
            files.check(here)


@on("tmpfs", "ext3")
def test_persist_into_a_disk_that_fills_up(base: Path, kind: str) -> None:
    """No file, the changes in memory as before; and then, with room, all is kept."""
    with (
        host(kind, base / "host", 200) as at,
        mounted(base / "lower", base / "mnt", "memory", quiet=False) as here,
    ):
        (here.path / "file").write_text("content")
        script("dd if=/dev/urandom of=data bs=1M count=60 status=none", here)
        other = fill(at, 100 * MIB)
        refused = cowfs("persist", here.path, at / "kept.bs")
        assert refused.returncode == 32 and "MiB more, but only" in refused.stderr
        assert set(os.listdir(at)) - {"lost+found"} == {"ballast"}
        assert free(at) > 90 * MIB
        (here.path / "file").write_text("more")
        other.unlink()
        cowfs("persist", here.path, at / "kept.bs", check=True)
        fill(at)
        (here.path / "later").write_text("later")
        script("sync -d later file data", here)
        assert info(here.path)["store"]["disk"]["free"] < 8192
        here.umount()
        whole(at / "kept.bs")
        with mounted(base / "lower", base / "mnt", at / "kept.bs", quiet=False) as here:
            assert (here.path / "file").read_text() == "more" and (here.path / "later").read_text() == "later"


def test_grow_under_users_into_a_disk_that_is_full(base: Path) -> None:
    """Nothing is lost, nothing is left of it, and the mount goes on."""
    with host("tmpfs", base / "host", 160) as at:
        store = at / "store"
        run("cp", "--sparse=never", base / "whole", store)
        with mounted(base / "lower", base / "mnt", store, quiet=False) as here:
            (here.path / "before").write_text("before")
            refused = cowfs("grow", here.path, "200")
            assert refused.returncode == 32 and "MiB more, but only" in refused.stderr
            run("prlimit", f"--pid={here.pid()}", f"--fsize={110 << 20}:unlimited")
            refused = cowfs("grow", here.path, "120")
            assert refused.returncode == 32 and "MiB: File too large" in refused.stderr
            assert store.stat().st_size == 96 * MIB
            (here.path / "after").write_text("after")
            run("prlimit", f"--pid={here.pid()}", "--fsize=unlimited")
            cowfs("grow", here.path, "120", check=True)
        whole(store)
        with mounted(base / "lower", base / "mnt", store, quiet=False) as here:
            assert (here.path / "before").read_text() == "before"
            assert (here.path / "after").read_text() == "after"
