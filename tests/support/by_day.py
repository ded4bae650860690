"""Choose which combinations of parameters of tests marked ``matrix`` run only at night."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import pytest


def leave_to_the_night(items: Iterable[pytest.Item]) -> None:
    """Mark as nightly the combinations that are not needed for each value of each parameter to come once."""
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
    # By identity, for not all can be hashed; a parameter's values are the same objects in all combinations.
    return frozenset((name, id(value)) for name, value in call.params.items()) if call else frozenset()


def choose(combinations: Sequence[frozenset[object]], seed: int) -> set[int]:
    """Return the numbers of few combinations in which every value comes.

    *seed* says where to begin: tests with the same parameters should not all run with the same combinations.
    The processes of one run choose the same.
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
