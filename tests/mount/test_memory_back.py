"""The daemon returns the memory of inodes that the kernel has forgotten."""

from __future__ import annotations

import os
from pathlib import Path

from cowfs.linux import mount_table, mounts
from tests.support.mounts import eventually, mounted
from tests.support.squashfs import mksquashfs, needs_mksquashfs
from tests.support.system import needs_fuse, needs_root

DEV_FUSE_AT_NIGHT = True
pytestmark = [needs_fuse, needs_root, needs_mksquashfs]

FILES = 10_000
LARGE = 48 << 20


def memory(pid: int) -> int:
    """Bytes of a process that are on no disk."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) << 10


def test_memory_is_given_back(tmp_path: Path) -> None:
    """The kernel drops what it knew when memory is short: so do we then, with our caches."""
    lower = tmp_path / "lower"
    for number in range(FILES):
        place = lower / f"{number // 1000}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"name-{number}").touch()
    (lower / "large").write_bytes(b"text\n" * (LARGE // 5))
    image = mksquashfs(tmp_path / "image", lower)
    at = tmp_path / "mnt"
    with mounted(image, at, "memory") as mount:
        pid = mount.pid()
        before = memory(pid)
        for directory, _, names in os.walk(at):
            for name in names:
                os.stat(f"{directory}/{name}")
        text = (at / "large").read_bytes()
        full = memory(pid)
        assert full - before > 24 << 20, "there is something to give back"
        found = mount_table.mount_of(at)
        assert found is not None

        def is_given_back() -> bool:
            mounts.drop_unused(os.fspath(at), found.dev)
            return memory(pid) - before < (full - before) // 2

        eventually(is_given_back, f"of {full - before} bytes half are given back", 20)
        assert (at / "large").read_bytes() == text
        assert len(os.listdir(at / "0")) == 1000
