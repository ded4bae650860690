"""Run the fuzzers: for half a minute together by day, for ten minutes each at night, former findings first.

The message of a failure has the seed, and the directory with the input that caused it.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from tests.fuzz.ext3 import build
from tests.fuzz.run import CORPUS, TARGETS, Wanted, fuzz
from tests.support.mounts import project_root
from tests.support.system import needs_root

pytestmark = needs_root

SHARES = {
    **{"ext3": 8, "squashfs": 3, "union": 5, "convert": 2, "trash": 2, "control": 2},
    **dict.fromkeys(
        ("tar", "zip", "iso9660", "attributes", "header", "records", "checkpoints", "options"), 1
    ),
}
"""Seconds for each target by day."""
_AT_NIGHT = 600
"""Seconds for each target at night."""
_LARGEST_CORPUS = 1 << 20


def test_every_target_has_its_time_and_its_corpus() -> None:
    assert set(SHARES) == set(TARGETS)
    assert sum(SHARES.values()) == 30
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert {path.parent.name if path.suffix != ".zip" else path.stem for path in files} <= set(TARGETS)
    assert sum(path.stat().st_size for path in files) < _LARGEST_CORPUS


def go(target: str, seconds: float, tmp_path: Path) -> None:
    """Fuzz a target; keep findings where the next run does not remove them."""
    if target == "ext3" and not build.has_clang():
        pytest.skip("needs clang with libFuzzer (Debian: clang, libclang-rt-dev)")
    seed = int(os.environ.get("COWFS_FUZZ_SEED") or random.randrange(1 << 32))
    result = fuzz(target, Wanted(tmp_path, seconds, seed))
    kept = Path(project_root()) / ".cache/fuzz/found-by-tests" / target
    if result.findings:
        shutil.copytree(tmp_path / target, kept, dirs_exist_ok=True)
    said = result.log.read_text(errors="replace")[-4000:]
    assert not result.findings, f"seed {seed}: {kept} has {[path.name for path in result.findings]}:\n{said}"
    assert result.runs > seconds, f"seed {seed}: only {result.runs} runs:\n{said}"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_does_harm(target: str, tmp_path: Path) -> None:
    go(target, SHARES[target], tmp_path)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_does_harm_for_long(target: str, tmp_path: Path) -> None:
    go(target, _AT_NIGHT, tmp_path)
