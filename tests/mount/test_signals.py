"""Signals that ask a mount to end, at any moment and many times: what is left, and what it says."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.mounts import COWFS, cowfs, eventually, is_mounted, mount_arguments, project_root
from tests.support.system import as_nobody_prefix, needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True

pytestmark = [needs_fuse, pytest.mark.slow]

ROUNDS = [5, pytest.param(100, marks=pytest.mark.nightly)]
STARTING = 0.7
"""Seconds that a mount takes, about: the signals begin within these."""
ENDED_EARLY = {
    code for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) for code in (-number, 128 + number)
}
"""What whoever asked a mount to end before it was there may be told."""


@pytest.fixture
def base(nobody_path: Path) -> Path:
    (nobody_path / "lower").mkdir()
    (nobody_path / "lower" / "file").write_text("below\n")
    (nobody_path / "mnt").mkdir()
    if os.geteuid() == 0:
        os.chown(nobody_path / "mnt", 65534, 65534)
    return nobody_path


@pytest.fixture(params=[pytest.param("root", marks=needs_root), "nobody"])
def who(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def start(base: Path, who: str, store: Path, *options: str) -> subprocess.Popen[str]:
    command = [*(as_nobody_prefix() if who == "nobody" else []), *COWFS]
    command += [*mount_arguments(base / "lower", base / "mnt", store), *options]
    env = {**os.environ, "PYTHONPATH": project_root()}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True)


def shown(base: Path, who: str) -> str:
    prefix = as_nobody_prefix() if who == "nobody" else []
    return run(*prefix, "cat", base / "mnt" / "file").stdout


@contextmanager
def serving(base: Path, who: str, store: Path) -> Iterator[subprocess.Popen[str]]:
    """A mount in the foreground that answers."""
    with start(base, who, store, "-f") as process:
        eventually(lambda: is_mounted(base / "mnt") or process.poll() is not None, "it is mounted", 60)
        assert process.poll() is None, process.communicate()[1]
        assert shown(base, who) == "below\n"
        yield process


def made_store(base: Path, who: str, kind: str) -> Path:
    store = base / "store"
    if kind == "image":
        cowfs("create", store, "16", nobody=who == "nobody", check=True)
    return store


def ended_early(code: int, said: str) -> bool:
    """Whether this tells that there never was a mount. Python has a code of its own in its first moments."""
    return code in ENDED_EARLY or (code == 1 and "KeyboardInterrupt" in said)


def hammer(process: subprocess.Popen[str], rng: random.Random, *, group: bool = False) -> bool:
    """Wait a moment, then send signals until the process is gone; say whether it was mounted before."""
    numbers = rng.choice([[signal.SIGTERM], [signal.SIGINT], [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]])
    begin = time.monotonic() + rng.random() * STARTING
    while time.monotonic() < begin and process.poll() is None:
        time.sleep(0.001)
    # A process that has only just begun has no place of its own yet to be signalled in.
    while process.poll() is None and time.monotonic() < begin + 60:
        number = rng.choice(numbers)
        if group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
    return process.poll() is not None


@pytest.mark.parametrize("kind", ["directory", "image"])
@pytest.mark.parametrize("rounds", ROUNDS)
def test_a_mount_in_the_foreground(base: Path, who: str, kind: str, rounds: int) -> None:
    """It leaves nothing, and nobody is told of a failure once it is mounted."""
    store = made_store(base, who, kind)
    rng = random.Random(rounds)
    for _ in range(rounds):
        with start(base, who, store, "-f") as process:
            assert hammer(process, rng), "it does not end"
            said = process.stderr.read() if process.stderr else ""
        assert process.returncode == 0 or ended_early(process.returncode, said), said
        assert not is_mounted(base / "mnt"), (process.returncode, said)
    with serving(base, who, store) as process:
        hammer(process, rng)
    assert process.returncode == 0


@pytest.mark.parametrize("group", [False, True], ids=["parent", "group"])
@pytest.mark.parametrize("rounds", ROUNDS)
def test_a_mount_that_goes_into_the_background(base: Path, who: str, rounds: int, group: bool) -> None:
    """Either it is mounted, and the exit code is 0, or it is not, and is not later on either."""
    rng = random.Random(rounds)
    for _ in range(rounds):
        with start(base, who, base / "store") as process:
            assert hammer(process, rng, group=group), "it does not end"
            said = process.stderr.read() if process.stderr and process.returncode else ""
        if process.returncode == 0:
            assert shown(base, who) == "below\n"
            cowfs("umount", base / "mnt", nobody=who == "nobody", check=True)
        else:
            assert ended_early(process.returncode, said), said
            assert not is_mounted(base / "mnt")
            # Nobody has the store: a daemon that went on would.
            with serving(base, who, base / "store") as again:
                again.terminate()
            assert again.returncode == 0


def test_a_daemon_that_is_killed_while_it_starts_says_so(base: Path, who: str) -> None:
    """The command that waits for it ends too, with one line."""
    command = [*(as_nobody_prefix() if who == "nobody" else []), *COWFS]
    command += mount_arguments(base / "lower", base / "mnt", base / "store")
    env = {**os.environ, "PYTHONPATH": project_root()}
    code, said = 0, ""
    for _ in range(20):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            while not children.read_text():
                assert process.poll() is None, process.communicate()[1]
            os.kill(int(children.read_text().split()[0]), signal.SIGTERM)
            _, said = process.communicate(timeout=60)
            code = process.returncode
        if code:
            break
        eventually(lambda: not is_mounted(base / "mnt"), "the daemon ends")  # it had started
    assert code == 32, said
    assert said.count("\n") == 1 and "SIGTERM" in said
