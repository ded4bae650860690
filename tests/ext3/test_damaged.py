"""Thousands of damaged images are refused or served with errors, without crash, hang, or damage at open.

Each batch is a process of its own with a bound on its memory, so that a crash is a failure of this test
and not the end of the run.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ext3 import engine
from tests.ext3.damage import Target, damaged
from tests.ext3.load import Load
from tests.ext3.originals import make_originals
from tests.ext3.reader import JOURNAL, Image
from tests.support.mounts import project_root
from tests.support.system import run


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_originals(tmp_path_factory.mktemp("originals"))


def batch(originals: list[Path], start: int, count: int, timeout: float, *options: str) -> tuple[int, int]:
    """Exercise damaged images; return their number, and how many were refused."""
    command = [sys.executable, "-m", "tests.ext3.exercise", "--start", str(start), "--count", str(count)]
    done = subprocess.run(
        [*command, *options, *originals], cwd=project_root(), capture_output=True, text=True, timeout=timeout
    )
    found = re.search(r"(\d+) damaged images, (\d+) of them refused", done.stdout)
    assert found, f"exit {done.returncode}: {done.stdout.splitlines()[-1:]}\n{done.stderr[-3000:]}"
    return int(found[1]), int(found[2])


@pytest.mark.parametrize(
    "start",
    [
        0,
        1000,
        *(pytest.param(start, marks=pytest.mark.nightly) for start in (250, 500, 750, 1250, 1500, 1750)),
    ],
)
def test_damaged_images(originals: list[Path], start: int) -> None:
    done, refused = batch(originals, start, 250, timeout=110)
    assert done == 250
    assert 0 < refused < done, "most damage is not to be seen when an image is opened"


@pytest.fixture(scope="session")
def left(originals: list[Path]) -> list[Path]:
    """An image that was in use until the process died, with data in the journal and the redo log."""
    made = []
    for path in (originals[0], originals[2]):
        image = path.with_name(f"{path.name}-left")
        shutil.copyfile(path, image)
        with engine.opened(image) as opened:
            load = Load(opened.layer, Image(path.read_bytes()), 3)
            load.run(60)
            load.commit()
            load.run(40, commit_every=1000, sync_every=1000)
            opened.image.abandon()
        made.append(image)
    return made


@pytest.mark.parametrize("start", [0, pytest.param(400, marks=pytest.mark.nightly)])
def test_damaged_images_that_must_be_recovered(left: list[Path], start: int) -> None:
    done, refused = batch(left, start, 400, 110, "--left")
    assert done == 400
    assert 0 < refused < done


LOST_A_BLOCK_OF_THE_LOG = 1_018_779
"""Makes the list of orphans, which the redo log has changed since, contain an unused inode."""


def test_an_orphan_that_is_none_is_found_at_last(left: list[Path]) -> None:
    assert batch(left, LOST_A_BLOCK_OF_THE_LOG, 1, 60, "--left") == (1, 1)


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_many_damaged_images_that_must_be_recovered(left: list[Path]) -> None:
    done, _ = batch(left, 1_000_000, 20_000, 850, "--left")
    assert done == 20_000


DAMAGE: dict[str, Callable[[Image], tuple[int, int]]] = {
    "an orphan beyond the last inode": lambda image: (1024 + 232, 1226),
    "an orphan that is the root": lambda image: (1024 + 232, 2),
    "a log that begins nowhere": lambda image: (journal(image) + 20, 0xFFFFFFFF),
    "a log that begins at its end": lambda image: (journal(image) + 20, 0x00040000),
    "a log longer than the journal": lambda image: (journal(image) + 16, 0x7F000000),
}
"""Damage that did harm, or might: offsets and numbers, big-endian in the journal."""


def journal(image: Image) -> int:
    """Return the offset of the journal's superblock."""
    return next(image.mapping(image.inode(JOURNAL)))[1] * image.block_size


@pytest.mark.parametrize("what", DAMAGE)
def test_special_damage(originals: list[Path], tmp_path: Path, what: str) -> None:
    data = bytearray(originals[0].read_bytes())
    at, number = DAMAGE[what](Image(data))
    struct.pack_into(">I" if "log" in what else "<I", data, at, number)
    path = tmp_path / "image"
    path.write_bytes(data)
    run(sys.executable, "-m", "tests.ext3.exercise", "--as-is", path, cwd=project_root())


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_many_damaged_images(originals: list[Path]) -> None:
    done, _ = batch(originals, 1_000_000, 60_000, timeout=1750)
    assert done == 60_000


def test_damage_is_repeatable_and_is_damage(originals: list[Path]) -> None:
    target = Target("image", originals[0].read_bytes())
    changed = [damaged(target, seed) for seed in range(60)]
    assert changed == [damaged(target, seed) for seed in range(60)]
    assert len(set(changed)) > 50
    assert target.indexes and target.xattrs and target.indirect
