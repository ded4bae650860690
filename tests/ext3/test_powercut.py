"""After a power cut at any moment, the image is that of the last commit, or of a later one."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tests.ext3 import operations, powercut
from tests.ext3.engine import Engine
from tests.ext3.images import MODERN, OLD, SMALL, Shape
from tests.ext3.load import Load
from tests.ext3.powercut import Recording

OPERATIONS = 600


def wrong_ones(recording: Recording, count: int, seed: int, place: Path) -> list[str]:
    """Return a line for each cut with errors."""
    outcomes = powercut.cut(recording, count, seed, place)
    assert len(outcomes) == count
    return [f"cut at {outcome.cut}: {outcome.wrong}" for outcome in outcomes if outcome.wrong]


GIVES_BACK = 128
"""X3_GIVE_BACK of engine.h: freed blocks become holes."""


@pytest.mark.parametrize(
    ("shape", "seed", "debug"),
    [(MODERN, 1, 0), (MODERN, 2, GIVES_BACK), (SMALL, 3, 0), (OLD, 4, GIVES_BACK)],
    ids=str,
)
def test_power_cuts(place: Path, shape: Shape, seed: int, debug: int) -> None:
    recording = powercut.record(place, shape, seed, powercut.mixed(OPERATIONS), debug=debug)
    wrong = wrong_ones(recording, 25, seed, place)
    assert not wrong, "\n".join(wrong)


def test_power_cuts_while_others_commit(place: Path) -> None:
    """Commits run concurrently with operations, and the cache is almost too small."""
    recording = powercut.record(place, SMALL, 5, powercut.mixed(300), stir=True, cache_bytes=1 << 16)
    assert recording.barriers > 200  # two for each commit that the load waits for: see STIRRED
    wrong = wrong_ones(recording, 25, 5, place)
    assert not wrong, "\n".join(wrong)


def much_to_free(load: Load, opened: Engine) -> None:
    """Create and remove files with hundreds of indirect blocks, which are freed in steps."""
    block = load.model.block_size
    for _ in range(3):
        load.do(operations.create)
    inodes = [ino for ino, node in load.model.nodes.items() if stat.S_ISREG(node.facts.mode)]
    for ino in inodes:
        for number in range(1, 250):
            at = number * block // 4 * block
            load.do(lambda load, ino=ino, at=at: operations.put(load, ino, at, 10))  # type: ignore[misc]
    load.commit()
    load.do(lambda load: operations.set_size(load, inodes[0], 0))
    load.do(lambda load: operations.set_size(load, inodes[1], 100 * block // 4 * block + 5))
    load.commit()
    for ino in inodes:
        directory, name = min(load.model.nodes[ino].places)
        load.do(lambda load, at=(directory, name, ino): operations.unlink_at(load, *at))  # type: ignore[misc]
    load.release()


def test_power_cuts_while_much_is_freed(place: Path) -> None:
    recording = powercut.record(place, SMALL, 6, much_to_free, debug=GIVES_BACK)
    wrong = wrong_ones(recording, 25, 6, place)
    assert not wrong, "\n".join(wrong)


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.parametrize("shape", [MODERN, SMALL, OLD], ids=str)
@pytest.mark.parametrize("seed", range(10, 15))
def test_many_power_cuts(place: Path, shape: Shape, seed: int) -> None:
    recording = powercut.record(
        place,
        shape,
        seed,
        powercut.mixed(4 * OPERATIONS),
        stir=seed % 2 == 1,
        debug=GIVES_BACK * (seed % 3 == 0),
    )
    wrong = wrong_ones(recording, 70, seed, place)
    assert not wrong, "\n".join(wrong)


RULES = [
    pytest.param(1, MODERN, id="freed blocks are held"),
    pytest.param(2, SMALL, id="logged blocks are checkpointed"),
    pytest.param(4, MODERN, id="a barrier before the commit record"),
    pytest.param(8, SMALL, id="orphans"),
    pytest.param(GIVES_BACK | 256, MODERN, id="holes are made after the commit"),
]


@pytest.mark.parametrize(("rule", "shape"), RULES)
def test_without_a_rule_cuts_do_harm(place: Path, rule: int, shape: Shape) -> None:
    """Each rule of the journal is necessary: the tests notice if it is broken."""
    for seed in range(20, 24):
        recording = powercut.record(place, shape, seed, powercut.mixed(OPERATIONS), debug=rule)
        if wrong_ones(recording, 40, seed, place):
            return
    pytest.fail("nothing was found wrong")
