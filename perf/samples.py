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
    """One workload, once, on one system with a fresh store."""

    workload: str
    system: str
    round: int
    position: int
    """Which turn of its round it had: 0 is the first system."""
    seconds: float | None = None
    """Wall time of the timed part; None when it failed."""
    settle_seconds: float | None = None
    """Wall time of the unmounting after it, until everything written is in the store's image."""
    mount_seconds: float | None = None
    """From starting the (last) mount until its root answers."""
    daemon_cpu_seconds: float | None = None
    """Processor time of the FUSE daemon during the timed part; None for the kernel's."""
    busy_cpu_seconds: float = 0.0
    """Processor time of the whole machine during the timed part."""
    steal_seconds: float = 0.0
    """Processor time that the hypervisor took away during the timed part."""
    rss_start: int | None = None
    """Resident bytes of the daemon after mounting and set-up, before the timed part."""
    rss_end: int | None = None
    """Resident bytes of the daemon after the timed part."""
    busy_before: float = 0.0
    """Share of the processors in use by others just before the sample, 0 to 1."""
    load: float = 0.0
    """The one-minute load average before the sample."""
    error: str = ""
    """Why it failed: a wrong result is a failure."""


@dataclass(slots=True)
class Results:
    """A whole run, as the file in ``results/`` holds it."""

    started: str
    machine: dict[str, Any]
    versions: dict[str, str]
    corpus: dict[str, Any]
    systems: dict[str, dict[str, Any]]
    workloads: dict[str, dict[str, Any]]
    rounds: int
    samples: list[Sample] = field(default_factory=list)
    requests: dict[str, dict[str, Any]] = field(default_factory=dict)
    """``workload/system`` -> requests by kind, of separate, traced samples."""
    format: int = FORMAT

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        new = path.with_suffix(".new")
        new.write_text(json.dumps(asdict(self), indent=1) + "\n")
        new.rename(path)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a file that :meth:`save` wrote; ValueError for anything else."""
        data = json.loads(path.read_text())
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{path}: not a results file of format {FORMAT}")
        known = {f.name for f in fields(Sample)}
        data["samples"] = [Sample(**{k: v for k, v in s.items() if k in known}) for s in data["samples"]]
        return cls(**data)

    def times(self, workload: str, system: str) -> list[float]:
        """The seconds of every good sample of *workload* on *system*."""
        return [s.seconds for s in self.of(workload, system) if s.seconds is not None and not s.error]

    def of(self, workload: str, system: str) -> list[Sample]:
        """Every sample of *workload* on *system*, in order."""
        return [s for s in self.samples if s.workload == workload and s.system == system]

    def errors(self) -> list[Sample]:
        """Every sample that failed."""
        return [s for s in self.samples if s.error]


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with what lies around it."""

    median: float
    low: float
    high: float
    count: int


def spread(values: list[float]) -> Spread | None:
    """Median, minimum and maximum; None of nothing."""
    if not values:
        return None
    return Spread(statistics.median(values), min(values), max(values), len(values))


def ratio(results: Results, workload: str, system: str, base: str) -> Spread | None:
    """How many times as long *system* took as *base*, paired within each round.

    The two samples of one round ran within a minute of each other, so what slows the machine down for
    longer than that cancels out of their quotient. None when no round has both.
    """
    by_round = {s.round: s.seconds for s in results.of(workload, base) if s.seconds and not s.error}
    pairs = [
        s.seconds / by_round[s.round]
        for s in results.of(workload, system)
        if s.seconds and not s.error and s.round in by_round
    ]
    return spread([float(p) for p in pairs])


def rotated(names: list[str], turn: int) -> list[str]:
    """*names*, begun *turn* places further on, so that nobody is always first."""
    if not names:
        return []
    turn %= len(names)
    return names[turn:] + names[:turn]
