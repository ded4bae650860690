"""Set-ID bits go where they go on ext3, and no kind of stat tells of one that is gone."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import set_ids
from tests.support.mounts import cowfs, mounted, project_root
from tests.support.squashfs import mksquashfs
from tests.support.system import needs_fuse, needs_root, run

pytestmark = [needs_fuse, needs_root]
DEV_FUSE_AT_NIGHT = True


def results(directory: Path) -> dict[str, Any]:
    done = run(sys.executable, "-m", "tests.support.set_ids", directory, cwd=project_root())
    return {name: _asked(name, told) for name, told in json.loads(done.stdout).items()}


def _asked(name: str, told: list[Any]) -> list[Any]:
    """Without what nobody asks for: a change of the ACL tells the kernel no mode, and AT_STATX_DONT_SYNC asks
    for none (fuse_update_get_attr() of the kernel)."""
    return [told[0], told[1][1:], told[2]] if name.startswith("acl") else told


@pytest.mark.parametrize(
    "store", ["image", pytest.param("directory", marks=pytest.mark.nightly)]
)  # fmt: skip
def test_set_id_bits(tmp_path: Path, ext3: Path, store: str) -> None:
    bare, beside = ext3 / tmp_path.name, ext3 / f"store of {tmp_path.name}"
    set_ids.build(bare)
    set_ids.build(tmp_path / "lower")
    at = tmp_path / "store" if store == "image" else beside
    if store == "image":
        cowfs("create", at, "100", check=True)
    try:
        wanted = results(bare)
        with mounted(tmp_path / "lower", tmp_path / "mnt", at) as here:
            found = results(here.path)
    finally:
        shutil.rmtree(bare)
        shutil.rmtree(beside, ignore_errors=True)
    assert len(wanted) == 1025
    assert {name: (found[name], told) for name, told in wanted.items() if found[name] != told} == {}


@pytest.mark.parametrize("kind", ["squashfs", "directory"])
def test_writing_through_mmap_leaves_capabilities(tmp_path: Path, kind: str) -> None:
    """As on ext3. write(2) removes them."""
    lower = tmp_path / "lower"
    lower.mkdir()
    (lower / "below").write_bytes(b"below")
    place = mksquashfs(tmp_path / "image", lower) if kind == "squashfs" else lower
    cowfs("create", tmp_path / "store", "16", check=True)
    value = struct.pack("<IIIII", 0x2000001, 1 << 13, 0, 0, 0)
    with mounted(place, tmp_path / "mnt", tmp_path / "store", engine="process") as mount:
        (mount.path / "new").write_bytes(b"above")
        for name in ("below", "new"):
            path = mount.path / name
            os.setxattr(path, "security.capability", value)
            with path.open("r+b", buffering=0) as file:
                with mmap.mmap(file.fileno(), 0) as memory:
                    memory[0] = ord("X")
                    memory.flush()
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                assert os.getxattr(path, "security.capability") == value
                assert path.read_bytes()[:1] == b"X"
                file.write(b"Y")
            assert "security.capability" not in os.listxattr(path)
