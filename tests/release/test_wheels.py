"""The wheel for each installed Python can be installed, and mounts. Nightly."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.release.test_bare_debian import CACHE, Bare
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
    for library in (tmp_path / "venv").rglob("cowfs/**/*.so"):
        assert "PATH" not in run("readelf", "-d", library).stdout, f"{library} looks for libraries elsewhere"
    for name in ("lower", "mnt"):
        (tmp_path / name).mkdir()
    cowfs = tmp_path / "venv/bin/cowfs"
    run(cowfs, "create", tmp_path / "store.bs", "32M")
    run(cowfs, "mount", tmp_path / "lower", tmp_path / "mnt", "--store", tmp_path / "store.bs")
    (tmp_path / "mnt/new").touch()
    assert run(cowfs, "diff", tmp_path / "mnt").stdout == "A  new\n"
    run(cowfs, "umount", tmp_path / "mnt")
    assert run(tmp_path / "venv/bin/cowfs-overlay", "--version").stdout.startswith("cowfs-overlay: version ")


_MADE_AND_USED = """\
scripts/setup --packages
PYTHONS=/usr/bin/python3 scripts/wheels /tmp/made
python3 -m venv /tmp/venv
/tmp/venv/bin/pip install -q /tmp/made/*.whl
cd /tmp
mkdir lower mnt
cowfs=/tmp/venv/bin/cowfs
$cowfs create store.bs 32M
$cowfs mount lower mnt --store store.bs
touch mnt/new
test "$($cowfs diff mnt)" = 'A  new'
$cowfs umount mnt
"""


@pytest.mark.timeout(3600)
@pytest.mark.skipif(shutil.which("debootstrap") is None, reason="needs debootstrap (scripts/setup --boot)")
def test_a_wheel_of_the_python_to_come() -> None:
    """Debian unstable's Python, the newest."""
    CACHE.mkdir(parents=True, exist_ok=True)
    bare = Bare("sid")
    bare.run(f"set -e; {_MADE_AND_USED}")
    bare.remove()
