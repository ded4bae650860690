"""Images to test with, e2fsck, and the kernel's view of an image."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.system import run

IDENTITY = "6f0c8c2e-6d1f-4b7e-9a55-3c1d2e4f5a6b"
"""The UUID and the seed of all hashes: the same at each run."""
FEATURES = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,sparse_super,large_file"
"""What a store has."""


@dataclass(frozen=True)
class Shape:
    """What kind of ext3 an image is."""

    block_size: int = 4096
    inode_size: int = 256
    mib: int = 16
    journal: int = 4
    """MiB, of which mke2fs wants at least 1024 blocks."""
    inodes: int = 2048

    def __str__(self) -> str:
        return f"{self.block_size}-{self.inode_size}"


MODERN = Shape()
SMALL = Shape(block_size=1024, mib=12, journal=1)
OLD = Shape(block_size=1024, inode_size=128, mib=12, journal=1)
MIDDLE = Shape(block_size=2048, mib=12, journal=2)


def make(path: Path, shape: Shape = MODERN, tree: Path | None = None) -> Path:
    """An image as ``cowfs create`` makes them, empty or with a copy of a *tree*."""
    fill: list[str | Path] = [] if tree is None else ["-d", tree]
    with path.open("wb") as out:
        out.truncate(shape.mib << 20)
    run(
        "mke2fs", "-q", "-F", "-t", "ext3", "-U", IDENTITY, "-O", FEATURES, "-m", "0",
        "-b", str(shape.block_size),
        "-I", str(shape.inode_size), "-J", f"size={shape.journal}", "-N", str(shape.inodes),
        *fill, "-E", f"lazy_itable_init=0,lazy_journal_init=0,nodiscard,hash_seed={IDENTITY}", path,
    )  # fmt: skip
    return path


def unclean(path: Path) -> str | None:
    """What e2fsck finds in the image, changing nothing; None when it is sound."""
    done = run("e2fsck", "-fn", path, check=False)
    return None if done.returncode == 0 else f"e2fsck -fn: exit {done.returncode}: {done.stdout[-1500:]}"


def recover(path: Path) -> str | None:
    """Do what is done before an image is mounted that was not unmounted; return what is wrong with it."""
    done = run("e2fsck", "-p", path, check=False)
    if done.returncode & ~1:
        return f"e2fsck -p: exit {done.returncode}: {done.stdout[-1500:]}"
    return unclean(path)


def recover_by_kernel(path: Path, at: Path) -> str | None:
    """The same, by mounting it."""
    with kernel_mounted(path, at):
        pass
    return unclean(path)


@contextmanager
def kernel_mounted(image: Path, at: Path, options: str = "noatime") -> Iterator[Path]:
    """The image, mounted by the kernel."""
    at.mkdir(exist_ok=True)
    run("mount", "-t", "ext3", "-o", f"loop,{options}", image, at)
    try:
        yield at
    finally:
        run("umount", at)


def scratch() -> Path | None:
    """Where files are in memory: e2fsck syncs what it writes."""
    return Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
