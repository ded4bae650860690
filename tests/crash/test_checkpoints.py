"""SIGKILL at any change to the store during checkpoint operations: the result is old or new."""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from cowfs.api import checkpoints, rollback
from cowfs.formats.ext3 import image
from cowfs.formats.ext3._engine import lib
from tests.crash import checkpointing
from tests.ext3 import powercut, recovery
from tests.support import tree
from tests.support.direct import Direct
from tests.support.mounts import cowfs, project_root
from tests.support.system import needs_root, run

pytestmark = [pytest.mark.crash, needs_root, pytest.mark.timeout(600)]
STEPS = 40


def start(place: Path, kind: str, seed: int, kill_at: int, states: Path | str) -> list[tuple[int, int]]:
    """Run the steps on a new store; return each completed step and the number of changes until then."""
    store = store_of(place, kind)
    for old in (store, place / "states"):
        run("rm", "-rf", old)
    if kind == "image":
        assert cowfs("create", store, "16").returncode == 0
    command = [
        *(sys.executable, "-m", checkpointing.__name__, str(store), str(place / "lower")),
        *(str(seed), str(STEPS), str(kill_at), str(states)),
    ]
    env = {**os.environ, "PYTHONPATH": project_root()}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=60)
    assert done.returncode == (-9 if kill_at else 0), done.stderr
    words = [line.split() for line in done.stdout.splitlines()]
    return [(int(step), int(count)) for _, step, count in words]


def lower_of(place: Path) -> None:
    tree.build(
        place / "lower",
        {f"d{n % 3}/f{n}": tree.Node(data=b"%d" % n) for n in range(9)}
        | {"d0/link": tree.link("d0/f0"), "large": tree.Node(data=b"x" * 70_000)},
    )


def store_of(place: Path, kind: str) -> Path:
    return place / ("store.bs" if kind == "image" else "store")


def judge(place: Path, kind: str, states: list[dict[str, checkpointing.Tree]], first: int, last: int) -> None:
    """Fail unless the tree and all checkpoints are those after one of these steps."""
    store, lower = store_of(place, kind), place / "lower"
    fs = Direct(str(store), [str(lower)])
    seen = checkpointing.tree_of(fs)
    fs.close()
    kept = {}
    for one in checkpoints(str(store)):
        rollback(str(store), one.name)
        fs = Direct(str(store), [str(lower)])
        kept[one.name] = checkpointing.tree_of(fs)
        fs.close()
    found = {"tree": seen, "kept": kept}
    wrong = [differences(state, found) for state in states[first : last + 1]]
    assert not all(wrong), f"after steps {first} to {last}: {wrong}"
    assert cowfs("check", "-n", store).returncode == 0


def differences(one: dict[str, checkpointing.Tree], other: dict[str, checkpointing.Tree]) -> list[str]:
    trees = [{"now": state["tree"], **state["kept"]} for state in (one, other)]
    found = [f"{name} is kept by one" for name in trees[0].keys() ^ trees[1].keys()]
    for name in trees[0].keys() & trees[1].keys():
        here, there = trees[0][name], trees[1][name]
        found += [
            f"{name}: {path}: {here.get(path)}, {there.get(path)}"
            for path in here.keys() | there.keys()
            if here.get(path) != there.get(path)
        ]
    return found


@pytest.mark.parametrize("kind", ["image", "directory"])
@pytest.mark.parametrize(
    ("seed", "kills"), [(1, 2), *(pytest.param(seed, 20, marks=pytest.mark.nightly) for seed in range(2, 7))]
)
def test_killed(tmp_path: Path, kind: str, seed: int, kills: int) -> None:
    lower_of(tmp_path)
    said = start(tmp_path, kind, seed, 0, tmp_path / "states")
    states = json.loads((tmp_path / "states").read_text())
    before = dict(said)
    making = [n for n in range(1, STEPS + 1) if states[n]["kept"] != states[n - 1]["kept"]]
    chance = random.Random(seed)
    for _ in range(kills):
        step = chance.choice(making)  # and the steps after it
        at = chance.randint(before[step - 1] + 1, before[step] + 5)
        if at < before[STEPS]:
            done = start(tmp_path, kind, seed, at, "")
            last = done[-1][0] if done else 0
            judge(tmp_path, kind, states, last, last + 1)


@pytest.mark.parametrize(
    ("seed", "cuts"), [(1, 8), *(pytest.param(seed, 100, marks=pytest.mark.nightly) for seed in (2, 3))]
)
def test_power_cut(tmp_path: Path, seed: int, cuts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut during writes to an image, checkpoints exist completely or not at all."""
    lower_of(tmp_path)
    store = store_of(tmp_path, "image")
    assert cowfs("create", store, "16").returncode == 0
    Direct(str(store), [str(tmp_path / "lower")]).close()
    base = store.read_bytes()
    states: list[dict[str, checkpointing.Tree]] = []
    with (tmp_path / "trace").open("w+b") as trace:
        with monkeypatch.context() as patch:
            patch.setattr(image, "Image", functools.partial(image.Image, trace_fd=trace.fileno()))
            fs = Direct(str(store), [str(tmp_path / "lower")])
            steps = checkpointing.Steps(fs, seed)
            for number in range(STEPS):
                states.append({"tree": checkpointing.tree_of(fs), "kept": dict(steps.kept)})
                synced = states[number]["kept"] != states[number - 1]["kept"]  # they end with a sync
                mark(fs, SYNCED if synced else DONE, number)
                steps.step(number + 1)
            states.append({"tree": checkpointing.tree_of(fs), "kept": dict(steps.kept)})
            fs.close()
        trace.seek(0)
        events = list(powercut.parse(trace.read()))
    chance = random.Random(seed)
    for cut in sorted(chance.sample(range(len(events)), cuts)):
        disk, known = powercut.Disk(bytearray(base)), {SYNCED: 0, DONE: 0}
        for event in events[:cut]:
            disk.apply(event, [])
            if event.kind == MARK and event.number >> 56 in known:
                known[event.number >> 56] = event.number & (1 << 56) - 1
        with store.open("r+b") as file:  # in place, because a copy would be refused
            file.write(disk.cut(chance))
        assert recovery.by_engine(store, recovery.OTHER_BOOT) is None
        with suppress(OSError):
            os.removexattr(store, "user.cowfs.closed")
        judge(tmp_path, "image", states, known[SYNCED], max(known.values()) + 1)


MARK, DONE, SYNCED = 3, 200, 201


def mark(fs: Direct, kind: int, number: int) -> None:
    """Write a mark to the trace."""
    handle = fs.union.store.layer.image.handle  # type: ignore[attr-defined]
    assert lib.x3_mark(handle, kind << 56 | number) == 0
