"""A wheel for each Python that is here: it installs, and what it installs mounts. For the night."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.support.mounts import project_root
from tests.support.system import needs_fuse, needs_root, run

pytestmark = [needs_root, needs_fuse, pytest.mark.nightly, pytest.mark.timeout(900)]

PROJECT = Path(project_root())
PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_a_wheel_mounts(version: str, tmp_path: Path) -> None:
    python = next(map(str, PYENV.glob(f"{version}.*/bin/python3")), None) or shutil.which(f"python{version}")
    if python is None:
        pytest.skip(f"needs Python {version}")
    wheel = run(
        *(PROJECT / "scripts/wheels", tmp_path / "made"), env={**os.environ, "PYTHONS": python}, timeout=400
    ).stdout.strip()
    assert f"-cp{version.replace('.', '')}-" in wheel
    run(python, "-m", "venv", tmp_path / "venv", timeout=100)
    run(tmp_path / "venv/bin/python", "-m", "pip", "install", "--quiet", wheel, timeout=400)
    for name in ("lower", "mnt"):
        (tmp_path / name).mkdir()
    cowfs = tmp_path / "venv/bin/cowfs"
    run(cowfs, "create", tmp_path / "store.bs", "32M")
    run(cowfs, "mount", tmp_path / "lower", tmp_path / "mnt", "--store", tmp_path / "store.bs")
    (tmp_path / "mnt/new").touch()
    assert run(cowfs, "diff", tmp_path / "mnt").stdout == "A  new\n"
    run(cowfs, "umount", tmp_path / "mnt")
    assert run(tmp_path / "venv/bin/cowfs-overlay", "--version").stdout.startswith("cowfs-overlay: version ")
