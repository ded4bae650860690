"""What ends or happens during an export."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
from contextlib import suppress
from pathlib import Path
from shutil import which

import pytest

from cowfs.errors import SystemFailure
from cowfs.exports.target import new_file
from tests.support.mounts import COWFS, cowfs, eventually, mounted, project_root
from tests.support.system import needs_fuse

DEV_FUSE_AT_NIGHT = True

pytestmark = needs_fuse


@pytest.mark.parametrize(
    ("number", "style"),
    [(signal.SIGKILL, "gnutar"), (signal.SIGTERM, "gnutar"), (signal.SIGKILL, "squashfs")],
)
def test_what_is_killed_leaves_nothing(tmp_path: Path, number: int, style: str) -> None:
    if style == "squashfs" and which("tar2sqfs") is None:
        pytest.skip("needs tar2sqfs (squashfs-tools-ng)")
    (tmp_path / "lower").mkdir()
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as here:
        (here.path / "f").touch()
        os.truncate(here.path / "f", 1 << 36)
    target = tmp_path / "target"
    target.mkdir()
    command = [*COWFS, "export", str(tmp_path / "store"), "--to", style, str(target / "x")]
    env = {**os.environ, "PYTHONPATH": project_root()}
    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as process:
        eventually(lambda: _is_writing(process.pid, target), "nothing is written")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(number)
        process.wait(20)
    assert os.listdir(target) == []
    eventually(lambda: not any(map(_is_alive, children)), "a program goes on writing")


def _is_alive(pid: str) -> bool:
    """Whether a process is there and not a zombie."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _is_writing(pid: int, target: Path) -> bool:
    """Whether a process has written something to a file without a name in a directory."""
    for fd in os.listdir(f"/proc/{pid}/fd"):
        place = f"/proc/{pid}/fd/{fd}"
        try:
            if os.readlink(place).startswith(str(target)) and stat.S_ISREG(os.stat(place).st_mode):
                return os.stat(place).st_size > 0
        except FileNotFoundError:
            continue
    return False


def test_a_directory_that_is_removed_meanwhile_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    file = tmp_path / "out/file"
    with pytest.raises(SystemFailure) as caught, new_file(str(file), force=False):
        (tmp_path / "out").rmdir()
    assert str(caught.value) == (
        f"{file}: cannot be written: No such file or directory"
        f" (its directory was removed meanwhile: mkdir -p {tmp_path}/out, and try again)"
    )


@pytest.mark.parametrize("kind", ["image", "directory"])
def test_what_is_read_is_never_overwritten(tmp_path: Path, kind: str) -> None:
    store, lower = tmp_path / "store", tmp_path / "lower"
    (lower / "sub").mkdir(parents=True)
    if kind == "image":
        assert cowfs("create", store, "16").returncode == 0
    before: set[tuple[str, int]] = set()
    with mounted(lower, tmp_path / "mnt", store) as here:
        (here.path / "new").write_text("new")
        mountpoint = str(here.path)
        for what in (mountpoint, str(store)):
            if what != mountpoint:
                here.umount()
            target = str(store if kind == "image" else store / "upper/sub")
            before = _files(store)
            commands: list[tuple[str, ...]] = [
                ("backup", what, target, "--force"),
                ("export", what, target, "--to", "tar", "--force"),
                ("report", what, "-O", target, "--force"),
                ("du", what, "--treemap", target, "--force"),
            ]
            for command in commands[: 2 if what == mountpoint else None]:
                done = cowfs(*command)
                where = "is the store" if kind == "image" else "is inside the store"
                assert done.returncode == 1 and f"{target}: {where} that is read (" in done.stderr
            assert _files(store) == before
            inside = lower / "sub/whole"  # would contain itself
            done = cowfs("export", what, inside, "--to", "overlayfs", "--merged")
            assert done.returncode == 1 and "is inside a lower of the store that is read" in done.stderr
    done = cowfs("restore", store, store, "--force")
    assert done.returncode == 1 and _files(store) == before


def _files(store: Path) -> set[tuple[str, int]]:
    """The files of a store, each with its inode number, which another one in its place does not have."""
    files = [store] if store.is_file() else (each for each in store.rglob("*") if each.is_file())
    return {(str(each), each.stat().st_ino) for each in files}
