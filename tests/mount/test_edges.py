"""Thousands of situations at the edges of POSIX: what calls answer and leave is as on bare ext3."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.mounts import cowfs, mounted, project_root
from tests.support.squashfs import mksquashfs
from tests.support.system import needs_fuse, needs_root, run

pytestmark = [needs_fuse, needs_root, pytest.mark.nightly, pytest.mark.timeout(1800)]
SITUATIONS = 5000
"""At least this many are tested."""


def edges(what: str, directory: Path) -> str:
    """Build the things, or do the calls."""
    directory.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.support.edges", what]
    return run(*command, directory, cwd=project_root(), timeout=1500).stdout


def unlike(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the differences, except of chown(2) without an owner: FUSE passes none of its fields on."""
    return {
        said: (found.get(said), told)
        for said, told in wanted.items()
        if found.get(said) != told and ", chown nothing: " not in said
    }


@pytest.fixture(scope="module")
def wanted(ext3: Path) -> dict[str, Any]:
    """The results on bare ext3."""
    edges("build", ext3 / "bare")
    told: dict[str, Any] = json.loads(edges("run", ext3 / "bare"))
    shutil.rmtree(ext3 / "bare")
    return told


@pytest.mark.parametrize("below", ["squashfs"])
@pytest.mark.parametrize("kind", ["image"])
def test_edges(tmp_path: Path, ext3: Path, wanted: dict[str, Any], kind: str, below: str) -> None:
    """The things are in a lower, or were made in the mount."""
    lower, beside = tmp_path / "lower", ext3 / f"store of {tmp_path.name}"
    lower.mkdir()
    if below != "nothing":
        edges("build", lower)
    if below == "squashfs":
        lower = mksquashfs(tmp_path / "image", lower)
    store = beside if kind == "directory" else tmp_path / "store"
    if kind != "directory":
        cowfs("create", store, "400", check=True)
    engine = "kernel" if kind == "kernel" else None
    try:
        with mounted(lower, tmp_path / "mnt", store, engine=engine, options=["suid", "dev"]) as here:
            if below == "nothing":
                edges("build", here.path)
            found = json.loads(edges("run", here.path))
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    assert len(wanted) > SITUATIONS
    assert unlike(found, wanted) == {}
    if kind != "directory":
        assert run("e2fsck", "-fn", store, check=False).returncode == 0
