"""Set-ID bits go where they go on ext3, and no kind of stat tells of one that is gone."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import set_ids
from tests.support.mounts import cowfs, mounted, project_root
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
