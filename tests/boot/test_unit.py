"""The systemd unit, run without systemd: its commands, as systemd would run them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from cowfs.linux.privileges import CAPABILITIES
from tests.boot.images import HELPERS
from tests.support.mounts import COWFS, cowfs, force_umount, is_mounted, project_root
from tests.support.system import needs_fuse, needs_root, run

UNIT = HELPERS / "systemd/cowfs@.service"


def commands(environment: dict[str, str]) -> dict[str, list[str]]:
    """Return the Exec lines of the unit, with the variables of the environment file replaced."""
    found = {}
    for key, line in re.findall(r"^(Exec\w+)=(.*)$", UNIT.read_text(), re.MULTILINE):
        words = [
            re.sub(r"\$\{(\w+)\}", lambda match: environment[match[1]], word) for word in shlex.split(line)
        ]
        if key == "ExecStopPost":  # a shell command
            found[key] = [
                "sh",
                "-c",
                words[2].replace("$$", "$").replace("/usr/bin/cowfs", shlex.join(COWFS)),
            ]
            continue
        assert words[0] == "/usr/bin/cowfs"
        found[key] = [*COWFS, *words[1:]]
    return found


def example() -> dict[str, str]:
    lines = (HELPERS / "systemd/cowfs.conf.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if not line.startswith("#"))


@needs_root
@needs_fuse
def test_ready_when_it_answers_and_clean_when_it_has_stopped(tmp_path: Path) -> None:
    (tmp_path / "lower").mkdir()
    (tmp_path / "lower/file").write_text("x")
    place, store = tmp_path / "merged tree", tmp_path / "my store.bs"
    place.mkdir()
    cowfs("create", store, "16", check=True)
    settings = example() | {
        "LOWER": str(tmp_path / "lower"), "STORE": str(store), "MOUNTPOINT": str(place),
    }  # fmt: skip
    lines = commands(settings)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        environment = {
            **os.environ, "PYTHONPATH": project_root(), "NOTIFY_SOCKET": str(tmp_path / "notify"),
        }  # fmt: skip
        service = subprocess.Popen(lines["ExecStart"], env=environment)
        try:
            told = manager.recv(4096).decode().splitlines()
            assert told == ["READY=1", f"MAINPID={service.pid}"]
            assert (place / "file").read_text() == "x"
            (place / "new").write_text("y")
            run(*lines["ExecStop"], env=environment)
            assert service.wait(30) == 0
        finally:
            if is_mounted(place):
                force_umount(place)
            service.wait(30)
    assert cowfs("check", "-n", store).returncode == 0
    assert run("debugfs", "-R", "cat /upper/new", store).stdout == "y"


@needs_root
@needs_fuse
@pytest.mark.parametrize("ended", ["killed", "exited"])
def test_a_killed_daemon_leaves_no_dead_mount(tmp_path: Path, ended: str) -> None:
    """After any other end, what is mounted there is not the unit's."""
    (tmp_path / "lower").mkdir()
    place = tmp_path / "merged tree"
    place.mkdir()
    settings = example() | {"LOWER": str(tmp_path / "lower"), "STORE": "memory", "MOUNTPOINT": str(place)}
    cowfs("mount", tmp_path / "lower", place, check=True)
    try:
        run(*commands(settings)["ExecStopPost"], env={**os.environ, **settings, "EXIT_CODE": ended})
        assert is_mounted(place) == (ended == "exited")
    finally:
        if is_mounted(place):
            force_umount(place)


def test_the_example_sets_what_the_unit_wants() -> None:
    assert set(re.findall(r"\$\{(\w+)\}", UNIT.read_text())) == set(example())


def test_the_sandbox_lets_the_mount_out() -> None:
    """systemd.exec(5): with any of these, a service has its own mount namespace, which hides its mounts."""
    namespace = (
        r"^(Private\w+|Protect(System|Home|Kernel\w+|Control\w+|Proc|Hostname)|Root\w+|MountFlags|DynamicUser"
    )
    namespace += r"|\w*(Paths|BindPaths|FileSystem|Directory|Images))="
    assert not re.findall(namespace, UNIT.read_text(), re.MULTILINE)


def test_the_sandbox_keeps_the_capabilities_that_the_daemon_keeps() -> None:
    (kept,) = re.findall(r"^CapabilityBoundingSet=(.*)$", UNIT.read_text(), re.MULTILINE)
    assert set(kept.split()) == set(CAPABILITIES)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_likes_the_sandbox(tmp_path: Path) -> None:
    shutil.copy(UNIT, tmp_path / "cowfs@x.service")
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=50"]
    done = run(*command, tmp_path / "cowfs@x.service", check=False)
    if "Unknown" in done.stderr or "unrecognized" in done.stderr:
        pytest.skip("this systemd-analyze is too old")
    assert "Overall exposure level" in done.stdout
    assert done.returncode == 0, done.stdout
