"""The control socket belongs to the owner of the mount: nobody takes its name, or answers in its place."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cowfs.cli.client import find_mount
from tests.support.mounts import cowfs, eventually, force_umount, is_mounted, mounted
from tests.support.system import NOBODY, needs_fuse, needs_root, run

pytestmark = [needs_fuse, needs_root]

STRANGER = 65533


@pytest.fixture
def lower(nobody_path: Path) -> Path:
    made = nobody_path / "lower"
    made.mkdir()
    (made / "file").write_text("content")
    return made


def as_stranger(script: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a Python script as another ordinary user; return when it has printed a line."""
    prefix = ["setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups", "--"]
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


LISTEN = """
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1].replace("@", chr(0), 1))
listener.listen(8)
print("ready", flush=True)
while True:
    connection, _ = listener.accept()
    message, fds, _, _ = socket.recv_fds(connection, 65536, 8)
    connection.sendall(b'{"pid": 1, "taken": true}\\n{"end": true}\\n')
"""


@contextmanager
def impostor(address: str) -> Iterator[None]:
    process = as_stranger(LISTEN, address)
    try:
        yield
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_names_that_anybody_can_take_are_not_asked(lower: Path, nobody_path: Path) -> None:
    """Abstract addresses have no owner: an impostor there, with the number of the mount, hears nothing."""
    with mounted(lower, nobody_path / "mnt") as here:
        found = find_mount(str(here.path))
        assert found is not None
        with impostor(f"@cowfs-{found.dev}"):
            assert '"taken"' not in cowfs("info", here.path, "--json", check=True).stdout


@pytest.mark.parametrize("mode", [0o755, 0o777])
def test_a_directory_that_a_stranger_has_made_is_refused(lower: Path, nobody_path: Path, mode: int) -> None:
    """As the victim's own runtime directory: no daemon goes there, and no client."""
    runtime = nobody_path / "runtime"
    runtime.mkdir(mode=0o755)
    os.chown(runtime, NOBODY, NOBODY)
    (runtime / "cowfs").mkdir()
    os.chown(runtime / "cowfs", STRANGER, STRANGER)
    os.chmod(runtime / "cowfs", mode)
    (nobody_path / "mnt").mkdir()
    os.chown(nobody_path / "mnt", NOBODY, NOBODY)
    with mounted(lower, nobody_path / "mnt", nobody=True) as here:
        found = find_mount(str(here.path))
        assert found is not None
        with impostor(f"{runtime}/cowfs/{found.dev}"):
            shown = cowfs(
                "info", here.path, "--json", nobody=True, env={"XDG_RUNTIME_DIR": str(runtime)}, check=True
            )
        assert '"taken"' not in shown.stdout


def test_a_mount_whose_socket_a_stranger_could_replace_fails(lower: Path, nobody_path: Path) -> None:
    taken = Path("/tmp/cowfs-65532")
    taken.mkdir(mode=0o755)
    try:
        os.chown(taken, STRANGER, STRANGER)
        mountpoint = nobody_path / "mnt"
        mountpoint.mkdir()
        os.chown(mountpoint, 65532, 65532)
        done = run(
            "setpriv", "--reuid=65532", "--regid=65532", "--clear-groups", "--", sys.executable, "-m",
            "cowfs.cli.main", "mount", lower, mountpoint, check=False,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        )  # fmt: skip
        assert done.returncode == 2, done
        assert f"{taken}: cannot hold the control socket" in done.stderr
        assert not is_mounted(mountpoint)
    finally:
        taken.rmdir()


def test_requests_that_are_none_are_refused(lower: Path, nobody_path: Path) -> None:
    with mounted(lower, nobody_path / "mnt") as here:
        found = find_mount(str(here.path))
        assert found is not None
        for garbage in (b"", b"\n", b"garbage\n", b"[1, 2]\n", b'{"command": []}\n', b"\xff\n", b"{" * 70000):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(f"/run/cowfs/{found.dev}")
                client.sendall(garbage)
                client.shutdown(socket.SHUT_WR)
                with suppress(ConnectionResetError):  # it has not read all of it
                    assert b'"error"' in client.makefile("rb").read()
        assert here.pid() > 0


@pytest.mark.parametrize("nobody", [False, True], ids=["root", "nobody"])
def test_only_the_owner_can_touch_the_socket(lower: Path, nobody_path: Path, nobody: bool) -> None:
    with mounted(lower, nobody_path / "mnt", nobody=nobody) as here:
        found = find_mount(str(here.path))
        assert found is not None
        directory = Path("/tmp/cowfs-65534" if nobody else "/run/cowfs")
        above, socket_ = directory.stat(), (directory / found.dev).stat()
        assert {above.st_uid, socket_.st_uid} == {NOBODY if nobody else 0}
        assert stat.S_IMODE(above.st_mode) & 0o022 == 0 and stat.S_IMODE(socket_.st_mode) == 0o600
        place = directory / found.dev
    assert not place.exists(), "a socket is left behind"


def test_strangers_are_told_whose_the_mount_is(lower: Path, nobody_path: Path) -> None:
    with mounted(lower, nobody_path / "mnt") as here:
        done = cowfs("info", here.path, nobody=True)
        assert done.returncode != 0 and "belongs to another user (uid 0)" in done.stderr


def test_no_file_of_roots_is_handed_to_a_users_daemon(lower: Path, nobody_path: Path) -> None:
    with mounted(lower, nobody_path / "mnt", nobody=True) as here:
        done = cowfs("persist", here.path, nobody_path / "kept.bs", "64")
        assert done.returncode != 0 and "is not given files of yours" in done.stderr
        assert not (nobody_path / "kept.bs").exists()


def test_root_unmounts_what_is_a_users(lower: Path, nobody_path: Path) -> None:
    """Without handing anything over; the daemon is asked to save all the same."""
    with mounted(lower, nobody_path / "mnt", nobody_path / "store", nobody=True) as here:
        pid = here.pid()
        assert cowfs("umount", here.path).returncode == 0
        assert not is_mounted(here.path)
        eventually(lambda: not Path(f"/proc/{pid}").exists(), "the daemon has ended")
    assert not here.trouble()


def test_what_a_killed_daemon_left_is_replaced(lower: Path, nobody_path: Path) -> None:
    with mounted(lower, nobody_path / "mnt", quiet=False) as here:
        found = find_mount(str(here.path))
        assert found is not None
        dead = Path("/run/cowfs", found.dev)
        os.kill(here.pid(), signal.SIGKILL)
        eventually(lambda: not _listens(dead), "the daemon is gone")
        force_umount(here.path)
    assert dead.exists(), "a killed process removes nothing; or the test looks in the wrong place"
    for again in range(50):  # until the kernel gives the same number
        with mounted(lower, nobody_path / f"again{again}") as here:
            now = find_mount(str(here.path))
            assert now is not None
            assert here.pid() > 0
            if now.dev == found.dev:
                return
    pytest.skip("the number of the killed mount was not given again")


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0
