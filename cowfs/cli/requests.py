"""The counters of a mount's daemon, and the means, percentiles and hit rates computed from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

Range = tuple[int, int]
"""A range of ns: from the first up to, but without, the second."""


@dataclass(frozen=True, slots=True)
class Operation:
    """The number of requests for one operation, and the times of the answers."""

    count: int
    errors: int
    total_ns: int
    durations: dict[Range, int]
    """The number of answers by their duration. Empty for operations without an answer."""

    def __sub__(self, before: Operation) -> Operation:
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
        """Return the mean duration of an answer in ns; None if there was none."""
        answers = sum(self.durations.values())
        return self.total_ns / answers if answers else None

    def percentile_ns(self, percent: float) -> float | None:
        """Return the duration in ns that *percent* % of the answers did not exceed, accurate to one eighth.

        None if there was no answer.
        """
        left = math.ceil(sum(self.durations.values()) * percent / 100)
        for (low, high), count in sorted(self.durations.items()):
            left -= count
            if left <= 0:
                return (low + high) / 2
        return None

    def to_json(self) -> dict[str, Any]:
        """Return the counters as JSON."""
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
    """The counters of all operations."""

    operations: dict[str, Operation]
    under_way: list[tuple[int, str]]
    """The requests in progress: their age in ns, and the operation."""
    direct_reads: int
    """Reads that were served without Python."""

    def __sub__(self, before: Requests) -> Requests:
        """Return the requests since *before*."""
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
        """The number of requests."""
        return sum(operation.count for operation in self.operations.values())

    def total_ns(self) -> int:
        """The total time of all requests."""
        return sum(operation.total_ns for operation in self.operations.values())

    def to_json(self) -> dict[str, Any]:
        """Return the counters as JSON."""
        return {
            "operations": {name: operation.to_json() for name, operation in self.operations.items()},
            "under_way": [{"operation": name, "ns": ns} for ns, name in self.under_way],
            "direct_reads": self.direct_reads,
        }


def requests_in(facts: dict[str, Any]) -> Requests | None:
    """Return the request counters that a daemon sent; None if it does not count them (:func:`why_none`).

    ValueError, KeyError or TypeError if they are invalid.
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
    """Return why a daemon does not count requests."""
    return str(facts.get("no_requests", "the daemon of this mount is an older cowfs"))


def number(told: object) -> int:
    """Return a count that a daemon sent; ValueError if it is not one."""
    if type(told) is not int or not 0 <= told < 1 << 64:
        raise ValueError(told)
    return told


def caches_in(facts: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Return, by name, the hits and misses of each cache of a daemon. Raises what requests_in() raises."""
    told = facts.get("caches") or {}
    return {name: (number(cache["hits"]), number(cache["misses"])) for name, cache in told.items()}
