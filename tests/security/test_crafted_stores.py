"""Root runs offline commands on stores of other users: they end, and touch nothing outside."""

from __future__ import annotations

import os
import random
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from cowfs.store.format.header import new_header, to_json
from tests.support.mounts import cowfs
from tests.support.system import NOBODY, needs_root

pytestmark = needs_root

HUGE = 1 << 40
PLACES = [
    *("upper", "upper/x", "upper/d", "work", "work/work", "work/index", "cowfs", "cowfs/header.json"),
    *("cowfs/lock", "cowfs/trash", "cowfs/trash/1", "cowfs/trash/1/log", "cowfs/layers", "cowfs/layers/1"),
    "cowfs/blame",
]
CRAFTS: dict[str, Callable[[Path, Path], None]] = {
    "link": lambda path, outside: path.symlink_to(outside),
    "FIFO": lambda path, _: os.mkfifo(path),
    "second name": lambda path, outside: os.link(outside / "secret", path),
    "huge file": lambda path, _: _huge(path),
}


def _huge(path: Path) -> None:
    path.touch()
    os.truncate(path, HUGE)


def commands(store: Path, top: Path) -> list[list[str | Path]]:
    lower: list[str | Path] = ["--lower", top / "lower"]
    return [
        ["diff", store, *lower],
        ["apply", store, top / "root", *lower],
        ["export", "--to", "tar", store, top / "made.tar", *lower],
        ["vacuum", store, *lower],
        ["vacuum", "--trash", store, *lower],
        ["revert", "--undo", store, *lower],
        ["checkpoint", store, "name", *lower],
        ["rollback", store, "name", *lower],
        ["rebase", store, "--from", top / "lower", "--onto", top / "lower", "--force-lower"],
        ["restore", store, top / "restored"],
        ["convert", store, "--to", "aufs", *lower],
        ["du", store, *lower],
    ]


def everything(top: Path) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    for path in sorted([top, *top.rglob("*")]):
        info = path.lstat()
        data = path.read_bytes() if stat.S_ISREG(info.st_mode) else b""
        found.append((path, info.st_mode, info.st_uid, info.st_mtime_ns, data))
    return found


def craft(store: Path, outside: Path, owner: int, chance: random.Random) -> list[str]:
    """Make a store with one to three parts that are something else than they should be."""
    shutil.rmtree(store, ignore_errors=True)
    for name in ("upper/d", "work/work", "work/index", "cowfs/trash/1", "cowfs/layers/1"):
        (store / name).mkdir(parents=True)
    (store / "upper/new").write_text("new")
    (store / "cowfs/lock").touch()
    (store / "cowfs/header.json").write_bytes(to_json(new_header()))
    done = []
    for place in chance.sample(PLACES, chance.randrange(1, 4)):
        path, how = store / place, chance.choice(sorted(CRAFTS))
        if path.parent.is_symlink() or not path.parent.is_dir():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        CRAFTS[how](path, outside)
        done.append(f"{place}: {how}")
    for path in (store, *store.rglob("*")):
        if path.is_symlink() or not path.exists() or not path.samefile(outside / "secret"):
            os.chown(path, owner, owner, follow_symlinks=False)
    return done


@pytest.mark.parametrize(
    "count", [12, pytest.param(300, marks=[pytest.mark.nightly, pytest.mark.timeout(900)])]
)
def test_stores_with_something_else_in_their_places(nobody_path: Path, count: int) -> None:
    outside, store = nobody_path / "outside", nobody_path / "store"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (outside / "secret").chmod(0o600)
    (nobody_path / "lower/d").mkdir(parents=True)
    (nobody_path / "lower/x").write_text("x")
    before = everything(outside)
    for number in range(count):
        crafted = craft(store, outside, (0, NOBODY)[number // 12 % 2], random.Random(number))
        for made in ("root", "restored"):
            shutil.rmtree(nobody_path / made, ignore_errors=True)
        (nobody_path / "made.tar").unlink(missing_ok=True)
        shutil.copytree(nobody_path / "lower", nobody_path / "root")
        command = commands(store, nobody_path)[number % 12]
        done = cowfs(*command)
        what = f"{number}: {crafted} {done}"
        assert done.returncode in {0, 1, 2, 32}, what
        assert done.returncode in {0, 1} or 1 <= len(done.stderr.splitlines()) <= 2, what
        assert "Traceback" not in done.stderr, what
        assert everything(outside) == before, what
