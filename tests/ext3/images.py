"""Test images, e2fsck, and the kernel's view of an image."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.system import run

IDENTITY = "6f0c8c2e-6d1f-4b7e-9a55-3c1d2e4f5a6b"
"""A fixed UUID and hash seed."""
FEATURES = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,sparse_super,large_file"
"""The features of a store."""


@dataclass(frozen=True)
class Shape:
    """The geometry of an ext3 image."""

    block_size: int = 4096
    inode_size: int = 256
    mib: int = 16
    journal: int = 4
    """The size in MiB. mke2fs needs at least 1024 blocks."""
    inodes: int = 2048

    def __str__(self) -> str:
        return f"{self.block_size}-{self.inode_size}"


MODERN = Shape()
SMALL = Shape(block_size=1024, mib=12, journal=1)
OLD = Shape(block_size=1024, inode_size=128, mib=12, journal=1)
MIDDLE = Shape(block_size=2048, mib=12, journal=2)


def make(path: Path, shape: Shape = MODERN, tree: Path | None = None) -> Path:
    """Make an image like ``cowfs create``, empty or with a copy of a *tree*."""
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
    """Return the errors that e2fsck -n finds; None if the image is sound."""
    done = run("e2fsck", "-fn", path, check=False)
    return None if done.returncode == 0 else f"e2fsck -fn: exit {done.returncode}: {done.stdout[-1500:]}"


def recover(path: Path) -> str | None:
    """Repair an image that was not unmounted, as before a mount; return the errors."""
    done = run("e2fsck", "-p", path, check=False)
    if done.returncode & ~1:
        return f"e2fsck -p: exit {done.returncode}: {done.stdout[-1500:]}"
    return unclean(path)


def recover_by_kernel(path: Path, at: Path) -> str | None:
    """Let the kernel repair the image by mounting it; return the errors."""
    with kernel_mounted(path, at):
        pass
    return unclean(path)


@contextmanager
def kernel_mounted(image: Path, at: Path, options: str = "noatime") -> Iterator[Path]:
    """Mount the image with the kernel."""
    at.mkdir(exist_ok=True)
    run("mount", "-t", "ext3", "-o", f"loop,{options}", image, at)
    try:
        yield at
    finally:
        run("umount", at)


def scratch() -> Path | None:
    """Return a directory in memory if possible, because e2fsck syncs its writes."""
    return Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
