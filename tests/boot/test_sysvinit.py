"""The script for sysvinit, run without sysvinit: what it runs, and when it does nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.boot.images import HELPERS
from tests.support.system import run

SCRIPT = HELPERS / "sysvinit/cowfs-shutdown"


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """The /run of a system that has booted from cowfs, with fake programs that record how they run."""
    (tmp_path / "initramfs/cowfs").mkdir(parents=True)
    (tmp_path / "initramfs/cowfs/daemon.pid").write_text("7\n")
    end = tmp_path / "initramfs/shutdown"
    end.write_text('#!/bin/sh\necho "$@"\n')
    end.chmod(0o755)
    return tmp_path


def told(system: Path, action: str = "stop", **environment: str) -> list[str]:
    done = run(SCRIPT, action, env={**os.environ, "COWFS_RUN": str(system), **environment})
    return done.stdout.split()


@pytest.mark.parametrize(
    ("environment", "verb"),
    [
        ({"RUNLEVEL": "6"}, "reboot"),
        ({"RUNLEVEL": "0"}, "poweroff"),
        ({"RUNLEVEL": "0", "INIT_HALT": "HALT"}, "halt"),
        ({"RUNLEVEL": "0", "INIT_HALT": "POWEROFF"}, "poweroff"),
        ({"RUNLEVEL": "6", "INIT_HALT": "HALT"}, "reboot"),
    ],
)
def test_ends_the_system_as_it_was_asked_to(system: Path, environment: dict[str, str], verb: str) -> None:
    said, *waiting = told(system, **environment)
    assert said == verb
    assert waiting[0] == str(os.getpid()), "who has started it is waiting for it"


def test_another_root_is_left_to_halt_and_reboot(system: Path) -> None:
    (system / "initramfs/cowfs/daemon.pid").unlink()
    assert told(system, RUNLEVEL="0") == []
    (system / "initramfs/shutdown").unlink()
    assert told(system, RUNLEVEL="0") == []


def test_does_nothing_when_the_system_starts(system: Path) -> None:
    assert told(system, "start", RUNLEVEL="0") == []
