"""SIGKILL at any change to the store during `cowfs rebase`: the store is the old or the new one."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from cowfs.store.offline.info import store_info
from cowfs.store.served.open import open_store
from tests.model.test_rebase import Plain, change, facts_of, prepare, run, seen, states, with_checkpoints
from tests.support.mounts import cowfs, project_root
from tests.support.system import needs_root

pytestmark = [pytest.mark.crash, needs_root, pytest.mark.timeout(600)]

KILLED = """
import sys
from cowfs.api import Lowers
from cowfs.rebasing import rebase
from cowfs.store.format.checkpoints import Layers
from tests.crash.checkpointing import Killer
store, old, new, at = sys.argv[1:]
killer = Killer(int(at))
exchange = Layers.exchange
def told(*arguments):
    exchange(*arguments)
    print(killer.count)
Layers.exchange = told
rebase(store, Lowers([new]), Lowers([old]))
print(killer.count)
"""


def killed(store: Path, old: Path, new: Path, at: int) -> list[int]:
    """Kill the rebase at change *at*. If 0, do not; return the numbers of the exchange and of the end."""
    env = {**os.environ, "PYTHONPATH": project_root()}
    command = [sys.executable, "-c", KILLED, str(store), str(old), str(new), str(at)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=60)
    assert done.returncode == (-9 if at else 0), done.stderr
    return [int(line) for line in done.stdout.split()]


def copied(store: Path, target: Path) -> Path:
    shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
    subprocess.run(["cp", "-a", store, target], check=True)
    return target


@pytest.mark.parametrize(
    ("seed", "kills"),
    [(7, 2), (8, 2), *(pytest.param(seed, 60, marks=pytest.mark.nightly) for seed in range(20, 28))],
)
def test_killed(tmp_path: Path, seed: int, kills: int) -> None:
    old, store, new, before = prepare(tmp_path, seed, moves=True, links=True)
    place = tmp_path / "copies" / store.name
    place.parent.mkdir()
    copy = copied(store, place)
    switch, count = killed(copy, old, new, 0)
    after = facts_of(seen(copy, new))
    chance = random.Random(seed)
    found = set()
    for at in sorted({*range(switch - 2, switch + 3), *(chance.randint(1, count) for _ in range(kills))}):
        killed(copied(store, place), old, new, at)
        lower = Path(store_info(str(place))["lowers"][0]["path"])
        found.add(lower)
        assert lower in (old, new)
        assert facts_of(seen(place, lower)) == (facts_of(before) if lower == old else after), at
        assert store_info(str(place))["layers"] == []
        if store.suffix:
            assert cowfs("check", "-n", place).returncode == 0
        if lower == old:  # the rebase can be repeated
            assert run(place, old, new).new[0].path == str(new)
            assert facts_of(seen(place, new)) == after
    assert found == {old, new}


@pytest.mark.parametrize(
    ("seed", "kills"),
    [(1, 1), *(pytest.param(seed, 40, marks=pytest.mark.nightly) for seed in range(2, 8))],
)
def test_killed_with_checkpoints(tmp_path: Path, seed: int, kills: int) -> None:
    """Each checkpoint exists once at any time, on the old or the new root."""
    old, store, chance = with_checkpoints(tmp_path, seed, moves=True, links=True)
    new = tmp_path / "new"
    shutil.copytree(old, new, symlinks=True)
    change(Plain(new), chance, 10, moves=False, links=False)
    place = tmp_path / "copies" / store.name
    place.parent.mkdir()
    copy = copied(store, place)
    switch, count = killed(copy, old, new, 0)
    expected = {old: all_facts(store, old, tmp_path), new: all_facts(copy, new, tmp_path)}
    nights = range(switch - 2, switch + 30) if kills > 1 else (switch, switch + 1, switch + 4)
    for at in sorted({*nights, *(chance.randint(1, count) for _ in range(kills))}):
        killed(copied(store, place), old, new, at)
        lower = Path(store_info(str(place))["lowers"][0]["path"])
        assert all_facts(place, lower, tmp_path) == expected[lower], at
        if store.suffix:
            assert cowfs("check", "-n", place).returncode == 0


def all_facts(store: Path, lower: Path, place: Path) -> dict[str, object]:
    """Open a store, which completes interrupted work; return what it shows now and at each checkpoint."""
    with closing(open_store(str(store))):
        pass
    return {name: facts_of(one) for name, one in states(store, lower, place).items()}
