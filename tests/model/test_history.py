"""Thousands of operations with checkpoints, ways back and deletions in between, beside copies of a tree.

What differs between two states is what the copies say; the way back gives the tree of then with all
attributes; and what `cowfs du` lists adds up to what the filesystem says.
"""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import pytest

from cowfs.api import checkpoint, checkpoints, delete_checkpoint, open_changes, rollback
from tests.model.test_changes import Work, check_diff, differences, layers_of, model_of
from tests.model.test_model import compare
from tests.model.tree import Model
from tests.support import tree
from tests.support.direct import Direct
from tests.support.mounts import cowfs
from tests.support.system import needs_root

pytestmark = [needs_root, pytest.mark.timeout(3600)]

ROUND = 125
MOST = 5
"""How many checkpoints to keep."""
OVERHEAD = 128 << 10
"""The most that the store's own directories grow by."""


class History:
    """A union, the model of it, and what both were at each checkpoint."""

    def __init__(self, place: Path, kind: str, seed: int) -> None:
        layers = layers_of(seed)
        self.lowers = [place / f"lower{number}" for number in range(len(layers))]
        for lower, layer in zip(self.lowers, layers, strict=True):
            tree.build(lower, layer)
        self.store = place / ("store.bs" if kind == "image" else "store")
        if kind == "image":
            assert cowfs("create", self.store, "64").returncode == 0
        self.fs = Direct(str(self.store), list(map(str, self.lowers)), fakeroot=kind == "fakeroot")
        self.chance = random.Random(seed)
        model = model_of(layers, self.lowers)
        self.first = copy.deepcopy(model)
        self.work = Work(self.fs, model, seed)
        self.kept: dict[str, tuple[Model, tree.Snapshot]] = {}
        self.made = 0
        self.empty: int | None = None
        """How much of the store was overhead at first."""

    def run(self, count: int) -> None:
        """Do operations; then look at everything, and keep, restore or drop a state. The union is closed."""
        self.fs.reopen()
        self.work.run(count)
        shown = self.fs.snapshot()
        assert compare(self.work.model.snapshot(), shown, {}) == []
        self.fs.close()
        for path, inode in self.work.model.walk():
            if inode.kind != "dir":  # the times of now, which the model did not know
                inode.mtime = shown[path]["mtime"]
        self.look_at_differences()
        self.look_at_space()
        if len(self.kept) == MOST:
            self.delete()
        name = f"state {self.made}"
        self.made += 1
        checkpoint(str(self.store), name)
        self.kept[name] = copy.deepcopy(self.work.model), shown
        if self.chance.random() < 0.4:
            self.go_back()

    def chain(self) -> list[str]:
        """Return the checkpoints that the tree is based on, the oldest first."""
        return [one.name for one in checkpoints(str(self.store)) if one.current]

    def look_at_differences(self) -> None:
        assert {one.name for one in checkpoints(str(self.store))} == set(self.kept)
        check_diff(self.first, self.work.model, self.store)
        chain = self.chain()
        if not chain:
            return
        since = self.chance.choice(chain)
        check_diff(self.kept[since][0], self.work.model, self.store, since=since)
        until = self.chance.choice(chain[chain.index(since) :])
        check_diff(self.kept[since][0], self.kept[until][0], self.store, since=since, until=until)
        check_diff(self.first, self.kept[until][0], self.store, until=until)

    def look_at_space(self) -> None:
        """What is listed adds up, and nearly all of it is listed as part of a layer or the trash."""
        with open_changes(str(self.store)) as changes:
            used = list(changes.usage())
        parts = sum(each.size for each in used if each.reason != "overhead")
        if self.store.is_file():
            whole = int(json.loads(cowfs("info", self.store, "--json", check=True).stdout)["used"])
            assert sum(each.size for each in used) == whole
        else:
            sizes = {stat.st_ino: stat.st_blocks for stat in map(Path.lstat, self.store.rglob("*"))}
            whole = 512 * sum(sizes.values())
        self.empty = whole - parts if self.empty is None else self.empty
        assert abs(whole - parts - self.empty) <= OVERHEAD

    def delete(self) -> None:
        name = self.chance.choice(sorted(self.kept))
        delete_checkpoint(str(self.store), name)
        del self.kept[name]

    def go_back(self) -> None:
        name = self.chance.choice(sorted(self.kept))
        rollback(str(self.store), name)
        model, shown = self.kept[name]
        self.fs.reopen()
        assert differences(without_numbers(shown), without_numbers(self.fs.snapshot()), {}) == []
        self.fs.close()
        self.work.model = copy.deepcopy(model)


def without_numbers(shown: tree.Snapshot) -> tree.Snapshot:
    """Leave out numbers of inodes. What the lowers lack gets others when layers are merged."""
    return {
        path: {fact: value for fact, value in facts.items() if fact != "ino"} for path, facts in shown.items()
    }


@pytest.mark.parametrize(
    ("kind", "seed", "count"),
    [
        ("image", 1, 4 * ROUND),
        ("directory", 2, 2 * ROUND),
        *(pytest.param("image", seed, 10_000, marks=pytest.mark.nightly) for seed in (3, 4)),
        *(pytest.param("directory", seed, 10_000, marks=pytest.mark.nightly) for seed in (5, 6)),
        *(pytest.param("fakeroot", seed, 10_000, marks=pytest.mark.nightly) for seed in (7, 8)),
    ],
)
def test_states_between_operations(tmp_path: Path, kind: str, seed: int, count: int) -> None:
    history = History(tmp_path, kind, seed)
    history.fs.close()
    for _ in range(count // ROUND):
        history.run(ROUND)
        assert cowfs("check", "-n", history.store).returncode == 0
