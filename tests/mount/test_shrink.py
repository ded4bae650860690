"""`cowfs shrink` and `trim`: a smaller store, and one that gives its disk back what is free in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mount.test_export import script, seen
from tests.support.mounts import cowfs, eventually, mounted, project_root
from tests.support.system import needs_fuse, needs_root, run
from tests.support.tree import differences

DEV_FUSE_AT_NIGHT = True

pytestmark = [needs_fuse, needs_root]

MIB = 1 << 20


def taken(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_a_store_gives_back_what_is_free(tmp_path: Path) -> None:
    lower, mnt, store = tmp_path / "lower", tmp_path / "mnt", tmp_path / "store.bs"
    script("mkdir lower; echo a >lower/a", tmp_path)
    cowfs("create", store, "64", check=True)
    store.chmod(0o640)
    with mounted(lower, mnt, store):
        script("head -c 20M /dev/urandom >big; cp big kept; echo b >>a; sync", mnt)
        unnamed = os.open(mnt / "unnamed", os.O_CREAT | os.O_RDWR)
        os.write(unnamed, b"still there")
        os.unlink(mnt / "unnamed")
        assert taken(store) >= 64 * MIB
        (mnt / "big").unlink()

        def is_trimmed() -> bool:  # not before the kernel has forgotten the file
            done = cowfs("trim", mnt)
            assert (done.returncode, "freed on the disk" in done.stdout) == (0, True)
            return 20 * MIB < taken(store) < 34 * MIB

        eventually(is_trimmed, "a deleted file's blocks are given back")
        assert os.pread(unnamed, 20, 0) == b"still there"
        os.close(unnamed)
        before = seen(mnt)
        refused = cowfs("shrink", store)
        assert (refused.returncode, "is mounted" in refused.stderr) == (32, True)
    refused = cowfs("shrink", store, "20")
    assert (refused.returncode, "needs" in refused.stderr) == (32, True)
    assert cowfs("shrink", store, "80").returncode == 1
    assert cowfs("shrink", store, "8").returncode == 1
    assert (cowfs("shrink", store, "48").returncode, store.stat().st_size) == (0, 48 * MIB)
    assert store.stat().st_mode & 0o777 == 0o640
    with mounted(lower, mnt, store):
        assert differences(before, seen(mnt)) == []
        full = taken(store)
        (mnt / "kept").unlink()
        root = os.open(mnt, os.O_RDONLY)

        def is_given_back() -> bool:
            os.fsync(root)  # a commit; a large file is freed in several
            return taken(store) < full - 19 * MIB

        eventually(is_given_back, "a sparse store gives back what is deleted", 30)
        os.close(root)
    assert cowfs("shrink", store).returncode == 0
    assert store.stat().st_size <= 17 * MIB
    run("/sbin/e2fsck", "-fn", store)
    assert cowfs("trim", store).returncode == 0
    assert taken(store) < 8 * MIB
    with mounted(lower, mnt, store):
        assert (mnt / "a").read_text() == "a\nb\n"
        script("echo c >>a", mnt)


KILLED = """
import os, signal, sys
from functools import partial
from cowfs.exports.target import new_file
from cowfs.store.e2fsprogs import tools
from cowfs.store.offline.shrink import shrink_store
left = int(sys.argv[3])
def counted(call):
    def counting(*arguments, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **named)
    return counting
for place, name in ((os, "fsync"), (os, "ftruncate"), (os, "link"), (os, "rename"), (tools, "run")):
    setattr(place, name, counted(getattr(place, name)))
shrink_store(sys.argv[1], int(sys.argv[2]), partial(new_file, force=True))
"""


def test_directories_keep_their_times(tmp_path: Path) -> None:
    """Also those whose files are where the image ends, and get other numbers."""
    lower, mnt, store = tmp_path / "lower", tmp_path / "mnt", tmp_path / "store.bs"
    lower.mkdir()
    run("mke2fs", "-q", "-t", "ext3", "-b", "1024", "-N", "256", store, "64M")
    with mounted(lower, mnt, store):
        script("mkdir a fill; (cd fill && touch $(seq 190)); touch a/f a/g; rm -r fill", mnt)
        script("touch -d '2001-02-03 04:05:06.789012345' a .", mnt)
        before = seen(mnt)
    cowfs("shrink", store, "24", check=True)
    assert cowfs("check", "-n", store).returncode == 0
    with mounted(lower, mnt, store):
        assert differences(before, seen(mnt)) == []


@pytest.mark.nightly
def test_killed_it_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    lower, mnt, store = tmp_path / "lower", tmp_path / "mnt", tmp_path / "store.bs"
    lower.mkdir()
    cowfs("create", store, "64", check=True)
    with mounted(lower, mnt, store):
        script("head -c 10M /dev/urandom >data", mnt)
        before = seen(mnt)
    size, number, sizes = 60 * MIB, 0, {64 * MIB}
    while True:
        number += 1
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(store), str(size), str(number)],
            env={**os.environ, "PYTHONPATH": project_root()},
            check=False,
        )
        sizes.add(store.stat().st_size)
        assert cowfs("check", "-n", store).returncode == 0
        with mounted(lower, mnt, store):
            assert differences(before, seen(mnt)) == []
        if store.stat().st_size == size:
            break
        assert done.returncode == -signal.SIGKILL
    assert (number > 8, sizes) == (True, {64 * MIB, size})
    assert sorted(path.name for path in tmp_path.iterdir() if "store" in path.name) == ["store.bs"]


@pytest.mark.nightly
def test_a_store_in_memory_gives_memory_back(tmp_path: Path) -> None:
    (tmp_path / "lower").mkdir()
    mnt = tmp_path / "mnt"
    with mounted(tmp_path / "lower", mnt):
        script("head -c 30M /dev/urandom >big; sync; rm big; sync; echo kept >kept", mnt)
        done = cowfs("trim", mnt)
        assert done.returncode == 0
        assert float(done.stdout.rpartition(": ")[2].split()[0]) >= 25
        assert (mnt / "kept").read_text() == "kept\n"
