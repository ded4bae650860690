"""Every call on names and files answers as on ext3: errors, kinds of files, permissions, descriptors."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.mounts import cowfs, mounted, project_root
from tests.support.system import needs_fuse, needs_root, run

pytestmark = [needs_fuse, needs_root]
DEV_FUSE_AT_NIGHT = True
LINES = 1600
"""The table has more."""


def answers(directory: Path) -> dict[str, Any]:
    """Run the table in a new directory."""
    directory.mkdir()
    done = run(sys.executable, "-m", "tests.support.calls", directory, cwd=project_root())
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param("image", (), id="image"),
        pytest.param("directory", (), marks=pytest.mark.nightly, id="directory"),
        pytest.param("directory", ("passthrough=off",), marks=pytest.mark.nightly, id="through the daemon"),
        pytest.param("kernel", (), marks=pytest.mark.nightly, id="kernel"),
    ],
)
def test_calls(tmp_path: Path, ext3: Path, kind: str, options: tuple[str, ...]) -> None:
    (tmp_path / "lower").mkdir()
    bare, beside = ext3 / tmp_path.name, ext3 / f"store of {tmp_path.name}"
    store = beside if kind == "directory" else tmp_path / "store"
    if kind != "directory":
        cowfs("create", store, "100", check=True)
    engine = "kernel" if kind == "kernel" else None
    try:
        wanted = answers(bare)
        options = ("suid", "dev", *options)
        with mounted(tmp_path / "lower", tmp_path / "mnt", store, engine=engine, options=options) as here:
            found = answers(here.path / "new")
    finally:
        for place in (bare, beside):
            shutil.rmtree(place, ignore_errors=True)
    assert len(wanted) > LINES
    assert {said: (found[said], told) for said, told in wanted.items() if found[said] != told} == {}
