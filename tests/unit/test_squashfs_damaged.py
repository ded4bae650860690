"""Thousands of damaged images: no crash, no hang, no other exception than refusals and I/O errors.

Each batch is a process of its own with a bound on its memory, so that a crash of a codec is a failure
of this test and not the end of the run. CI does a part of what a night does; another part at each seed
would not be repeatable, so it is the same part each time.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.fuzz.mutate import mutate
from tests.support.mounts import project_root
from tests.support.squashfs import needs_mksquashfs, small_images
from tests.support.system import run

pytestmark = needs_mksquashfs

MEMORY = 256
"""The limit of memory in MiB: Python, its libraries, and the caches of one image."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return small_images(tmp_path_factory.mktemp("small"))


def batch(images: list[Path], start: int, count: int, timeout: float) -> tuple[int, int]:
    """Exercise damaged images; return their number, and how many were refused."""
    done = run(
        sys.executable, "-m", "tests.fuzz.batch",
        "--start", str(start), "--count", str(count), "--memory", str(MEMORY), *images,
        cwd=project_root(), timeout=timeout,
    )  # fmt: skip
    found = re.search(r"(\d+) damaged images, (\d+) of them refused", done.stdout)
    assert found, done.stdout + done.stderr
    return int(found[1]), int(found[2])


@pytest.mark.parametrize(
    "start", [0, *(pytest.param(start, marks=pytest.mark.nightly) for start in (1500, 3000, 4500))]
)
def test_damaged_images(images: list[Path], start: int) -> None:
    done, refused = batch(images, start, 1500, timeout=110)
    assert done == 1500
    assert 0 < refused < done, "most damage is not to be seen when an image is opened"


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_many_damaged_images(images: list[Path]) -> None:
    done, _ = batch(images, 1_000_000, 300_000, timeout=3500)
    assert done == 300_000


def test_damage_is_repeatable_and_is_damage(images: list[Path]) -> None:
    image = images[0].read_bytes()
    changed = [mutate(image, seed) for seed in range(100)]
    assert changed == [mutate(image, seed) for seed in range(100)]
    assert sum(one != image for one in changed) > 90
