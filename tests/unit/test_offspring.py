"""All processes of a command end, and a command that cannot run is reported."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from cowfs.cli.run import _start
from tests.support.mounts import project_root

FORKS_ON = """
import os, signal, sys, time
from cowfs.linux import offspring
spared = offspring.become_subreaper()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    for _ in range(5000):
        if os.fork():
            os._exit(0)
        time.sleep(0.002)
    os._exit(0)
ended, left = offspring.end_all(spared, patience=0.2)
print(len(ended) > 1, left)
"""


def test_a_process_that_forks_again_and_again_is_ended() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKS_ON], cwd=project_root(), timeout=8, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "True []\n"), done.stderr


def test_a_root_that_cannot_be_entered_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise PermissionError

    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert _start(["true"], [fails], None, []) == 126
    assert "true: cannot be run: its root directory cannot be entered" in capsys.readouterr().err
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
