"""Requests without handlers in pyfuse3: fallocate, copy_file_range, chattr, birth times."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cowfs.linux import files, inode_flags
from tests.support.mounts import Mounted, cowfs, mounted
from tests.support.squashfs import needs_mksquashfs
from tests.support.system import needs_fuse, needs_root, run

pytestmark = [needs_fuse, needs_root, needs_mksquashfs]
DEV_FUSE_AT_NIGHT = True
DATA = bytes(range(256)) * 2000
KINDS = {
    "image": ("s.bs", None),  # with a squashfs below: the kernel opens files by itself
    "kernel": ("s.bs", "kernel"),
    "directory": ("store", None),
    "memory": (None, None),
}


class Place:
    """Layers, and a mount of them, which can be made anew."""

    def __init__(self, path: Path, kind: str) -> None:
        self.kind = kind
        self._path = path
        store, self._engine = KINDS[kind]
        self._store = None if store is None else path / store
        lower = path / "lower"
        lower.mkdir()
        (lower / "file").write_bytes(DATA)
        (lower / "set-id").write_bytes(DATA)
        (lower / "set-id").chmod(0o4755)
        (lower / "large").write_bytes(b"begin")
        os.truncate(lower / "large", 80 << 20)
        with (lower / "large").open("r+b") as large:
            large.seek(79 << 20)
            large.write(DATA)
        (lower / "directory").mkdir()
        self._lower = lower
        if kind != "directory":
            self._lower = path / "lower.squashfs"
            run("mksquashfs", lower, self._lower, "-quiet", "-no-progress")
        if store == "s.bs":
            cowfs("create", self._store or "", "64", check=True)

    @contextmanager
    def mounted(self) -> Iterator[Mounted]:
        with mounted(self._lower, self._path / "mnt", self._store, engine=self._engine) as mount:
            yield mount

    def check(self) -> None:
        if self._store is not None and self._store.is_file():
            done = run("e2fsck", "-fn", self._store, check=False)
            assert done.returncode == 0, done.stdout


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path, request.param)
    yield made
    made.check()


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path, "image")
    yield made
    made.check()


def errno_of(call: object, *arguments: object) -> int:
    assert callable(call)
    try:
        call(*arguments)
    except OSError as failure:
        return failure.errno or 0
    return 0


def requests(mount: Mounted) -> dict[str, int]:
    """Return how many requests of each kind have succeeded."""
    shown = json.loads(cowfs("info", mount.path, "--json", check=True).stdout)
    return {name: said["count"] - said["errors"] for name, said in shown["requests"]["operations"].items()}


def lsattr(path: Path) -> str:
    return run("lsattr", "-d", path).stdout.split()[0].replace("-", "").replace("e", "")


def birth(path: Path) -> int | None:
    with path.open("rb") as file:
        return inode_flags.birth(file.fileno())


def test_chattr(place: Place) -> None:
    """Set flags of a lower file, a lower directory and a new file; the kernel checks permissions."""
    with place.mounted() as mount:
        (mount.path / "new").touch()
        for name in ("file", "directory", "new"):
            path = mount.path / name
            assert lsattr(path) == ""
            run("chattr", "+Ad", path)
            assert lsattr(path) == "dA", name
            run("chattr", "-A", path)
            assert lsattr(path) == "d", name
            refused = run(
                "setpriv",
                "--reuid=65534",
                "--regid=65534",
                "--clear-groups",
                "chattr",
                "+A",
                path,
                check=False,
            )
            assert refused.returncode != 0
        assert (mount.path / "file").read_bytes() == DATA
        if place.kind != "memory":
            run("lsattr", "-v", mount.path / "new")
    if place.kind == "memory":
        return
    with place.mounted() as mount:
        assert [lsattr(mount.path / name) for name in ("file", "directory", "new")] == ["d"] * 3


def test_extended_flags(place: Place) -> None:
    """As on ext3, FS_IOC_FSSETXATTR ignores what the filesystem does not have."""
    with place.mounted() as mount:
        (mount.path / "new").touch()
        for path in (mount.path / "new", mount.path / "file", mount.path / "directory"):
            fd = os.open(path, os.O_RDONLY)
            realtime, nodump, nosymlinks = 0x1, 0x80, 0x400
            for flags, size in ((realtime | nodump, 0), (nosymlinks | nodump, 4096), (0, 0)):
                fcntl.ioctl(fd, inode_flags.FS_IOC_FSSETXATTR, struct.pack("=IIIII8x", flags, size, 0, 0, 0))
                found = fcntl.ioctl(fd, inode_flags.FS_IOC_FSGETXATTR, bytes(28))
                assert struct.unpack("=IIIII8x", found) == (flags & nodump, 0, 0, 0, 0)
            with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
                fcntl.ioctl(fd, inode_flags.FS_IOC_FSSETXATTR, struct.pack("=IIIII8x", 0, 0, 0, 7, 0))
            os.close(fd)


def test_no_time_goes_back(place: Place) -> None:
    """utime(2) to now sets no time before that of an earlier change."""
    with place.mounted() as mount:
        for number in range(20):
            for path in (mount.path / f"new{number}", mount.path):
                path.touch()  # creates the file
                before = path.stat()
                os.utime(path)
                after = path.stat()
                assert after.st_mtime_ns >= before.st_mtime_ns, path
                assert after.st_ctime_ns >= before.st_ctime_ns, path
            before = mount.path.stat()
            os.unlink(mount.path / f"new{number}")
            assert mount.path.stat().st_mtime_ns >= before.st_mtime_ns


def test_flags_are_inherited(image: Place) -> None:
    """Files inherit flags from the directory, even in the place of a deleted name or made without a name."""
    with image.mounted() as mount:
        run("chattr", "+dD", mount.path)
        for name in ("file", "directory"):
            run("rm", "-r", mount.path / name)
        (mount.path / "file").touch()
        (mount.path / "directory").mkdir()
        (mount.path / "new").touch()
        fd = os.open(mount.path, os.O_TMPFILE | os.O_RDWR)
        assert name_it(fd, mount.path / "unnamed") == 0
        os.close(fd)
        wanted = {"file": "d", "directory": "Dd", "new": "d", "unnamed": "d"}
        assert {name: lsattr(mount.path / name) for name in wanted} == wanted


def test_a_hole_is_punched(place: Place) -> None:
    with place.mounted() as mount:
        fd = os.open(mount.path / "file", os.O_RDWR)
        assert os.pread(fd, 4096, 8192) == DATA[8192 : 8192 + 4096]
        files.fallocate(fd, 4097, 100_000, files.PUNCH_HOLE)
        assert os.pread(fd, len(DATA), 0) == DATA[:4097] + bytes(100_000) + DATA[104_097:]
        assert os.fstat(fd).st_size == len(DATA)
        assert os.fstat(fd).st_blocks * 512 < len(DATA) - 80_000
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 8192
        os.close(fd)


def test_blocks_are_allocated_as_the_store_can(place: Place) -> None:
    """ext3 cannot: EOPNOTSUPP, and posix_fallocate(3) writes zeros itself."""
    with place.mounted() as mount:
        fd = os.open(mount.path / "new", os.O_RDWR | os.O_CREAT)
        failure = errno_of(files.fallocate, fd, 0, 20_000)
        if place.kind in {"image", "kernel"}:
            assert failure == errno.EOPNOTSUPP
        os.posix_fallocate(fd, 0, 30_000)
        assert os.fstat(fd).st_size == 30_000
        assert os.fstat(fd).st_blocks * 512 >= 30_000
        assert os.pread(fd, 40_000, 0) == bytes(30_000)
        os.close(fd)


def test_ranges_are_copied(place: Place) -> None:
    """Copy from the lower, to the lower and within a file, with one request that only the store serves."""
    with place.mounted() as mount:
        source = os.open(mount.path / "file", os.O_RDONLY)
        target = os.open(mount.path / "new", os.O_RDWR | os.O_CREAT)
        assert os.copy_file_range(source, target, 100_000, 1000, 5) == 100_000
        assert os.pread(target, len(DATA), 0) == bytes(5) + DATA[1000:101_000]
        assert os.copy_file_range(source, target, 1 << 20, len(DATA) - 10, 0) == 10
        assert os.copy_file_range(source, target, 10, len(DATA), 0) == 0
        to_lower = os.open(mount.path / "set-id", os.O_RDWR)
        assert os.copy_file_range(target, to_lower, 10, 0, 100) == 10
        assert os.pread(to_lower, 200, 0) == DATA[:100] + DATA[-10:] + DATA[110:200]
        assert os.copy_file_range(to_lower, to_lower, 50, 0, 300) == 50
        assert os.pread(to_lower, 50, 300) == os.pread(to_lower, 50, 0)
        assert errno_of(os.copy_file_range, to_lower, to_lower, 100, 0, 50) == errno.EINVAL
        assert sum(count for name, count in requests(mount).items() if "COPY_FILE" in name) == 4
        for fd in (source, target, to_lower):
            os.close(fd)


@pytest.mark.parametrize("begun", [True, False])
def test_a_large_file_of_the_lower(image: Place, begun: bool) -> None:
    """One that is copied up bit by bit: a hole is a hole, and nothing of the lower shows in it."""
    with image.mounted() as mount:
        fd = os.open(mount.path / "large", os.O_RDWR)
        if begun:
            os.pwrite(fd, b"B", 0)
        files.fallocate(fd, 79 << 20, 200_000, files.PUNCH_HOLE)
        assert os.pread(fd, len(DATA), 79 << 20) == bytes(200_000) + DATA[200_000:]
        assert os.copy_file_range(fd, fd, 100_000, (79 << 20) + 200_000, 1 << 20) == 100_000
        assert os.pread(fd, 100_000, 1 << 20) == DATA[200_000:300_000]
        assert os.pread(fd, 6, 0) == (b"Begin\0" if begun else b"begin\0")
        os.close(fd)
    with image.mounted() as mount, (mount.path / "large").open("rb") as file:
        assert os.pread(file.fileno(), len(DATA), 79 << 20) == bytes(200_000) + DATA[200_000:]


def test_a_range_is_copied_to_a_large_file(image: Place) -> None:
    """The rest of the file stays in the lower."""
    with image.mounted() as mount:
        source, target = (os.open(mount.path / name, os.O_RDWR) for name in ("file", "large"))
        assert os.copy_file_range(source, target, 10_000, 0, (79 << 20) - 5000) == 10_000
        assert os.pread(target, 20_000, (79 << 20) - 6000) == bytes(1000) + DATA[:10_000] + DATA[5000:14_000]
        for fd in (source, target):
            os.close(fd)


def test_set_id_bits_go(nobody_path: Path) -> None:
    """Punching a hole and copying a range clear them when an ordinary user does it."""
    with Place(nobody_path, "image").mounted() as mount:
        path = mount.path / "set-id"
        copy = "import os, sys; fd = os.open(sys.argv[1], os.O_RDWR); os.copy_file_range(fd, fd, 9, 0, 99)"
        for change in (["fallocate", "-p", "-l", "4096"], [sys.executable, "-c", copy]):
            path.chmod(0o4777)
            run("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *change, path)
            assert path.stat().st_mode & 0o7777 == 0o777, change


def test_when_a_file_was_made(image: Place) -> None:
    """Whatever becomes of it, after a remount too, and for the kernel."""
    before = time.time_ns()
    with image.mounted() as mount:
        path = mount.path / "new"
        path.touch()
        born = birth(path)
        assert born is not None
        assert before - 10**9 < born < time.time_ns() + 10**9
        path.write_bytes(b"changed")
        os.utime(path, (1, 1))
        path.rename(mount.path / "directory" / "new")
        assert birth(mount.path / "directory" / "new") == born
        shown = run("stat", "-c", "%W", mount.path / "directory" / "new").stdout
        assert int(shown) == born // 10**9
        assert run("stat", "-c", "%w", mount.path / "file").stdout.strip() == "-", "a squashfs does not know"
    with image.mounted() as mount:
        assert birth(mount.path / "directory" / "new") == born


def test_what_is_unknown_is_refused(image: Place) -> None:
    """An ioctl that nobody knows, with data of its own: ENOTTY; and the mount goes on."""
    with image.mounted() as mount, (mount.path / "file").open("rb") as file:
        libc = ctypes.CDLL(None, use_errno=True)
        buffer = ctypes.create_string_buffer(8000)
        assert libc.ioctl(file.fileno(), ctypes.c_ulong(0xDF405A99), buffer) == -1
        assert ctypes.get_errno() == errno.ENOTTY
        assert file.read() == DATA


def test_programs(place: Place) -> None:
    """cp(1) asks for shared blocks and copies otherwise."""
    with place.mounted() as mount:
        for how in ("auto", "never"):
            run("cp", f"--reflink={how}", mount.path / "file", mount.path / how)
            assert (mount.path / how).read_bytes() == DATA
        refused = subprocess.run(
            ["cp", "--reflink=always", mount.path / "file", mount.path / "always"],
            capture_output=True,
            check=False,
        )
        assert refused.returncode == 1


AT_SYMLINK_FOLLOW, AT_EMPTY_PATH = 0x400, 0x1000
libc = ctypes.CDLL(None, use_errno=True)


def name_it(fd: int, path: Path, way: bytes = b"") -> int:
    """Give an open file a name; return the errno."""
    failed = libc.linkat(fd, way, -100, os.fsencode(path), AT_SYMLINK_FOLLOW if way else AT_EMPTY_PATH)
    return ctypes.get_errno() if failed else 0


def test_files_without_names(place: Place) -> None:
    """O_TMPFILE in a directory of the lower; linkat(2) gives the name that is kept, with what was written."""
    with place.mounted() as mount:
        fd = os.open(mount.path / "directory", os.O_TMPFILE | os.O_RDWR, 0o640)
        os.write(fd, DATA)
        assert os.fstat(fd).st_nlink == 0
        assert os.listdir(mount.path / "directory") == []
        (mount.path / "gone").touch()
        assert name_it(fd, mount.path / "gone") == errno.EEXIST
        (mount.path / "set-id").unlink()
        assert name_it(fd, mount.path / "set-id") == 0
        assert name_it(fd, mount.path / "second", b"/proc/self/fd/%d" % fd) == 0
        assert os.fstat(fd).st_nlink == 2
        exclusive = os.open(mount.path, os.O_TMPFILE | os.O_RDWR | os.O_EXCL)
        assert name_it(exclusive, mount.path / "never") == errno.ENOENT
        for used in (fd, exclusive):
            os.close(used)
        names = {"directory", "file", "gone", "large", "second", "set-id"}
        assert set(os.listdir(mount.path)) == names
    if place.kind != "memory":
        with place.mounted() as mount:
            assert set(os.listdir(mount.path)) == names
            assert (mount.path / "set-id").read_bytes() == DATA
            assert (mount.path / "second").stat().st_nlink == 2


@pytest.mark.crash
def test_a_file_without_a_name_goes_with_the_daemon(image: Place) -> None:
    """Nothing is left of it, and nothing for e2fsck to find."""
    with image.mounted() as mount:
        free = os.statvfs(mount.path).f_bfree
    with image.mounted() as mount:
        fd = os.open(mount.path / "directory", os.O_TMPFILE | os.O_RDWR)
        os.write(fd, DATA)
        os.fsync(fd)
        os.kill(mount.pid(), signal.SIGKILL)
        with suppress(OSError):  # the kernel may want to tell the daemon
            os.close(fd)
        cowfs("umount", mount.path, check=True)
    image.check()
    with image.mounted() as mount:
        assert abs(os.statvfs(mount.path).f_bfree - free) < 20
