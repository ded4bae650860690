"""Small filesystems for stores to be on: what they hold can be filled to the last byte."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.system import NOBODY, run

MIB = 1 << 20


@contextmanager
def host(kind: str, at: Path, megabytes: int) -> Iterator[Path]:
    """A filesystem of its own at *at*, which anybody may write to.

    ``tmpfs``; ``ext4``, which allocates blocks when it writes data back; ``ext3``, which has no fallocate(2);
    ``btrfs``.
    """
    at.mkdir()
    if kind == "tmpfs":
        run("mount", "-t", "tmpfs", "-o", f"size={megabytes}M,mode=1777", "tmpfs", at)
    else:
        image = at.with_name(f"{at.name}.{kind}")
        with image.open("wb") as out:
            out.truncate(megabytes * MIB)
        run(f"mkfs.{kind}", "-q", image, *(["-m", "0"] if kind.startswith("ext") else []))
        run("mount", "-t", kind, "-o", "loop", image, at)
        at.chmod(0o1777)
    try:
        yield at
    finally:
        run("umount", at)


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


def punch(path: Path) -> None:
    """Make a file sparse, as a copy by cp(1) or rsync -S is."""
    run("fallocate", "--dig-holes", path)


def sparse_copy(source: Path, target: Path, owner: int = NOBODY) -> Path:
    """Copy a store so that all that is zero in it is a hole."""
    run("cp", "--sparse=always", source, target)
    os.chown(target, owner, owner)
    return target
