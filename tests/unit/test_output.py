"""The output of the command line: progress and results."""

from __future__ import annotations

import io
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cowfs.cli import output
from cowfs.cli.main import guarded


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("quiet", [False, True])
def test_no_result_stands_behind_progress(monkeypatch: pytest.MonkeyPatch, quiet: bool) -> None:
    """Both go to the same terminal; --quiet switches progress off."""
    screen = _Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(output, "_PAUSE", -1)
    monkeypatch.setattr(output, "_asked", {"quiet"} if quiet else set())
    with output.progress_line() as progress:
        progress("1000 changes examined")
        output.say("reverted one")
        output.say("reverted two")
        progress("2 reverted")
        output.warn("three: something else is there now")
        progress("2 reverted")
    cleared = "\r\x1b[K"
    shown = [
        *(f"{cleared}1000 changes examined{cleared}", "reverted one\n", "reverted two\n"),
        *(f"{cleared}2 reverted{cleared}", "cowfs: three: something else is there now\n"),
        f"{cleared}2 reverted{cleared}",
    ]
    assert screen.getvalue() == "".join(part for part in shown if not quiet or cleared not in part)


def test_the_rate_does_not_count_what_came_before_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a minute passes until the first change is found: "14833 min left" was not true."""
    clock, shown = [0.0], list[str]()
    monkeypatch.setattr(output, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(output, "_shows_progress", lambda: True)
    tally = output.Tally(shown.append, "changes")
    tally.expect(lambda: 200)
    for clock[0], count in ((60.0, 1), (70.0, 99)):
        tally.add(count)
    assert shown == ["1 changes", "100 changes, 10/s, 10 s left"]


def test_the_time_left_of_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the step that runs; none while it is too early, or all is done."""
    clock, shown = [0.0], list[str]()
    monkeypatch.setattr(output, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    show = output.shares(shown.append)
    for clock[0], share in (
        (50.0, 0.0),
        (50.5, 0.1),
        (60.0, 0.05),
        (61.0, 0.05),
        (1060.0, 0.5),
        (1070.0, 1.0),
    ):
        show("checked", share)
    assert shown == ["checked", "checked", "checked", "checked, 19 s left", "checked, 17 min left", "checked"]


def test_ctrl_c_while_a_class_is_made_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    """Up to Python 3.11, an exception in a __set_name__() becomes the cause of another."""

    def interrupted() -> int:
        raise RuntimeError("Error calling __set_name__") from KeyboardInterrupt()

    assert guarded(interrupted) == 130
    assert capsys.readouterr().err == "cowfs: interrupted\n"


def test_ctrl_c_while_the_command_starts_is_no_traceback() -> None:
    """It kills the process like any other, or gives one line of output."""
    if subprocess.run(["env", "--block-signal=INT", "true"], capture_output=True, check=False).returncode:
        pytest.skip("env cannot hold back a signal")
    rng = random.Random(1)
    codes = set()
    for _ in range(20):
        cowfs = str(Path(sys.executable).parent / "cowfs")
        command = ["env", "--default-signal=INT", cowfs, "check", "/proc/none"]  # nohup and & ignore it
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            time.sleep(rng.random() * 0.15)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        codes.add(process.returncode)
        assert said.count("\n") <= 1 and process.returncode in {-signal.SIGINT, 130, 8}, said
    assert codes != {8}
