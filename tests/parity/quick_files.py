"""Files: mappings, execution, locks, and use after the last name is removed."""

from __future__ import annotations

import fcntl
import mmap
import os
import subprocess
from collections.abc import Callable
from typing import Any

from tests.parity.quick import errno_of, quick
from tests.parity.script import Script, in_child
from tests.parity.shorthands import Steps, fails

# --- mappings


@quick({"f": b"mapped" * 1000})
def mmap_shared_writes(s: Script) -> Steps:
    def write(fd: int) -> bytes:
        with mmap.mmap(fd, 6000) as memory:
            memory[4000:4005] = b"WRITE"
            return os.pread(fd, 10, 3998)

    s.open_do("f", os.O_RDWR, write)
    s.read("f")
    yield
    s.read("f")


@quick({"f": b"mapped" * 1000})
def mmap_private_writes(s: Script) -> None:
    def write(fd: int) -> bytes:
        with mmap.mmap(fd, 6000, access=mmap.ACCESS_COPY) as memory:
            memory[0:5] = b"WRITE"
            return os.pread(fd, 10, 0)

    s.open_do("f", os.O_RDONLY, write)
    s.read("f")


@quick({"f": b"mapped" * 1000})
def mmap_sees_writes(s: Script) -> None:
    def look(fd: int) -> list[bytes]:
        with mmap.mmap(fd, 6000) as memory:
            seen = [memory[:6]]
            os.pwrite(fd, b"WRITE", 0)
            seen.append(memory[:6])
            os.ftruncate(fd, 3)
            os.ftruncate(fd, 6000)
            return [*seen, memory[:6]]

    s.open_do("f", os.O_RDWR, look)


@quick()
def mmap_of_what_cannot_be(s: Script) -> None:
    s.open_do("d", os.O_RDONLY, lambda fd: errno_of(lambda: mmap.mmap(fd, 10, access=mmap.ACCESS_READ)))
    s.open_do("f", os.O_RDONLY, lambda fd: errno_of(lambda: mmap.mmap(fd, 6, access=mmap.ACCESS_WRITE)))
    s.open_do("f", os.O_WRONLY, lambda fd: errno_of(lambda: mmap.mmap(fd, 6, access=mmap.ACCESS_READ)))


@quick({"f": b"mapped" * 1000})
def mmap_outlives_the_name(s: Script) -> None:
    fd = os.open(s.at("f"), os.O_RDWR)
    memory = mmap.mmap(fd, 6000)
    os.close(fd)
    s.unlink("f")
    memory[:5] = b"WRITE"
    s.step("there", lambda: memory[:7])
    memory.close()
    s.listdir(".")


# --- unlinked, open


@quick()
def unlinked_lower_file(s: Script) -> None:
    fd = s.open("f", os.O_RDWR)
    s.unlink("f")
    s.fd("read", lambda: os.pread(fd, 100, 0))
    s.fd("write", lambda: os.pwrite(fd, b"W", 0))
    s.fd("read", lambda: os.pread(fd, 100, 0))
    s.fd("cut", lambda: os.ftruncate(fd, 2))
    s.fd("size and links", lambda: (os.fstat(fd).st_size, os.fstat(fd).st_nlink))
    s.close(fd)


@quick()
def unlinked_upper_file(s: Script) -> None:
    s.create("u", b"upper")
    fd = s.open("u", os.O_RDWR)
    s.unlink("u")
    s.create("u", b"another")
    s.fd("write", lambda: os.pwrite(fd, b"W", 0))
    s.fd("read", lambda: os.pread(fd, 100, 0))
    s.fd("links", lambda: os.fstat(fd).st_nlink)
    s.read("u")
    s.close(fd)


@quick()
def unlinked_and_changed(s: Script) -> None:
    s.append("f", b"upper")
    fd = s.open("f", os.O_RDWR)
    s.unlink("f")
    s.fd("chmod", lambda: os.fchmod(fd, 0o600))
    s.fd("chown", lambda: os.fchown(fd, 5, 6))
    s.fd("utime", lambda: os.utime(fd, ns=(1, 2)))
    s.fd("setxattr", lambda: os.setxattr(fd, "user.a", b"1"))
    s.fd("getxattr", lambda: os.getxattr(fd, "user.a"))
    s.fd("all", lambda: (oct(os.fstat(fd).st_mode), os.fstat(fd).st_uid, os.fstat(fd).st_mtime_ns))
    s.fd("again", lambda: errno_of(lambda: os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR))))
    s.close(fd)


@quick()
def unlinked_by_rename(s: Script) -> None:
    s.append("d/a", b"upper")
    fd = s.open("d/a", os.O_RDWR)
    s.rename("f", "d/a")
    s.fd("write", lambda: os.pwrite(fd, b"W", 0))
    s.fd("links", lambda: os.fstat(fd).st_nlink)
    s.close(fd)
    s.read("d/a")


@quick()
def unlinked_but_for_another_name(s: Script) -> None:
    fd = s.open("h1", os.O_RDWR)
    s.unlink("h1")
    s.fd("links", lambda: os.fstat(fd).st_nlink)
    s.fd("write", lambda: os.pwrite(fd, b"W", 0))
    s.close(fd)
    s.read("d/h3")


# --- running, locking, syncing


@quick()
def run_programs(s: Script) -> Steps:
    def ran() -> bytes:
        return subprocess.run([s.at("prog")], stdout=subprocess.PIPE, check=False).stdout

    s.step("of the lower", ran)
    s.append("prog", b"echo more\n")
    s.step("of the upper", ran)
    yield
    s.step("again", ran)
    s.chmod("prog", 0o644)
    s.step("without the bit", lambda: errno_of(ran))
    s.step("a directory", lambda: errno_of(lambda: subprocess.run([s.at("d")], check=False)))
    s.step("text", lambda: errno_of(lambda: subprocess.run([s.at("h1")], check=False)))


@quick()
def run_by_others(s: Script) -> None:
    s.chmod("prog", 0o744)
    s.as_user(1000, "run", lambda: os.access(s.at("prog"), os.X_OK))
    s.as_user(1000, "execute", lambda: errno_of(lambda: os.execv(s.at("prog"), ["prog"])))


@quick()
def a_running_program_is_busy(s: Script) -> None:
    with open("/bin/sleep", "rb") as source:
        content = source.read()
    s.create("sleep", content, 0o755)
    fd = s.open("sleep", os.O_WRONLY)
    s.step("open to write", lambda: errno_of(lambda: subprocess.run([s.at("sleep"), "0"], check=False)))
    s.close(fd)
    with subprocess.Popen([s.at("sleep"), "60"]) as running:
        for flags in (os.O_WRONLY, os.O_RDWR | os.O_TRUNC, os.O_RDONLY):
            fails(s, "sleep", flags, "while it runs")
        s.truncate("sleep", 0)
        s.rename("sleep", "d/sleep")
        s.unlink("d/sleep")
        running.kill()


@quick()
def locks_by_flock(s: Script) -> None:
    one, two = s.open("f"), s.open("f", os.O_RDWR)
    s.fd("shared", lambda: fcntl.flock(one, fcntl.LOCK_SH | fcntl.LOCK_NB))
    s.fd("exclusive", lambda: fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB))
    s.fd("let go", lambda: fcntl.flock(one, fcntl.LOCK_UN))
    s.fd("exclusive", lambda: fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB))
    s.close(one)
    s.close(two)


@quick()
def locks_by_fcntl(s: Script) -> None:
    fd = s.open("w", os.O_RDWR)
    s.fd("lock", lambda: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 3))

    def other(start: int) -> Callable[[], Any]:
        def operation() -> Any:
            here = os.open(s.at("w"), os.O_RDWR)
            return errno_of(lambda: fcntl.lockf(here, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, start))

        return lambda: in_child(1000, 1000, operation)

    s.step("within", other(1))
    s.step("beyond", other(3))
    s.close(fd)
    s.step("free", other(1))


@quick()
def sync_calls(s: Script) -> Steps:
    fd = s.open("f", os.O_RDWR)
    s.fd("write", lambda: os.write(fd, b"w"))
    s.fd("fsync", lambda: os.fsync(fd))
    s.fd("fdatasync", lambda: os.fdatasync(fd))
    s.close(fd)
    s.open_do("d", os.O_RDONLY | os.O_DIRECTORY, os.fsync)
    s.open_do("l", os.O_RDONLY, os.fsync)
    s.open_do("empty", os.O_WRONLY | os.O_SYNC, lambda fd: os.write(fd, b"synced"))
    yield
    s.read("empty")


@quick()
def read_ahead_and_advise(s: Script) -> None:
    for advice in (os.POSIX_FADV_DONTNEED, os.POSIX_FADV_WILLNEED, os.POSIX_FADV_SEQUENTIAL):
        s.open_do("f", os.O_RDONLY, lambda fd, advice=advice: os.posix_fadvise(fd, 0, 0, advice))  # type: ignore[misc]
    s.open_do("f", os.O_RDONLY, lambda fd: os.preadv(fd, [bytearray(3), bytearray(9)], 1))
