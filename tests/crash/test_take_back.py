"""SIGKILL at any change to the store during `cowfs revert`, `--undo` and `cowfs vacuum`: nothing is lost."""

from __future__ import annotations

import os
import random
import signal
from contextlib import closing
from pathlib import Path

import pytest

from cowfs.api import take_back
from cowfs.errors import CowfsError
from tests.crash import checkpointing
from tests.crash.test_rebase import copied
from tests.mount.test_diff_patch import random_work, script
from tests.mount.test_revert import MAKE, WORK
from tests.support.direct import Direct
from tests.support.mounts import cowfs, make_store, mounted
from tests.support.system import needs_fuse, needs_root
from tests.support.tree import Snapshot

pytestmark = [pytest.mark.crash, needs_root, needs_fuse, pytest.mark.timeout(900)]

MORE = """
mkdir -p same/a same/b same/c; for n in 1 2 3 4 5 6; do echo $n >same/a/$n; echo $n >same/b/$n; done
touch -d 2020-01-01 same/*/*; touch -d 2019-05-05 same/* same
"""
NEEDLESS = """
for file in same/*/*; do chmod 600 $file; chmod 644 $file; done
mkdir same/c/d; rmdir same/c/d; touch -d 2019-05-05 same/*
"""
"""Copies that are the same as below."""
KINDS = ["image", "directory"]
ALL = [
    (asked, kind, seed)
    for asked in ("revert", "undo", "vacuum", "trash")
    for kind in KINDS
    for seed in (1, 2)
]


def prepare(place: Path, kind: str, seed: int) -> tuple[Path, Path]:
    """Return a lower, and a store with changes to it; with an even seed, since a checkpoint."""
    script(MAKE.replace("mkfifo pipe", "touch pipe") + MORE, place)
    lower, store = place / "lower", make_store(place, kind)
    with mounted(lower, place / "mnt", store) as here:
        script(WORK, here.path)
        if not seed % 2:
            cowfs("checkpoint", here.path, "one", check=True)
        script(NEEDLESS, here.path)
        random_work(here.path, seed, 20)
    return lower, store


def fresh(store: Path, lower: Path, place: Path) -> Path:
    """Return a copy that has been in use. Killed in its first moment of use, a copy may be a torn one."""
    copied(store, place)
    Direct(str(place), [str(lower)]).close()
    return place


def killed(store: Path, asked: str, at: int) -> tuple[int, int]:
    """Kill the command, in a fork of this process, at change *at*.

    If 0, do not; return the numbers of a change soon before the first thing is done, and of the last change.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            killer = checkpointing.Killer(at)
            counts = [killer.count for done in take_back(str(store), asked) if not done.why_not]
            os.write(writing, b"%d %d" % (max(min(counts, default=0) - 8, 1), killer.count))
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        numbers = [int(word) for word in file.read().split()]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (-signal.SIGKILL if at else 0)
    return (numbers[0], numbers[1]) if numbers else (0, 0)


def seen(store: Path, lower: Path) -> Snapshot:
    """Return what a user sees, but not the numbers of inodes."""
    with closing(Direct(str(store), [str(lower)])) as fs:
        found = fs.snapshot()
    return {path: {key: fact for key, fact in facts.items() if key != "ino"} for path, facts in found.items()}


def without_directory_times(found: Snapshot) -> Snapshot:
    """A revert, and its undoing, may leave other times of directories."""
    return {
        path: {key: fact for key, fact in facts.items() if key != "mtime" or facts["type"] != "dir"}
        for path, facts in found.items()
    }


def judge(store: Path, lower: Path, asked: str, states: tuple[Snapshot, Snapshot]) -> None:
    """Fail unless nothing is lost, and the command can be given again."""
    before, after = states
    assert cowfs("check", "-n", store).returncode == 0
    if asked in {"vacuum", "trash"}:
        assert seen(store, lower) == before == after
        assert not [done for done in take_back(str(store), asked) if done.why_not]
        assert list(take_back(str(store), asked)) == []
        assert seen(store, lower) == before
        return
    changed, found = (before if asked == "revert" else after), seen(store, lower)
    try:
        assert not [done for done in take_back(str(store), "undo") if done.why_not]
    except CowfsError:  # the kill came before the first step, or after the last
        assert without_directory_times(found) == without_directory_times(changed)
    assert without_directory_times(seen(store, lower)) == without_directory_times(changed)
    assert cowfs("check", "-n", store).returncode == 0


@pytest.mark.parametrize(
    ("asked", "kind", "seed", "kills"),
    [
        ("vacuum", "directory", 2, 4),
        *(pytest.param(*one, 25, marks=pytest.mark.nightly) for one in ALL),
    ],
)
def test_killed(tmp_path: Path, asked: str, kind: str, seed: int, kills: int) -> None:
    lower, store = prepare(tmp_path, kind, seed)
    if asked in {"undo", "trash"}:
        assert list(take_back(str(store), "revert"))
    place = tmp_path / "copies" / store.name
    place.parent.mkdir()
    before = seen(fresh(store, lower, place), lower)
    first, last = killed(place, asked, 0)
    states = before, seen(place, lower)
    chance = random.Random(seed)
    for at in sorted(chance.sample(range(first, last + 1), kills)):
        killed(fresh(store, lower, place), asked, at)
        judge(place, lower, asked, states)
