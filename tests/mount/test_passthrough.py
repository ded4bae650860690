"""Files of the store that the kernel reads, writes and maps by itself (Linux 6.9): in root's directories, and
in images that it has mounted."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import platform
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.support.mounts import Mounted, cowfs, eventually, is_mounted, mounted
from tests.support.system import as_nobody_prefix, needs_root, run

_VERSION = tuple(map(int, re.findall(r"\d+", platform.release())[:2]))
pytestmark = [
    pytest.mark.matrix,
    needs_root,
    pytest.mark.skipif(_VERSION < (6, 9), reason="this kernel has no FUSE passthrough (Linux 6.9)"),
]

T = TypeVar("T")
SIZE = 300_000


def lay(place: Path) -> Path:
    """Make a lower of a few files."""
    (place / "lower").mkdir(exist_ok=True)
    (place / "lower/large").write_bytes(b"l" * SIZE)
    (place / "lower/small").write_bytes(b"small\n")
    return place / "lower"


@contextmanager
def mounted_on(kind: str, place: Path, **more: Any) -> Iterator[Mounted]:
    """A mount with a store of some kind."""
    store: Path | None = place / "store"
    if kind == "image" and not (place / "s.bs").exists():
        cowfs("create", place / "s.bs", "64", check=True)
    if kind != "directory":
        more["engine"] = "kernel"
        store = place / "s.bs" if kind == "image" else None
    with mounted(lay(place), place / "mnt", store, **more) as made:
        yield made


@pytest.fixture(params=["directory", "image", "memory"])
def mount(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mounted]:
    """A mount whose store is a directory, an ext3 image or a tmpfs, the kernel's both."""
    with mounted_on(request.param, tmp_path) as made:
        assert facts(made)["passthrough"] == {"lent": 0, "why_not": ""}
        yield made


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Mounted]:
    """A mount whose store is a directory."""
    with mounted_on("directory", tmp_path) as made:
        yield made


def facts(mount: Mounted) -> dict[str, Any]:
    """What ``cowfs info`` knows."""
    found: dict[str, Any] = json.loads(cowfs("info", mount.path, "--json", check=True).stdout)
    return found


def lent(mount: Mounted) -> int:
    """How many files the kernel has."""
    count: int = facts(mount)["passthrough"]["lent"]
    return count


def requests(mount: Mounted, *kinds: str) -> int:
    """How many requests of some kinds there were."""
    operations = facts(mount)["requests"]["operations"]
    return sum(operations.get(kind, {"count": 0})["count"] for kind in kinds)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.msync.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Mapping:
    """Memory of a file, which need not stay open for it, as with :mod:`mmap`."""

    def __init__(self, fd: int) -> None:
        self._at = _libc.mmap(None, SIZE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
        assert self._at != 2**64 - 1, os.strerror(ctypes.get_errno())

    def write(self, data: bytes, offset: int) -> None:
        ctypes.memmove(self._at + offset, data, len(data))

    def flush(self) -> None:
        assert _libc.msync(self._at, SIZE, 4) == 0  # MS_SYNC

    def close(self) -> None:
        _libc.munmap(self._at, SIZE)


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """A descriptor."""
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def while_stopped(mount: Mounted, call: Callable[[], T]) -> T:
    """What *call* gives while the daemon does nothing at all."""
    pid = facts(mount)["pid"]
    with ThreadPoolExecutor(1) as thread:
        os.kill(pid, signal.SIGSTOP)
        try:
            return thread.submit(call).result(timeout=10)
        finally:
            os.kill(pid, signal.SIGCONT)


def test_data_never_reaches_the_daemon(mount: Mounted) -> None:
    with (
        opened(mount.path / "new", os.O_RDWR | os.O_CREAT) as fd,
        opened(mount.path / "copy", os.O_WRONLY | os.O_CREAT) as to,
    ):
        os.write(fd, b"n" * SIZE)
        with mmap.mmap(fd, SIZE) as shared, mmap.mmap(fd, SIZE, flags=mmap.MAP_PRIVATE) as private:
            shared[:5] = b"first"
            private[5:9] = b"mine"
            assert os.pread(fd, 10, 0) == b"firstnnnnn"
            shared.flush()
        assert os.sendfile(to, fd, 0, SIZE) == SIZE
        assert os.copy_file_range(fd, to, 1000, 0, SIZE) == 1000
        os.fsync(fd)
        assert lent(mount) == 2
    with opened(mount.path / "copy", os.O_RDONLY) as fd:
        assert os.read(fd, 10) == b"firstnnnnn"
        assert os.fstat(fd).st_size == SIZE + 1000
    assert requests(mount, "READ", "WRITE") == 0


def test_the_daemon_need_not_run(mount: Mounted) -> None:
    """But for one GETXATTR before the first write that follows a look at the attributes."""
    with opened(mount.path / "large", os.O_RDWR) as fd, mmap.mmap(fd, SIZE) as shared:
        os.pwrite(fd, b"primed", 0)

        def use() -> bytes:
            assert os.pwrite(fd, b"w" * SIZE, 10) == SIZE
            shared[:4] = b"mmap"
            return os.pread(fd, SIZE, 0)

        assert while_stopped(mount, use) == b"mmaped" + b"llll" + b"w" * (SIZE - 10)
        assert os.fstat(fd).st_size == SIZE + 10
    assert (mount.path / "large").stat().st_size == SIZE + 10


def test_it_is_there_after_a_new_mount(tmp_path: Path) -> None:
    for kind in ("directory", "image"):
        with mounted_on(kind, tmp_path) as first, opened(first.path / "new", os.O_WRONLY | os.O_CREAT) as fd:
            os.write(fd, b"here" * SIZE)
        with mounted_on(kind, tmp_path) as again:
            assert (again.path / "new").read_bytes() == b"here" * SIZE


def test_a_lower_is_read_by_the_daemon(mount: Mounted) -> None:
    """Who reads it shall see what is written after its copy-up, and who writes shall not be refused."""
    with opened(mount.path / "large", os.O_RDONLY) as reader:
        assert os.pread(reader, 3, 0) == b"lll"
        assert lent(mount) == 0
        with (
            opened(mount.path / "large", os.O_RDWR) as writer,
            opened(mount.path / "large", os.O_RDONLY) as third,
        ):
            os.pwrite(writer, b"new", 0)
            assert os.pread(reader, 3, 0) == os.pread(third, 3, 0) == b"new"
            assert lent(mount) == 0  # nothing else while the first is open
    eventually(lambda: facts(mount)["open_files"] == 0, "all is closed")
    with (
        opened(mount.path / "large", os.O_RDONLY) as reader,
        opened(mount.path / "large", os.O_RDWR) as writer,
    ):
        assert lent(mount) == 1
        os.pwrite(writer, b"more", 0)
        assert os.pread(reader, 4, 0) == b"more"


def test_a_metacopy_is_read_by_the_daemon(mount: Mounted) -> None:
    (mount.path / "large").chmod(0o600)
    with opened(mount.path / "large", os.O_RDONLY) as reader:
        assert os.pread(reader, 3, 0) == b"lll"
        with opened(mount.path / "large", os.O_WRONLY) as writer:
            os.pwrite(writer, b"new", 0)
        assert os.pread(reader, 3, 0) == b"new"


def test_names_and_sizes_that_change_while_it_is_open(mount: Mounted) -> None:
    path, link, moved = (mount.path / name for name in ("file", "link", "moved"))
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, b"0123456789")
        os.link(path, link)
        with opened(link, os.O_RDWR) as other:
            os.pwrite(other, b"LINK", 0)
            assert os.pread(fd, 10, 0) == b"LINK456789"
            os.rename(path, moved)
            os.truncate(moved, 6)
            assert os.pread(fd, 10, 0) == b"LINK45"
            os.ftruncate(other, 8)
            assert os.pread(fd, 10, 0) == b"LINK45\0\0"
            os.unlink(moved)
            os.unlink(link)
            os.pwrite(other, b"gone", 0)
            assert os.pread(fd, 10, 0) == b"gone45\0\0"
            assert os.fstat(fd).st_nlink == 0
        with opened(mount.path / "file", os.O_RDWR | os.O_CREAT) as fresh:
            os.write(fresh, b"other")
            assert os.pread(fd, 4, 0) == b"gone"
    with opened(mount.path / "file", os.O_WRONLY | os.O_TRUNC) as fd:
        assert os.fstat(fd).st_size == 0
        os.write(fd, b"x")
        os.lseek(fd, 1 << 20, os.SEEK_SET)
        os.write(fd, b"y")
        assert os.lseek(fd, 0, os.SEEK_END) == (1 << 20) + 1
        assert os.lseek(fd, 100_000, os.SEEK_DATA) > 100_000
    assert (mount.path / "file").stat().st_blocks * 512 < 1 << 20


def test_flags_that_are_taken_from_an_open_file(mount: Mounted) -> None:
    """fcntl(2) tells the kernel's file below nothing: such files are written to by the daemon."""
    path = mount.path / "file"
    for first in (os.O_WRONLY, os.O_RDWR):  # nothing was lent before; it was, and mapped perhaps
        with opened(path, first | os.O_CREAT) as keeps, opened(path, os.O_RDWR | os.O_APPEND) as appends:
            os.pwrite(keeps, b"0123456789", 0)
            os.ftruncate(keeps, 10)
            os.write(appends, b"end")
            fcntl.fcntl(appends, fcntl.F_SETFL, 0)
            os.pwrite(appends, b"start", 0)
            assert path.read_bytes() == b"start56789end"
            fcntl.fcntl(keeps, fcntl.F_SETFL, os.O_APPEND)
            os.write(keeps, b"!")
            assert path.read_bytes() == b"start56789end!"
    with opened(path, os.O_RDWR) as keeps, opened(path, os.O_RDWR | os.O_DIRECT) as direct:
        assert os.pread(direct, 100, 5) == b"56789end!"
        fcntl.fcntl(direct, fcntl.F_SETFL, 0)
        os.pwrite(direct, b"odd", 1)
        with mmap.mmap(direct, 14) as shared:
            shared[13:] = b"?"
        assert os.pread(keeps, 20, 0) == b"sodd56789end?"[:1] + b"oddt56789end?"


def test_append_alone_is_as_before(mount: Mounted) -> None:
    for word in (b"one ", b"two"):
        with opened(mount.path / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT) as fd:
            os.write(fd, word)
            fcntl.fcntl(fd, fcntl.F_SETFL, 0)
            os.pwrite(fd, b"O", 0)
    assert (mount.path / "log").read_bytes() == b"One two"


def test_what_a_mapping_changes_after_the_close(mount: Mounted) -> None:
    path = mount.path / "file"
    path.write_bytes(b"o" * SIZE)
    os.utime(path, ns=(1, 10**18))
    with opened(path, os.O_RDWR) as fd:
        os.fsync(fd)
        shared = Mapping(fd)
    eventually(lambda: lent(mount) == 0, "it is closed")  # the kernel does not tell of mappings
    assert path.stat().st_mtime_ns == 10**18
    shared.write(b"new", 100)
    assert path.read_bytes()[98:105] == b"oonewoo"
    shared.flush()
    assert path.stat().st_mtime_ns > 10**18
    with opened(path, os.O_RDWR | os.O_APPEND) as fd:
        os.write(fd, b"end")
        shared.write(b"map", 0)
        assert os.pread(fd, 3, 0) == b"map"
    os.truncate(path, 50)
    assert path.stat().st_size == 50
    shared.close()


def test_programs(mount: Mounted) -> None:
    program = mount.path / "true"
    shutil.copy2("/bin/true", program)
    run(program)
    with opened(program, os.O_WRONLY):
        with pytest.raises(OSError) as caught:
            subprocess.run([program], check=True)
        assert caught.value.errno == errno.ETXTBSY
    shutil.copy2("/bin/sleep", mount.path / "sleep")
    with subprocess.Popen([mount.path / "sleep", "60"]) as sleeping:
        try:
            maps = Path(f"/proc/{sleeping.pid}/maps")
            eventually(lambda: f"{mount.path}/sleep" in maps.read_text(), "it runs, and is seen to")
            with pytest.raises(OSError) as caught:
                os.open(mount.path / "sleep", os.O_WRONLY)
            assert caught.value.errno == errno.ETXTBSY
        finally:
            sleeping.kill()


@pytest.mark.parametrize("kind", ["directory", "image"])
def test_a_user_who_writes_takes_set_id_bits(nobody_path: Path, kind: str) -> None:
    with mounted_on(kind, nobody_path) as mount:
        _take_set_id_bits(mount, mount.path / "file")


def _take_set_id_bits(mount: Mounted, path: Path) -> None:
    path.write_bytes(b"#!/bin/sh\n")
    os.chmod(path, 0o6777)
    os.setxattr(path, "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
    code = f"""
import os, sys
fd = os.open({str(path)!r}, os.O_RDWR)
for turn in sys.stdin:
    os.pwrite(fd, b"# written\\n", 10)
    print(oct(os.fstat(fd).st_mode), flush=True)
"""
    with subprocess.Popen(
        [*as_nobody_prefix(), sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as user:
        assert user.stdin and user.stdout
        for _ in range(2):
            user.stdin.write("\n")
            user.stdin.flush()
            assert user.stdout.readline() == "0o100777\n"
            assert lent(mount) == 1
            assert stat.S_IMODE(path.stat().st_mode) == 0o777
            assert "security.capability" not in os.listxattr(path)
            os.chmod(path, 0o6777)
        user.stdin.close()
    assert requests(mount, "WRITE") == 0


def test_a_full_store(tmp_path: Path) -> None:
    with mounted(lay(tmp_path), tmp_path / "mnt", engine="kernel", options=["size=16M"]) as mount:
        free = os.statvfs(mount.path).f_bavail * os.statvfs(mount.path).f_frsize
        with opened(mount.path / "fill", os.O_WRONLY | os.O_CREAT) as fd:
            with pytest.raises(OSError) as caught:
                while True:
                    os.write(fd, bytes(1 << 16))
            assert caught.value.errno == errno.ENOSPC
            assert lent(mount) == 1
            size = os.fstat(fd).st_size
            assert free - (1 << 20) < size <= free
        assert requests(mount, "WRITE") == 0
        for _ in range(5):  # what is removed is free for who comes next
            os.unlink(mount.path / "fill")
            with opened(mount.path / "fill", os.O_WRONLY | os.O_CREAT) as fd:
                assert (
                    sum(os.pwrite(fd, bytes(1 << 20), n << 20) for n in range(size >> 20)) == size >> 20 << 20
                )


def test_nothing_is_kept_of_what_was_lent(tmp_path: Path) -> None:
    """Opened and closed some thousand times, removed while open: all of it is free again."""
    with mounted(lay(tmp_path), tmp_path / "mnt", engine="kernel", options=["size=64M"]) as mount:
        path = mount.path / "file"

        def free() -> int:
            return os.statvfs(mount.path).f_bfree

        path.write_bytes(b"")
        before = free()
        for number in range(3000):
            with opened(path, os.O_RDWR) as fd, opened(path, os.O_RDONLY):
                os.pwrite(fd, bytes(100_000), 0)
                if number % 3 == 0:
                    os.unlink(path)
                    path.write_bytes(b"")
        os.truncate(path, 0)
        eventually(lambda: lent(mount) == 0 and facts(mount)["open_files"] == 0, "all is closed")
        eventually(lambda: free() == before, "all room is free again")


def test_limits_of_who_writes(mount: Mounted) -> None:
    code = f"""
import os, resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
fd = os.open({str(mount.path / "limited")!r}, os.O_WRONLY | os.O_CREAT)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
print(os.write(fd, bytes(2000)))
try:
    os.write(fd, b"x")
except OSError as error:
    print(error.errno)
"""
    assert run(sys.executable, "-c", code).stdout.split() == ["1000", str(errno.EFBIG)]


def test_reading_changes_the_atime_once(mount: Mounted) -> None:
    path = mount.path / "file"
    path.write_bytes(b"read me")
    os.utime(path, ns=(10**15, 10**18))
    before = path.stat()
    assert path.read_bytes() == b"read me"
    after = path.stat()
    assert after.st_atime_ns > 10**18
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)
    os.utime(path, ns=(2 * 10**18, 10**18))
    assert path.read_bytes() == b"read me"
    assert path.stat().st_atime_ns == 2 * 10**18


def test_a_killed_daemon(tmp_path: Path) -> None:
    with mounted_on("directory", tmp_path, quiet=False) as mount:
        with opened(mount.path / "file", os.O_RDWR | os.O_CREAT) as fd:
            os.write(fd, b"before")
            os.close(os.dup(fd))  # has the kernel learn that no FLUSH is wanted
            os.kill(facts(mount)["pid"], signal.SIGKILL)
            eventually(lambda: _answers(mount) == errno.ENOTCONN, "it is dead")
            os.pwrite(fd, b"after!", 0)
        assert cowfs("umount", mount.path).returncode == 0
        assert not is_mounted(mount.path)
    with mounted_on("directory", tmp_path) as again:
        assert (again.path / "file").read_bytes() == b"after!"


def _answers(mount: Mounted) -> int:
    try:
        os.statvfs(mount.path)
    except OSError as error:
        return error.errno or 0
    return 0


def test_turned_off(tmp_path: Path) -> None:
    with mounted_on("directory", tmp_path, options=["passthrough=off"]) as mount:
        (mount.path / "new").write_bytes(b"new")
        assert facts(mount)["passthrough"] == {"lent": 0, "why_not": "turned off"}
        assert requests(mount, "WRITE") == 1
    done = cowfs("mount", tmp_path, tmp_path, "-o", "passthrough=maybe")
    assert "unknown passthrough 'maybe' (give one of auto, off)" in done.stderr


def test_others_do_without(nobody_path: Path) -> None:
    (nobody_path / "lower").mkdir()
    with mounted(nobody_path / "lower", nobody_path / "mnt", nobody_path / "store", nobody=True) as mount:
        assert (
            "data:       through the daemon (only root can use it)"
            in cowfs("info", mount.path, nobody=True).stdout
        )
    with mounted(nobody_path / "lower", nobody_path / "mnt2") as mount:
        assert facts(mount)["passthrough"]["why_not"] == "the daemon reads the image itself"


def test_info_tells(plain: Mounted) -> None:
    with opened(plain.path / "new", os.O_WRONLY | os.O_CREAT):
        shown = cowfs("info", plain.path).stdout
    assert (
        "data:       the kernel reads and writes the store's files itself (passthrough), 1 file now" in shown
    )
