"""Files that the kernel opens without asking: used by the inode, copied up when first written to."""

from __future__ import annotations

import errno
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounts import Mounted, cowfs, mounted
from tests.support.squashfs import needs_mksquashfs
from tests.support.system import as_nobody_prefix, needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True

pytestmark = [needs_fuse, needs_root, needs_mksquashfs]
MANY = 1300
"""More than are kept open."""
LARGE = bytes(range(256)) * 2000


@pytest.fixture
def image(nobody_path: Path) -> Path:
    """A squashfs image, and beside it a store."""
    lower = nobody_path / "lower"
    lower.mkdir()
    (lower / "file").write_text("here\n")
    (lower / "large").write_bytes(LARGE)
    (lower / "many").mkdir()
    for number in range(MANY):
        (lower / "many" / f"{number}").write_text(f"{number}\n")
    image = nobody_path / "lower.squashfs"
    run("mksquashfs", lower, image, "-quiet", "-no-progress", "-force-uid", "65534")
    assert cowfs("create", nobody_path / "s.bs", "64", nobody=True).returncode == 0
    return image


@pytest.fixture
def mount(image: Path, nobody_path: Path) -> Iterator[Mounted]:
    """Both mounted by root."""
    with mounted(image, nobody_path / "mnt", nobody_path / "s.bs") as made:
        yield made
    assert run("e2fsck", "-fn", nobody_path / "s.bs", check=False).returncode == 0


def requests(mount: Mounted) -> dict[str, int]:
    """Return how many requests of each kind came."""
    shown = json.loads(cowfs("info", mount.path, "--json", check=True).stdout)
    return {name: figures["count"] for name, figures in shown["requests"]["operations"].items()}


def changes(mount: Mounted) -> list[str]:
    """Return the lines of ``cowfs diff``."""
    return cowfs("diff", mount.path, check=True).stdout.splitlines()


def test_a_file_is_read_again_without_a_request(mount: Mounted) -> None:
    assert (mount.path / "file").read_text() == "here\n"
    before = requests(mount)
    for _ in range(10):
        assert (mount.path / "file").read_text() == "here\n"
    after = requests(mount)
    for kind in ("OPEN", "READ", "RELEASE"):
        assert after.get(kind, 0) == before.get(kind, 0), kind


def test_to_open_a_file_copies_nothing(mount: Mounted) -> None:
    with open(mount.path / "file", "r+b") as file:
        assert file.read() == b"here\n"
        assert changes(mount) == []
        file.write(b"and there\n")
        file.flush()
        assert (mount.path / "file").read_text() == "here\nand there\n"
        assert [line for line in changes(mount) if "file" in line]


def test_who_reads_sees_what_is_written(mount: Mounted) -> None:
    reader = os.open(mount.path / "large", os.O_RDONLY)
    try:
        assert os.pread(reader, 10, 100) == LARGE[100:110]
        with open(mount.path / "large", "r+b") as file:
            file.seek(103)
            file.write(b"new")
        assert os.pread(reader, 10, 100) == LARGE[100:103] + b"new" + LARGE[106:110]
        assert os.pread(reader, 10, 400_000) == LARGE[400_000:400_010]
    finally:
        os.close(reader)


@pytest.mark.parametrize("way", ["removed", "replaced"])
def test_a_file_without_a_name_is_written_to(mount: Mounted, way: str) -> None:
    file = os.open(mount.path / "large", os.O_RDWR)
    try:
        if way == "removed":
            os.unlink(mount.path / "large")
        else:
            (mount.path / "other").write_text("other")
            os.rename(mount.path / "other", mount.path / "large")
        os.pwrite(file, b"new", 3)
        os.fsync(file)
        assert os.pread(file, 10, 0) == LARGE[:3] + b"new" + LARGE[6:10]
        os.fchmod(file, 0o640)
        os.ftruncate(file, 7)
        found = os.fstat(file)
        assert (found.st_size, found.st_mode & 0o777, found.st_nlink) == (7, 0o640, 0)
    finally:
        os.close(file)
    if way == "removed":
        assert not (mount.path / "large").exists()
    else:
        assert (mount.path / "large").read_text() == "other"


def test_attributes_of_a_file_without_a_name(mount: Mounted) -> None:
    file = os.open(mount.path / "large", os.O_RDONLY)
    try:
        os.unlink(mount.path / "large")
        os.fchmod(file, 0o604)
        os.utime(file, ns=(1, 2))
        found = os.fstat(file)
        assert (found.st_mode & 0o777, found.st_mtime_ns, found.st_nlink) == (0o604, 2, 0)
        assert os.pread(file, 100, 300_000) == LARGE[300_000:300_100]
    finally:
        os.close(file)


def test_more_files_than_are_kept_open(mount: Mounted) -> None:
    opened = (
        [os.open(mount.path / "many" / f"{number}", os.O_RDWR) for number in range(MANY)] if room() else []
    )
    for _ in range(2):
        for number in range(MANY):
            assert (mount.path / "many" / f"{number}").read_text() == f"{number}\n"
    for number in range(0, MANY, 3):
        with open(mount.path / "many" / f"{number}", "a") as file:
            file.write("more\n")
    for number, fd in enumerate(opened):
        assert os.read(fd, 100) == b"%d\n" % number + (b"more\n" if number % 3 == 0 else b"")
        os.close(fd)
    for number in range(MANY):
        more = "more\n" if number % 3 == 0 else ""
        assert (mount.path / "many" / f"{number}").read_text() == f"{number}\n{more}"


def room() -> bool:
    """Whether this process may have all files open at once."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8 * MANY), hard))
    return hard > 2 * MANY


def test_truncated_at_open(mount: Mounted) -> None:
    file = os.open(mount.path / "large", os.O_WRONLY | os.O_TRUNC)
    assert os.fstat(file).st_size == 0
    os.write(file, b"short")
    os.close(file)
    assert (mount.path / "large").read_bytes() == b"short"


@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC])
def test_writes_that_wait_for_the_disk(mount: Mounted, flag: int) -> None:
    file = os.open(mount.path / "file", os.O_RDWR | flag)
    before = requests(mount).get("FSYNC", 0)
    os.pwrite(file, b"H", 0)
    os.close(file)
    assert (mount.path / "file").read_text() == "Here\n"
    assert requests(mount).get("FSYNC", 0) >= before


def test_shared_memory(mount: Mounted) -> None:
    with open(mount.path / "large", "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[5000:5003] = b"new"
        memory.flush()
    assert (mount.path / "large").read_bytes() == LARGE[:5000] + b"new" + LARGE[5003:]


def test_no_room_for_the_copy(mount: Mounted) -> None:
    """The write fails, and nothing has changed."""
    with pytest.raises(OSError, match="No space") as failure, open(mount.path / "filling", "wb") as filling:
        while True:
            filling.write(bytes(1 << 20))
    assert failure.value.errno == errno.ENOSPC
    file = os.open(mount.path / "large", os.O_RDWR)
    try:
        with pytest.raises(OSError, match="No space"):
            os.pwrite(file, b"new", 0)
    finally:
        os.close(file)
    assert (mount.path / "large").read_bytes() == LARGE
    os.unlink(mount.path / "filling")
    with open(mount.path / "large", "r+b") as again:
        again.write(b"new")
    assert (mount.path / "large").read_bytes() == b"new" + LARGE[3:]


def test_a_program_is_run_while_it_is_not_written(mount: Mounted) -> None:
    """The kernel sees to it (ETXTBSY), whoever knows of the open file."""
    program = mount.path / "program"
    program.write_text(f"#!{sys.executable}\nprint('done')\n")
    program.chmod(0o755)
    assert subprocess.run([program], capture_output=True, text=True, check=True).stdout == "done\n"
    binary = mount.path / "true"
    binary.write_bytes(Path("/bin/true").read_bytes())
    binary.chmod(0o755)
    with open(binary, "r+b"), pytest.raises(OSError, match="busy") as failure:
        subprocess.run([binary], check=False)
    assert failure.value.errno == errno.ETXTBSY
    assert subprocess.run([binary], check=False).returncode == 0


def test_for_an_ordinary_user(image: Path, nobody_path: Path) -> None:
    use = """
import os
file, large = os.open("file", os.O_RDWR), os.open("large", os.O_RDWR)
os.unlink("large")
os.pwrite(large, b"new", 0)
assert os.pread(large, 9, 0)[:3] == b"new"
os.fsync(large)
os.write(file, b"Here")
assert open("file").read() == "Here\\n"
"""
    with mounted(image, nobody_path / "mnt", nobody_path / "s.bs", nobody=True) as made:
        prefix = as_nobody_prefix()
        run(*prefix, "sh", "-c", 'cd "$1" && exec "$2" -c "$3"', "sh", made.path, sys.executable, use)
    assert run("e2fsck", "-fn", nobody_path / "s.bs", check=False).returncode == 0
