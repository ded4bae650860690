"""Files: writes, truncation and copies."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from tests.parity.quick import errno_of, quick
from tests.parity.script import Script
from tests.parity.shorthands import COLLAPSE, INSERT, KEEP, PUNCH, ZERO, Steps, fallocate
from tests.parity.trees import BIG
from tests.support.tree import Node

# --- data


@quick()
def write_beyond_the_end(s: Script) -> Steps:
    s.write("f", b"end", 10_000)
    s.write("empty", b"x", 4096)
    yield
    s.read("f")
    s.append("empty", b"y")


@quick()
def write_nothing(s: Script) -> None:
    s.open_do("f", os.O_WRONLY, lambda fd: os.write(fd, b""))
    s.read("f")


@quick()
def write_through_one_read_through_another(s: Script) -> None:
    reading = s.open("f")
    s.fd("read", lambda: os.pread(reading, 100, 0))
    writing = s.open("f", os.O_RDWR)
    s.fd("write", lambda: os.pwrite(writing, b"WRITE", 2))
    s.fd("read", lambda: os.pread(reading, 100, 0))
    s.fd("cut", lambda: os.ftruncate(writing, 3))
    s.fd("read", lambda: os.pread(reading, 100, 0))
    s.fd("same", lambda: os.path.sameopenfile(reading, writing))
    s.close(reading)
    s.close(writing)


@quick()
def write_to_what_is_open_to_read(s: Script) -> None:
    fd = s.open("f")
    s.fd("write", lambda: os.write(fd, b"x"))
    s.fd("cut", lambda: os.ftruncate(fd, 0))
    s.fd("allocate", lambda: fallocate(fd, 0, 0, 10))
    s.close(fd)
    fd = s.open("f", os.O_WRONLY)
    s.fd("read", lambda: os.read(fd, 1))
    s.close(fd)


@quick()
def write_at_odd_offsets(s: Script) -> None:
    fd = s.open("f", os.O_RDWR)
    for offset in (-1, (1 << 63) - 1, 1 << 50):
        s.fd(f"at {offset}", lambda offset=offset: errno_of(lambda: os.pwrite(fd, b"x", offset)))  # type: ignore[misc]
    s.fd("seek", lambda: os.lseek(fd, -1, os.SEEK_SET))
    s.fd("seek from the end", lambda: os.lseek(fd, -2, os.SEEK_END))
    s.fd("read", lambda: os.read(fd, 10))
    s.close(fd)


@quick()
def truncate_to_many_sizes(s: Script) -> Steps:
    for size in (3, 0, 10_000, 6, 6):
        s.truncate("f", size)
        s.read("f")
    s.truncate("d/a", 5000)
    yield
    s.read("d/a")


@quick()
def truncate_errors(s: Script) -> None:
    for path, size in (("d", 0), ("missing", 0), ("p", 0), ("f", -1), ("l", 2), ("dangling", 0), ("f/x", 0)):
        s.step(f"{path} {size}", lambda path=path, size=size: os.truncate(s.at(path), size))  # type: ignore[misc]
    s.as_user(1000, "of another", lambda: os.truncate(s.at("f"), 0))
    s.as_user(1000, "for all", lambda: os.truncate(s.at("w"), 2))


@quick({"big": BIG})
def truncate_a_big_file(s: Script) -> Steps:
    s.truncate("big", 100_001)
    s.truncate("big", 200_000)
    yield
    s.append("big", b"end")


@quick({"big": Node(data=BIG, mode=0o644)})
def chmod_then_write_a_big_file(s: Script) -> Steps:
    s.chmod("big", 0o600)
    yield
    s.write("big", b"middle", 150_000)
    s.rename("big", "b2")
    yield
    s.chown("b2", 3, 4)


@quick({"sparse": Node(data=b"start", size=1 << 20)})
def holes_are_kept(s: Script) -> Steps:
    def blocks() -> bool:
        return os.stat(s.at("sparse")).st_blocks < 200

    s.write("sparse", b"x", 500_000)
    why = "the kernel skips holes of at least so many blocks only"
    s.differs(why, "few blocks", blocks, kernel=False, cowfs=True)

    def seek(fd: int) -> list[int]:
        data = os.lseek(fd, 1, os.SEEK_HOLE)
        return [data // 4096, os.lseek(fd, data, os.SEEK_DATA) // 4096]

    s.differs(
        why, "seek", lambda: seek(os.open(s.at("sparse"), os.O_RDONLY)), kernel="errno ENXIO", cowfs=[1, 122]
    )
    yield
    s.differs(why, "few blocks", blocks, kernel=False, cowfs=True)


@quick()
def seek_data_and_holes(s: Script) -> None:
    fd = s.open("f", os.O_RDWR)
    s.fd("cut", lambda: os.ftruncate(fd, 1 << 20))
    for how in (os.SEEK_DATA, os.SEEK_HOLE):
        for offset in (0, 3, 1 << 19, (1 << 20) - 1, 1 << 20, 1 << 21):
            s.fd(f"{how} {offset}", lambda how=how, offset=offset: os.lseek(fd, offset, how))  # type: ignore[misc]
    s.close(fd)


@quick()
def fallocate_modes(s: Script) -> Steps:
    fd = s.open("f", os.O_RDWR)
    for mode in (0, KEEP, PUNCH | KEEP, PUNCH, COLLAPSE, ZERO, ZERO | KEEP, INSERT):
        s.fd(f"{mode}", lambda mode=mode: fallocate(fd, mode, 4096, 8192))  # type: ignore[misc]
        s.fd("size", lambda: os.fstat(fd).st_size)
    s.fd("nothing", lambda: fallocate(fd, 0, 0, 0))
    s.fd("before", lambda: fallocate(fd, 0, -1, 10))
    s.fd("too far", lambda: fallocate(fd, 0, 10, 2**45))
    s.fd("a hole too far", lambda: fallocate(fd, KEEP | PUNCH, 10, 2**45))
    s.close(fd)
    s.open_do("d", os.O_RDONLY, lambda fd: fallocate(fd, 0, 0, 1))
    yield
    s.read("f")


@quick({"f": bytes(range(256)) * 64})
def punch_a_hole_in_a_lower_file(s: Script) -> Steps:
    s.open_do("f", os.O_RDWR, lambda fd: fallocate(fd, PUNCH | KEEP, 1000, 9000))
    yield
    s.read("f")


@quick()
def copy_file_ranges(s: Script) -> Steps:
    def copy(
        source: str, target: str, size: int, *offsets: int, flags: int = os.O_WRONLY
    ) -> Callable[[], Any]:
        def operation() -> Any:
            one, two = os.open(s.at(source), os.O_RDONLY), os.open(s.at(target), flags)
            try:
                return os.copy_file_range(one, two, size, *offsets)
            finally:
                os.close(one)
                os.close(two)

        return operation

    s.create("new", b"0123456789")
    s.step("upper to upper", copy("new", "w", 5))
    s.step("beyond", copy("new", "w", 50, 8, 0))
    s.step("to one that appends", copy("new", "w", 5, flags=os.O_WRONLY | os.O_APPEND))
    s.step("onto itself", copy("new", "new", 5, 0, 2))
    s.step("of itself elsewhere", copy("new", "new", 5, 0, 20))
    s.step("to a directory", copy("new", "d", 5, flags=os.O_RDONLY))
    yield
    s.read("w")
    s.read("new")


@quick()
def sendfile_and_splice(s: Script) -> None:
    def send() -> int:
        one, two = os.open(s.at("f"), os.O_RDONLY), os.open(s.at("w"), os.O_WRONLY)
        try:
            return os.sendfile(two, one, 0, 100)
        finally:
            os.close(one)
            os.close(two)

    def splice() -> int:
        reading, writing = os.pipe()
        one, two = os.open(s.at("h1"), os.O_RDONLY), os.open(s.at("empty"), os.O_WRONLY)
        try:
            return os.splice(reading, two, os.splice(one, writing, 4))
        finally:
            for fd in (one, two, reading, writing):
                os.close(fd)

    s.step("sendfile", send)
    s.read("w")
    s.step("splice", splice)
    s.read("empty")
