"""After SIGKILL during work, everything acknowledged exists, synced or not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.ext3 import images, recovery
from tests.ext3.images import MODERN, SMALL, Shape
from tests.ext3.killed import Account, records
from tests.ext3.model import Model, judge
from tests.ext3.reader import Facts, Image
from tests.support.mounts import project_root


def kill_one(place: Path, shape: Shape, seed: int) -> str | None:
    """Kill a load at a random point; return the errors of its image afterwards."""
    chance = random.Random(seed)
    path = images.make(place / f"image{seed}", shape)
    account = Account(Model(Image(path.read_bytes())).states)
    said, enough = bytearray(), int(10 ** chance.uniform(3, 6.5))  # bytes
    command: list[str | Path] = [sys.executable, "-m", "tests.ext3.killed", path, str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=project_root()) as child:
        assert child.stdout
        while len(said) < enough and (data := os.read(child.stdout.fileno(), 1 << 16)):
            said += data
        for _ in range(chance.randrange(3000)):
            pass
        child.send_signal(signal.SIGKILL)
        said += child.stdout.read()
    if child.returncode != -signal.SIGKILL:
        return f"seed {seed}: the load ended by itself: {child.returncode}"
    for record in records(bytes(said)):
        account.take(record)
    account.end()
    last = account.states[-1].facts

    def going_on(tree: dict[int, Facts]) -> bool:
        """The last operation was committed before the load could report its end."""
        changed = [ino for ino in tree.keys() | last.keys() if tree.get(ino) != last.get(ino)]
        return account.promises.begun == len(account.states) and len(changed) <= 6

    account.promises.committed = len(account.states) - 1  # whatever was told had been done
    wrong = recovery.by_engine(path) or judge(
        account.states, account.promises, Image(path.read_bytes()), going_on
    )
    path.unlink()
    return f"seed {seed}, {len(account.states)} operations: {wrong}" if wrong else None


def kill(place: Path, seeds: range) -> list[str]:
    """Kill several loads, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda seed: kill_one(place, (MODERN, SMALL)[seed % 2], seed), seeds)
        return [wrong for wrong in found if wrong]


@pytest.mark.crash
@pytest.mark.parametrize("start", [0, 10])
def test_killed_anywhere(place: Path, start: int) -> None:
    assert kill(place, range(start, start + 10)) == []


@pytest.mark.crash
@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_killed_often(place: Path) -> None:
    assert kill(place, range(1000, 1200)) == []
