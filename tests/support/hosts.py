"""Small filesystems for stores, which tests can fill to the last byte."""

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
    """Mount a new filesystem at *at*, in which every user may create files.

    *kind* is ``tmpfs``, ``ext4`` (allocates blocks when it writes data back) or ``ext3`` (has no
    fallocate(2)).
    """
    at.mkdir()
    if kind == "tmpfs":
        run("mount", "-t", "tmpfs", "-o", f"size={megabytes}M,mode=1777", "tmpfs", at)
    else:
        shared = Path("/dev/shm")  # in memory, because the tests sync very often
        with tempfile.NamedTemporaryFile(dir=shared if shared.is_dir() else at.parent) as image:
            image.truncate(megabytes * MIB)
            run(f"mkfs.{kind}", "-q", image.name, *(["-m", "0"] if kind.startswith("ext") else []))
            run("mount", "-t", kind, "-o", "loop", image.name, at)
        at.chmod(0o1777)
    try:
        yield at
    finally:
        eventually(lambda: run("umount", at, check=False).returncode == 0, f"{at} is no longer in use")


def free(at: Path) -> int:
    """Return the number of bytes that can still be written to the filesystem at *at*."""
    status = os.statvfs(at)
    return status.f_bavail * status.f_frsize


def fill(at: Path, leave: int = 0, name: str = "ballast") -> Path:
    """Fill a filesystem up to *leave* bytes; return the path of the file that fills it."""
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
    """Copy a store with holes in place of zeros; return the copy."""
    run("cp", "--sparse=always", source, target)
    return target


def lower_and_store(place: Path) -> Path:
    """Create a lower and a fully allocated store in *place*; return *place*."""
    (place / "lower/many").mkdir(parents=True)
    (place / "lower/big").write_bytes(bytes(range(256)) * 4096 * 12)
    for number in range(300):
        (place / f"lower/many/{number}").write_text("lower")
    cowfs("create", place / "whole", "96", check=True)
    return place
