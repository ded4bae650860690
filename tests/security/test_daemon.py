"""Root's cowfs runs with little: its own programs and environment, and no privilege that it does not need."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.support.mounts import cowfs, is_mounted, project_root
from tests.support.system import needs_fuse, needs_root, run

pytestmark = [needs_fuse, needs_root]

HELPERS = Path(project_root()) / "mount-helpers"
INSTALLED = Path(sys.executable).parent / "cowfs"


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    made = tmp_path / "lower"
    (made / "dir").mkdir(parents=True)
    (made / "file").write_text("below\n")
    (made / "dir" / "gone").write_text("gone\n")
    return made


@pytest.fixture
def store(tmp_path: Path) -> Path:
    cowfs("create", tmp_path / "store", "16", check=True)
    return tmp_path / "store"


# --- what the caller left lying about


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A directory of programs, and of modules of Python, that all leave ``sprung`` behind."""
    made = tmp_path / "trap"
    (made / "cowfs").mkdir(parents=True)
    for name in ("e2fsck", "mke2fs", "resize2fs", "e2image", "fusermount3", "umount", "cowfs-", "id", "env"):
        (made / name).write_text(f"#!/bin/sh\n: >{made}/sprung\nexit 1\n")
        (made / name).chmod(0o755)
    for name in ("json.py", "argparse.py", "sitecustomize.py", "cowfs/__init__.py"):
        (made / name).write_text(f"open('{made}/sprung', 'w').close()\n")
    return made


def test_no_program_of_the_callers_path(trap: Path, store: Path) -> None:
    env = {"PATH": f"{trap}:{os.environ['PATH']}"}
    cowfs("create", trap.parent / "other", "16", env=env, check=True)
    cowfs("grow", store, "32", env=env, check=True)
    cowfs("check", store, env=env, check=True)
    run(INSTALLED, "create", "third", "16", env={"PATH": f":{os.environ['PATH']}"}, cwd=trap)
    assert not (trap / "sprung").exists()


@pytest.mark.parametrize("name", ["MKE2FS_CONFIG", "E2FSCK_CONFIG", "LD_LIBRARY_PATH", "E2FSPROGS_FAKE_TIME"])
def test_programs_get_no_environment_of_the_callers(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from cowfs.linux import programs
    from cowfs.store import tools

    monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(programs, "find", lambda _: "/usr/bin/env")
    assert sorted(tools.run(["e2fsck"]).stdout.split()) == [
        b"LC_ALL=C",
        f"PATH={programs.SAFE_PATH}".encode(),
    ]


def test_a_configuration_of_the_callers_makes_no_other_store(tmp_path: Path) -> None:
    (tmp_path / "conf").write_text(
        "[defaults]\n\tbase_features = sparse_super2,none_such\n\tblocksize = 1024\n"
    )
    cowfs("create", tmp_path / "s", "16", env={"MKE2FS_CONFIG": str(tmp_path / "conf")}, check=True)


def test_nothing_is_imported_from_the_current_directory(trap: Path, lower: Path) -> None:
    clean = {"PATH": os.environ["PATH"]}
    run(INSTALLED, "create", "new", "16", cwd=trap, env=clean)
    run(INSTALLED, "check", "new", cwd=trap, env=clean)
    mountpoint = trap.parent / "mnt"
    mountpoint.mkdir()
    hostile = {"PATH": f"{trap}:{os.environ['PATH']}", "PYTHONPATH": str(trap), "PYTHONHOME": str(trap)}
    run(HELPERS / "mount.cowfs", lower, mountpoint, "-o", "store=memory", cwd=trap, env=hostile)
    try:
        assert (mountpoint / "file").read_text() == "below\n"
    finally:
        run(HELPERS / "umount.cowfs", mountpoint, cwd=trap, env=hostile)
    assert not is_mounted(mountpoint)
    assert not (trap / "sprung").exists()
