"""sysresccd-backstore: the command of the SystemRescueCd manual, with its arguments and limits."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from cowfs.store.served.open import open_store
from tests.support.mounts import project_root
from tests.support.system import as_nobody_prefix, needs_root, run

DEV_FUSE_AT_NIGHT = True

SCRIPT = Path(project_root(), "mount-helpers", "sysresccd-backstore")
COWFS = Path(project_root(), ".venv", "bin", "cowfs")
MIB = 1 << 20

pytestmark = [
    needs_root,
    pytest.mark.skipif(
        not COWFS.exists() and shutil.which("cowfs") is None, reason="cowfs is not installed (make setup)"
    ),
]


def backstore(*arguments: object, prefix: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    return run(*(prefix or []), SCRIPT, *map(str, arguments), check=False)


def refused(done: subprocess.CompletedProcess[str], said: str) -> None:
    assert done.returncode == 1
    assert said in done.stderr


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "sysrcd.bs"
    assert backstore("create", path, 32).returncode == 0
    return path


def size_of(path: Path) -> int:
    shown = run("dumpe2fs", "-h", path).stdout
    return 4096 * int(next(line.split()[2] for line in shown.splitlines() if line.startswith("Block count:")))


def test_create_and_grow(store: Path) -> None:
    assert store.stat().st_size == size_of(store) == 32 * MIB
    assert run("blkid", "-p", "-s", "TYPE", "-o", "value", store).stdout == "ext3\n"
    assert backstore("grow", store, 48).returncode == 0
    assert store.stat().st_size == size_of(store) == 48 * MIB
    assert run("e2fsck", "-fn", store).returncode == 0
    open_store(str(store)).close()


@pytest.mark.parametrize("arguments", [("growfs",), ("growfs", 64)], ids=["FILE", "FILE MB"])
def test_growfs_fills_the_file(store: Path, arguments: tuple[object, ...]) -> None:
    os.truncate(store, 64 * MIB)
    done = backstore(arguments[0], store, *arguments[1:])
    assert done.returncode == 0, done.stderr
    assert size_of(store) == 64 * MIB


def test_names_may_be_odd(tmp_path: Path) -> None:
    name = "-a b'c\"$d.bs"
    done = subprocess.run([SCRIPT, "create", name, "16"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("size", ["15", "32769", "x", "", "-1", "1.5", "16M", "99999999999999999999"])
def test_the_size_is_a_whole_number_from_16_to_32768(store: Path, tmp_path: Path, size: str) -> None:
    refused(backstore("create", tmp_path / "new", size), "from 16 to 32768")
    refused(backstore("grow", store, size), "from 16 to 32768")
    assert os.listdir(tmp_path) == ["sysrcd.bs"]
    assert store.stat().st_size == 32 * MIB


def test_it_refuses_what_the_manual_refuses(store: Path) -> None:
    refused(backstore("create", store, 32), "already exists")
    refused(backstore("grow", store, 16), "is 32 MiB")
    refused(backstore("grow", store.with_name("missing"), 32), "no such store")
    refused(backstore("growfs", store.with_name("missing")), "no such store")
    opened = open_store(str(store))
    refused(backstore("grow", store, 48), "in use by process")
    opened.close()
    assert store.stat().st_size == 32 * MIB


@pytest.mark.parametrize(
    "arguments", [(), ("shrink", "f", "32"), ("create", "f"), ("grow", "f", "32", "x"), ("growfs",)]
)
def test_a_wrong_command_line_shows_the_usage(arguments: tuple[str, ...]) -> None:
    done = backstore(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert "create FILE MB" in done.stderr


def test_help_is_no_error() -> None:
    done = backstore("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "example:" in done.stdout
    assert "boot" not in done.stdout, "nothing is found at boot"


def test_it_needs_root(nobody_path: Path) -> None:
    script = nobody_path / "sysresccd-backstore"
    shutil.copy(SCRIPT, script)
    done = run(*as_nobody_prefix(), script, "create", nobody_path / "s", "16", check=False)
    refused(done, "must be run as root")


def test_installed_beside_cowfs_and_nothing_of_the_callers_path(tmp_path: Path) -> None:
    """Root runs it, so it runs nothing from the caller's PATH and imports no Python of the caller's."""
    script = tmp_path / "bin" / "sysresccd-backstore"
    script.parent.mkdir()
    shutil.copy(SCRIPT, script)
    called = tmp_path / "called"
    other = tmp_path / "other"
    other.mkdir()
    for place, name in ((other, "cowfs"), (other, "id"), (other, "dirname"), (script.parent, "cowfs")):
        (place / name).write_text(f'#!/bin/sh\necho {place.name} "$@" $PYTHONPATH >>{called}\n')
        (place / name).chmod(0o755)
    env = {"PATH": f"{other}:/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": str(other)}
    assert run(script, "create", tmp_path / "s", "16", env=env, cwd=other).returncode == 0
    assert called.read_text() == f"bin create {tmp_path}/s 16\n"
    called.unlink()
    (script.parent / "cowfs").unlink()
    done = run(script, "create", tmp_path / "s", "16", check=False, env=env)
    if not any(os.access(f"{place}/cowfs", os.X_OK) for place in ("/usr/bin", "/bin", "/usr/local/bin")):
        refused(done, "cowfs is not installed")
    assert not called.exists()
