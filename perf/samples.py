"""The figures of a run: samples, their medians, and ratios between systems."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

FORMAT = 1


@dataclass(slots=True)
class Sample:
    """One run of a workload on a system with a new store."""

    workload: str
    system: str
    round: int
    position: int
    """The place of the system in its round, from 0."""
    seconds: float | None = None
    """Wall time of the timed part; None if it failed."""
    settle_seconds: float | None = None
    """Wall time of the unmount after it, until everything written is in the store's image."""
    mount_seconds: float | None = None
    """Wall time from the start of the last mount until its root answers."""
    daemon_cpu_seconds: float | None = None
    """Processor time of the FUSE daemon during the timed part; None for a system of the kernel."""
    busy_cpu_seconds: float = 0.0
    """Processor time of the whole machine during the timed part."""
    steal_seconds: float = 0.0
    """Processor time that the hypervisor gave to others during the timed part."""
    rss_start: int | None = None
    """Resident bytes of the daemon after mounting and set-up, before the timed part."""
    rss_end: int | None = None
    """Resident bytes of the daemon after the timed part."""
    busy_before: float = 0.0
    """Share of the processor time that other programs used just before the sample, 0 to 1."""
    load: float = 0.0
    """The one-minute load average before the sample."""
    error: str = ""
    """Why it failed, or "". A wrong result is a failure."""


@dataclass(slots=True)
class Results:
    """A whole run, with the fields of the JSON files in ``results/``."""

    started: str
    machine: dict[str, Any]
    versions: dict[str, str]
    corpus: dict[str, Any]
    systems: dict[str, dict[str, Any]]
    workloads: dict[str, dict[str, Any]]
    rounds: int
    samples: list[Sample] = field(default_factory=list)
    requests: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Requests by kind of separate, traced samples. The keys are ``workload/system``."""
    format: int = FORMAT

    def save(self, path: Path) -> None:
        """Write the file *path* atomically."""
        new = path.with_suffix(".new")
        new.write_text(json.dumps(asdict(self), indent=1) + "\n")
        new.rename(path)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a file that :meth:`save` has written; ValueError for any other file."""
        data = json.loads(path.read_text())
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{path}: not a results file of format {FORMAT}")
        known = {f.name for f in fields(Sample)}
        data["samples"] = [Sample(**{k: v for k, v in s.items() if k in known}) for s in data["samples"]]
        return cls(**data)

    def times(self, workload: str, system: str) -> list[float]:
        """Return the seconds of every sample of *workload* on *system* that did not fail."""
        return [s.seconds for s in self.samples_of(workload, system) if s.seconds is not None and not s.error]

    def samples_of(self, workload: str, system: str) -> list[Sample]:
        """Return every sample of *workload* on *system*, in order."""
        return [s for s in self.samples if s.workload == workload and s.system == system]

    def errors(self) -> list[Sample]:
        """Return every sample that failed."""
        return [s for s in self.samples if s.error]


@dataclass(frozen=True, slots=True)
class Spread:
    """The median, minimum, maximum and number of some values."""

    median: float
    low: float
    high: float
    count: int


def spread(values: list[float]) -> Spread | None:
    """Return the spread of *values*; None without values."""
    if not values:
        return None
    return Spread(statistics.median(values), min(values), max(values), len(values))


def ratio(results: Results, workload: str, system: str, base: str) -> Spread | None:
    """Return the time of *system* divided by that of *base*, paired within each round; None without pairs.

    The two samples of a round ran within a minute of each other. So their ratio does not change if the
    machine is slow for longer than that.
    """
    by_round = {s.round: s.seconds for s in results.samples_of(workload, base) if s.seconds and not s.error}
    pairs = [
        s.seconds / by_round[s.round]
        for s in results.samples_of(workload, system)
        if s.seconds and not s.error and s.round in by_round
    ]
    return spread([float(p) for p in pairs])


def rotated(names: list[str], turn: int) -> list[str]:
    """Return *names* rotated by *turn* places, so that each is first in turn."""
    if not names:
        return []
    turn %= len(names)
    return names[turn:] + names[:turn]
