"""What the daemon of a mount has counted, and what follows from it: means, percentiles, hit rates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

Range = tuple[int, int]
"""From so many ns up to so many."""


@dataclass(frozen=True, slots=True)
class Operation:
    """How often something was asked for, and how long the answers took."""

    count: int
    errors: int
    total_ns: int
    durations: dict[Range, int]
    """How many took from so many ns up to so many. Nothing of what has no answer."""

    def __sub__(self, before: Operation) -> Operation:
        """Return what has come since *before*."""
        durations = {
            range_: count - before.durations.get(range_, 0) for range_, count in self.durations.items()
        }
        return Operation(
            self.count - before.count,
            self.errors - before.errors,
            self.total_ns - before.total_ns,
            {range_: count for range_, count in durations.items() if count},
        )

    def mean_ns(self) -> float | None:
        """How long an answer took in the mean; None if there was none."""
        answers = sum(self.durations.values())
        return self.total_ns / answers if answers else None

    def percentile_ns(self, percent: float) -> float | None:
        """How long so many percent of the answers took at most, right to an eighth; None without any."""
        left = math.ceil(sum(self.durations.values()) * percent / 100)
        for (low, high), count in sorted(self.durations.items()):
            left -= count
            if left <= 0:
                return (low + high) / 2
        return None

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "count": self.count,
            "errors": self.errors,
            "total_ns": self.total_ns,
            "mean_ns": self.mean_ns(),
            "p50_ns": self.percentile_ns(50),
            "p99_ns": self.percentile_ns(99),
            "durations_ns": [[*range_, count] for range_, count in sorted(self.durations.items())],
        }


_NEVER = Operation(0, 0, 0, {})


@dataclass(frozen=True, slots=True)
class Requests:
    """All that was asked for."""

    operations: dict[str, Operation]
    under_way: list[tuple[int, str]]
    """For so many ns by now, and the operation."""
    direct_reads: int
    """Reads that were served without Python."""

    def __sub__(self, before: Requests) -> Requests:
        """Return what has come since *before*."""
        since = {
            name: operation - before.operations.get(name, _NEVER)
            for name, operation in self.operations.items()
        }
        return Requests(
            {name: operation for name, operation in since.items() if operation.count > 0},
            self.under_way,
            self.direct_reads - before.direct_reads,
        )

    def count(self) -> int:
        """How many there were."""
        return sum(operation.count for operation in self.operations.values())

    def total_ns(self) -> int:
        """How long they took together."""
        return sum(operation.total_ns for operation in self.operations.values())

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "operations": {name: operation.to_json() for name, operation in self.operations.items()},
            "under_way": [{"operation": name, "ns": ns} for ns, name in self.under_way],
            "direct_reads": self.direct_reads,
        }


def requests_in(facts: dict[str, Any]) -> Requests | None:
    """Return what a daemon tells of its requests; None when it counts none (:func:`why_none`).

    ValueError, KeyError, TypeError: it makes no sense.
    """
    told = facts.get("requests")
    if told is None:
        return None
    operations = {
        name: Operation(
            number(operation["count"]),
            number(operation["errors"]),
            number(operation["total_ns"]),
            {(number(low), number(high)): number(count) for low, high, count in operation["durations_ns"]},
        )
        for name, operation in told["operations"].items()
    }
    under_way = [(number(one["ns"]), str(one["operation"])) for one in told["under_way"]]
    return Requests(operations, under_way, number(told["direct_reads"]))


def why_none(facts: dict[str, Any]) -> str:
    """Return why a daemon counts no requests."""
    return str(facts.get("no_requests", "the daemon of this mount is an older cowfs"))


def number(told: object) -> int:
    """Return a count that a daemon has told; ValueError if it is none."""
    if type(told) is not int or not 0 <= told < 1 << 64:
        raise ValueError(told)
    return told


def caches_in(facts: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Return by name what each cache of a daemon had, and what it had not. Raises as requests_in() does."""
    told = facts.get("caches") or {}
    return {name: (number(cache["hits"]), number(cache["misses"])) for name, cache in told.items()}
