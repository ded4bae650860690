"""Small filesystems for stores to be on: what they hold can be filled to the last byte."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.mounts import cowfs, eventually
from tests.support.system import run

MIB = 1 << 20


@contextmanager
def host(kind: str, at: Path, megabytes: int) -> Iterator[Path]:
    """A filesystem of its own at *at*, which anybody may write to.

    ``tmpfs``; ``ext4``, which allocates blocks when it writes data back; ``ext3``, which has no fallocate(2).
    """
    at.mkdir()
    if kind == "tmpfs":
        run("mount", "-t", "tmpfs", "-o", f"size={megabytes}M,mode=1777", "tmpfs", at)
    else:
        shared = Path("/dev/shm")  # many barriers, which no disk has to wait for
        with tempfile.NamedTemporaryFile(dir=shared if shared.is_dir() else at.parent) as image:
            image.truncate(megabytes * MIB)
            run(f"mkfs.{kind}", "-q", image.name, *(["-m", "0"] if kind.startswith("ext") else []))
            run("mount", "-t", kind, "-o", "loop", image.name, at)
        at.chmod(0o1777)
    try:
        yield at
    finally:
        eventually(lambda: run("umount", at, check=False).returncode == 0, f"{at} is not in use any more")


def free(at: Path) -> int:
    """Bytes that can be written there."""
    room = os.statvfs(at)
    return room.f_bavail * room.f_frsize


def fill(at: Path, leave: int = 0, name: str = "ballast") -> Path:
    """Take all room of a filesystem but *leave* bytes; return the file that does."""
    path = at / name
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    try:
        with suppress(OSError):
            while free(at) > leave:
                os.write(fd, bytes(min(MIB, free(at) - leave)))
                os.fsync(fd)
        with suppress(OSError):
            while not leave:
                os.write(fd, bytes(512))
    finally:
        os.close(fd)
    return path


def sparse_copy(source: Path, target: Path) -> Path:
    """Copy a store so that all that is zero in it is a hole."""
    run("cp", "--sparse=always", source, target)
    return target


def lower_and_store(place: Path) -> Path:
    """Make a lower, and a store that is allocated as a whole; return the directory that they are in."""
    (place / "lower/many").mkdir(parents=True)
    (place / "lower/big").write_bytes(bytes(range(256)) * 4096 * 12)
    for number in range(300):
        (place / f"lower/many/{number}").write_text("lower")
    cowfs("create", place / "whole", "96", check=True)
    return place
