"""After a power cut at any moment the image is what it was at the last commit, or at a later one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ext3 import powercut
from tests.ext3.images import MODERN, OLD, SMALL, Shape
from tests.ext3.powercut import Recording

OPERATIONS = 600


def wrong_ones(recording: Recording, count: int, seed: int, place: Path) -> list[str]:
    """What was found wrong, one line for each cut."""
    outcomes = powercut.cut(recording, count, seed, place)
    assert len(outcomes) == count
    return [f"cut at {outcome.cut}: {outcome.wrong}" for outcome in outcomes if outcome.wrong]


@pytest.mark.parametrize(("shape", "seed"), [(MODERN, 1), (MODERN, 2), (SMALL, 3), (OLD, 4)], ids=str)
def test_power_cuts(place: Path, shape: Shape, seed: int) -> None:
    recording = powercut.record(place, shape, seed, OPERATIONS)
    wrong = wrong_ones(recording, 25, seed, place)
    assert not wrong, "\n".join(wrong)


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("shape", [MODERN, SMALL, OLD], ids=str)
@pytest.mark.parametrize("seed", range(10, 15))
def test_many_power_cuts(place: Path, shape: Shape, seed: int) -> None:
    recording = powercut.record(place, shape, seed, 4 * OPERATIONS)
    wrong = wrong_ones(recording, 70, seed, place)
    assert not wrong, "\n".join(wrong)


RULES = [
    pytest.param(1, MODERN, id="freed blocks are held"),
    pytest.param(2, SMALL, id="logged blocks are checkpointed"),
    pytest.param(4, MODERN, id="a barrier before the commit record"),
    pytest.param(8, SMALL, id="orphans"),
]


@pytest.mark.parametrize(("rule", "shape"), RULES)
def test_without_a_rule_cuts_do_harm(place: Path, rule: int, shape: Shape) -> None:
    """Each rule of the journal is needed, and these tests would see that it is not kept."""
    for seed in range(20, 24):
        recording = powercut.record(place, shape, seed, OPERATIONS, debug=rule)
        if wrong_ones(recording, 40, seed, place):
            return
    pytest.fail("nothing was found wrong")
