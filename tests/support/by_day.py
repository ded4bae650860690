"""Choose the combinations of parameters that tests marked ``matrix`` run only at night."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import pytest


def mark_nightly_combinations(items: Iterable[pytest.Item]) -> None:
    """Mark combinations as nightly, except as many as it takes to run every value of each parameter once."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("matrix") and not item.get_closest_marker("nightly"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for name, combined in tests.items():
        chosen = choose([_values(item) for item in combined], zlib.crc32(name.encode()))
        for number, item in enumerate(combined):
            if number not in chosen:
                item.add_marker(pytest.mark.nightly)


def _values(item: pytest.Item) -> frozenset[object]:
    call = getattr(item, "callspec", None)
    # By identity: not all values can be hashed, and all combinations share the same objects.
    return frozenset((name, id(value)) for name, value in call.params.items()) if call else frozenset()


def choose(combinations: Sequence[frozenset[object]], seed: int) -> set[int]:
    """Return the indexes of a few combinations that together have every value.

    The search begins at a place that depends on *seed*, so that tests with the same parameters run different
    combinations. All processes of a run choose the same ones.
    """
    start = seed % len(combinations)
    order = [*range(start, len(combinations)), *range(start)]
    missing = frozenset[object]().union(*combinations)
    chosen = set[int]()
    while missing or not chosen:
        best = max(order, key=lambda number: len(combinations[number] & missing))
        chosen.add(best)
        missing -= combinations[best]
    return chosen
