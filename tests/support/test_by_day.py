"""The combinations of a test's parameters that run by day."""

from __future__ import annotations

from itertools import product

import pytest

from tests.support.by_day import choose


@pytest.mark.parametrize("seed", range(7))
def test_few_combinations_have_each_value(seed: int) -> None:
    combinations = [frozenset(enumerate(values)) for values in product(range(2), range(3), range(5))]
    chosen = choose(combinations, seed)
    assert frozenset[object]().union(*(combinations[number] for number in chosen)) == frozenset(
        (parameter, value) for parameter, count in enumerate((2, 3, 5)) for value in range(count)
    )
    assert len(chosen) == 5
    assert choose(combinations, seed) == chosen


def test_combinations_differ_between_tests() -> None:
    combinations = [frozenset(enumerate(values)) for values in product(range(2), range(2))]
    assert {frozenset(choose(combinations, seed)) for seed in range(4)} == {
        frozenset({0, 3}),
        frozenset({1, 2}),
    }


def test_a_test_without_parameters_runs() -> None:
    assert choose([frozenset()], 5) == {0}
