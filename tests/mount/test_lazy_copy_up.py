"""A large file is written to at once, and copied up bit by bit."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import random
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import ext3, tree
from tests.support.mounts import KERNEL_OPTIONS, Mounted, cowfs, eventually, mounted
from tests.support.system import NOBODY, as_nobody_prefix, needs_fuse, needs_root, run
from tests.support.tree import Node

DEV_FUSE_AT_NIGHT = True
pytestmark = [needs_fuse, needs_root]

MIB = 1 << 20
BIG = (
    b"".join(number.to_bytes(8, "big") + random.Random(7).randbytes(MIB - 8) for number in range(66))
    + b"tail"
)
AT = 33 * MIB + 5
CHANGED = BIG[:AT] + b"X" + BIG[AT + 1 :]
DIGEST = hashlib.sha256(CHANGED).hexdigest()
T0 = 1_500_000_000
DIFF = "M  big  (content, times)\n"
CHANGE = f"""
import os, sys
reader = os.open(sys.argv[1], os.O_RDONLY)
fd = os.open(sys.argv[1], os.O_RDWR)
os.pwrite(fd, b"X", {AT})
os.fsync(fd)
assert os.pread(reader, 1, {AT}) == b"X"
"""
READ = """
import hashlib, sys
with open(sys.argv[1], "rb") as file:
    print(hashlib.file_digest(file, "sha256").hexdigest())
"""


class Place:
    """A lower with a large file, and a store."""

    def __init__(self, base: Path, *, image: bool = False, size: str = "160", nobody: bool = False) -> None:
        self.base = base
        self.nobody = nobody
        uid = NOBODY if nobody else 0
        big = Node(data=BIG, mode=0o644, uid=uid, gid=uid, mtime_ns=T0 * 10**9)
        tree.build(base / "lower", {"big": big, "small": b"small", "dir/other": b"other"})
        self.lower = base / "lower"
        if image:
            self.lower = base / "root.sqsh"
            run("mksquashfs", base / "lower", self.lower, "-quiet", "-no-progress", "-comp", "lzo")
        self.store = base / "store.bs"
        if nobody:
            run("chown", "-R", f"{NOBODY}:{NOBODY}", base)
        cowfs("create", self.store, size, nobody=nobody, check=True)

    @contextmanager
    def mounted(self, engine: str | None = None) -> Iterator[Mounted]:
        with mounted(self.lower, self.base / "mnt", self.store, nobody=self.nobody, engine=engine) as mount:
            yield mount

    def in_the_store(self, path: str = "big") -> os.stat_result:
        """The file in upper/, of a store that is not mounted, and e2fsck is content with."""
        with ext3.mounted(self.store, "ro") as layer:
            return os.lstat(f"/proc/self/fd/{layer.root.fd}/upper/{path}")

    def info(self, mount: Mounted) -> Any:
        return json.loads(cowfs("info", mount.path, "--json", nobody=self.nobody, check=True).stdout)

    def do(self, mount: Mounted, code: str) -> str:
        """Let the owner of the mount run some Python: nobody else may enter it."""
        prefix = as_nobody_prefix() if self.nobody else []
        return run(*prefix, sys.executable, "-S", "-c", code, mount.path / "big").stdout

    def digest(self, mount: Mounted) -> str:
        return self.do(mount, READ).strip()

    def becomes_whole(self, mount: Mounted) -> None:
        eventually(lambda: self.info(mount)["partial"] == {"files": 0, "bytes": 0}, "all is copied up", 60)


def change_a_byte(path: Path) -> None:
    with open(path, "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"X", AT)
        os.fsync(file.fileno())


@pytest.mark.parametrize(
    "nobody", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["root", "nobody"]
)
def test_what_is_written_is_copied_and_the_rest_after_it(
    tmp_path: Path, nobody_path: Path, nobody: bool
) -> None:
    """A byte costs a block; the next mount goes on; the kernel refuses the file until it is whole."""
    place = Place(nobody_path if nobody else tmp_path, image=True, nobody=nobody)
    with place.mounted() as mount:
        place.do(mount, CHANGE)
        missing = place.info(mount)["partial"]
        assert missing["files"] == 1
        assert missing["bytes"] > len(BIG) - MIB, "next to nothing has been copied"
        assert place.digest(mount) == DIGEST
        assert "1 file is partly copied up" in cowfs("info", mount.path, nobody=nobody, check=True).stdout
        assert cowfs("diff", mount.path, nobody=nobody).stdout == DIFF
    ext3.sound(place.store)
    before = place.in_the_store()
    assert before.st_size == len(BIG)
    assert before.st_blocks * 512 < MIB, "a few blocks, and those of pointers"
    assert cowfs("check", "-n", place.store).returncode == 0
    assert "1 file is partly copied up" in cowfs("info", place.store, check=True).stdout
    assert cowfs("diff", place.store).stdout == DIFF
    refused_by_the_kernel(place)
    with place.mounted() as mount:
        place.becomes_whole(mount)
        assert place.digest(mount) == DIGEST
    ext3.sound(place.store)
    after = place.in_the_store()
    assert after.st_blocks * 512 >= len(BIG)
    assert after.st_mtime_ns == before.st_mtime_ns, "to copy is not to write"
    assert cowfs("diff", place.store).stdout == DIFF
    with over_the_kernel(place, KERNEL_OPTIONS) as merged:
        assert (merged / "big").read_bytes() == CHANGED


@contextmanager
def over_the_kernel(place: Place, options: str) -> Iterator[Path]:
    """The kernel's overlayfs on the store."""
    at, merged = place.base / "at", place.base / "merged"
    at.mkdir(exist_ok=True)
    merged.mkdir(exist_ok=True)
    run("mount", "-o", "loop", place.store, at)
    try:
        lower = place.base / "lower"
        options = f"lowerdir={lower},upperdir={at}/upper,workdir={at}/work,{options}"
        run("mount", "-t", "overlay", "overlay", merged, "-o", options)
        try:
            yield merged
        finally:
            run("umount", merged)
    finally:
        run("umount", at)


def refused_by_the_kernel(place: Place) -> None:
    copy = Place.__new__(Place)
    copy.base, copy.store = place.base, place.base / "copy"
    run("cp", place.store, copy.store)
    for options in (KERNEL_OPTIONS, "metacopy=off", "redirect_dir=on,metacopy=off", "redirect_dir=nofollow"):
        with over_the_kernel(copy, options) as merged:
            with pytest.raises(OSError) as caught:
                os.open(merged / "big", os.O_RDONLY)
            assert caught.value.errno in {errno.EIO, errno.EPERM, errno.EINVAL}
            with pytest.raises(OSError):
                (merged / "big").write_bytes(b"in its place")
            assert (merged / "small").read_bytes() == b"small"
            assert (merged / "dir/other").read_bytes() == b"other"


def test_a_store_with_less_room_than_the_file(tmp_path: Path) -> None:
    """Writes get space or ENOSPC; the copy in the background takes no space that others need."""
    place = Place(tmp_path, size="48")
    with place.mounted() as mount:
        change_a_byte(mount.path / "big")
        (mount.path / "small").write_bytes(b"others " * MIB)
        assert place.info(mount)["partial"]["files"] == 1
        with open(mount.path / "big", "r+b", buffering=0) as file:
            with pytest.raises(OSError) as caught:
                for number in range(66):
                    os.pwrite(file.fileno(), bytes(MIB), number * MIB)
            assert caught.value.errno == errno.ENOSPC
            written = number
            os.pwrite(file.fileno(), b"in place", 3)
            assert os.pread(file.fileno(), MIB, 65 * MIB) == BIG[65 * MIB : 66 * MIB]
        assert written > 20
        with pytest.raises(OSError, match="No space"):
            os.link(mount.path / "big", mount.path / "linked")
        os.unlink(mount.path / "big")
    ext3.sound(place.store)


def test_all_that_can_be_done_to_it(tmp_path: Path) -> None:
    """Renamed, chmodded, mapped, appended to, linked, truncated, removed: as any other file."""
    place = Place(tmp_path)
    model = bytearray(BIG)
    with place.mounted() as mount:
        big = mount.path / "big"
        ino = os.stat(big).st_ino
        with open(big, "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"first", 10)
            os.chmod(big, 0o4755)
            os.rename(big, mount.path / "dir/moved")
            os.rename(mount.path / "dir", mount.path / "folder")
            with mmap.mmap(file.fileno(), 0) as pages:
                pages[20 * MIB - 3 : 20 * MIB + 3] = b"mapped"
                pages.flush()
            os.pwrite(file.fileno(), b"appended", len(BIG) + 9000)
        model[10:15] = b"first"
        model[20 * MIB - 3 : 20 * MIB + 3] = b"mapped"
        model += bytes(9000) + b"appended"
        assert (mount.path / "folder/moved").read_bytes() == model
        assert place.info(mount)["partial"]["files"] == 1
    assert "R  dir/ -> folder/\nR  big -> folder/moved" in cowfs("diff", place.store).stdout
    with place.mounted() as mount:
        moved = mount.path / "folder/moved"
        assert os.stat(moved).st_ino == ino
        assert stat.S_IMODE(os.stat(moved).st_mode) == 0o4755
        assert moved.read_bytes() == model
        direct = os.open(moved, os.O_RDWR | os.O_DIRECT)
        pages = mmap.mmap(-1, 4096)
        assert os.preadv(direct, [pages], 30 * MIB) == 4096
        assert pages[:] == model[30 * MIB : 30 * MIB + 4096]
        os.close(direct)
        os.truncate(moved, 50 * MIB + 1)
        os.truncate(moved, 60 * MIB)
        model[50 * MIB + 1 :] = bytes(10 * MIB - 1)
        assert moved.read_bytes() == model
        assert place.info(mount)["partial"]["files"] == 0, "to set a size is to copy what is left"
    ext3.sound(place.store)
    with place.mounted() as mount:
        assert (mount.path / "folder/moved").read_bytes() == model


def test_removed_and_replaced_while_it_is_not_whole(tmp_path: Path) -> None:
    """Processes that have the file open continue; the store forgets the file."""
    place = Place(tmp_path)
    with place.mounted() as mount:
        big = mount.path / "big"
        with open(big, "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"X", AT)
            (mount.path / "small").write_bytes(b"new")
            os.rename(mount.path / "small", big)
            assert os.pread(file.fileno(), 3, AT - 1) == CHANGED[AT - 1 : AT + 2]
            os.pwrite(file.fileno(), b"Y", AT + MIB)
            os.ftruncate(file.fileno(), AT + MIB + 1)
            assert os.pread(file.fileno(), 9, AT + MIB) == b"Y"
        assert big.read_bytes() == b"new"
        assert place.info(mount)["partial"] == {"files": 0, "bytes": 0}
    ext3.sound(place.store)


def test_links_are_whole(tmp_path: Path) -> None:
    """A file with two names in the lower is copied up at once, and one that gets another becomes whole."""
    place = Place(tmp_path, size="300")
    os.link(place.lower / "big", place.lower / "alias")
    with place.mounted() as mount:
        change_a_byte(mount.path / "big")
        assert place.info(mount)["partial"]["files"] == 0
        assert (mount.path / "alias").read_bytes() == CHANGED
    os.unlink(place.lower / "alias")
    cowfs("create", place.base / "other.bs", "160", check=True)
    place.store = place.base / "other.bs"
    with place.mounted() as mount:
        change_a_byte(mount.path / "big")
        os.link(mount.path / "big", mount.path / "linked")
        assert place.info(mount)["partial"]["files"] == 0
        assert (mount.path / "linked").read_bytes() == CHANGED


def test_the_kernels_engine_completes_what_it_finds(tmp_path: Path) -> None:
    """The kernel's engine reads a partial file, and completes it before anybody can write."""
    place = Place(tmp_path)
    with place.mounted() as mount:
        change_a_byte(mount.path / "big")
        os.chmod(mount.path / "big", 0o2755)
    with place.mounted("kernel") as mount:
        before = os.stat(mount.path / "big")
        assert (mount.path / "big").read_bytes() == CHANGED
        with open(mount.path / "big", "r+b", buffering=0) as file:
            assert os.fstat(file.fileno()).st_mtime_ns == before.st_mtime_ns
            assert os.pread(file.fileno(), 3, AT - 1) == CHANGED[AT - 1 : AT + 2]
            os.pwrite(file.fileno(), b"Z", 0)
    with place.mounted() as mount:
        assert (mount.path / "big").read_bytes() == b"Z" + CHANGED[1:]
        assert stat.S_IMODE(os.stat(mount.path / "big").st_mode) == 0o2755
    ext3.sound(place.store)
    assert place.in_the_store().st_blocks * 512 >= len(BIG)


def test_another_file_in_the_lower_is_refused(tmp_path: Path) -> None:
    """Data of two files would be mixed: EIO, and the log says why."""
    place = Place(tmp_path)
    with place.mounted() as mount:
        change_a_byte(mount.path / "big")
    os.utime(place.lower / "big", (T0, T0 + 1))
    with mounted(place.lower, tmp_path / "mnt2", place.store, quiet=False) as mount:
        with pytest.raises(OSError, match="Input/output"):
            os.stat(mount.path / "big")
        assert (mount.path / "small").read_bytes() == b"small"
        assert "changed in its lower" in mount.shown_log()
    os.utime(place.lower / "big", (T0, T0))
    with place.mounted() as mount:
        assert (mount.path / "big").read_bytes() == CHANGED


def test_kept_and_grown_while_it_is_not_whole(tmp_path: Path) -> None:
    """A store in memory copies only what is written; after persist and grow, the file becomes complete."""
    place = Place(tmp_path, image=True)
    place.store = tmp_path / "kept.bs"
    with mounted(place.lower, tmp_path / "memory", "memory", quiet=False) as mount:
        change_a_byte(mount.path / "big")
        cowfs("persist", mount.path, place.store, check=True)
        assert place.digest(mount) == DIGEST
        assert place.info(mount)["partial"]["files"] == 1
    with place.mounted() as mount:
        eventually(lambda: place.info(mount)["partial"]["bytes"] < len(BIG) - 8 * MIB, "it goes on")
        cowfs("grow", mount.path, "320", check=True)
        place.becomes_whole(mount)
        assert place.digest(mount) == DIGEST
    ext3.sound(place.store)


def test_a_directory_has_whole_files(tmp_path: Path) -> None:
    """A store in a directory copies files up at once, since a hole there can mean anything."""
    place = Place(tmp_path)
    place.store = tmp_path / "directory"
    with place.mounted() as mount:
        change_a_byte(mount.path / "big")
        assert place.info(mount)["partial"]["files"] == 0
    assert (place.store / "upper/big").read_bytes() == CHANGED
