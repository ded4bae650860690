"""Whether a process does nothing, as far as /proc shows it (proc_pid_stat(5))."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

_SLEEPS = frozenset((b"S", b"T", b"t", b"Z", b"X", b"I"))
_LITTLE = 2
"""Clock ticks of CPU time, of 10 ms: so much do timers take that do nothing."""
_STAT_MAX = 4096


class Idleness:
    """Watches a process, its threads and its children."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._since = time.monotonic()
        self._state = _state(pid)

    def seconds(self) -> float:
        """Return for how long none has run, waited for a CPU, begun to wait for a disk, or ended, whenever
        this was asked.

        0 if /proc does not show it.
        """
        before, state = self._state, _state(self._pid)
        now = time.monotonic()
        if (
            state is None
            or before is None
            or state.waits != before.waits
            or not 0 <= state.ticks - before.ticks <= _LITTLE
        ):
            self._state, self._since = state, now
        return now - self._since

    @property
    def is_at_disk(self) -> bool:
        """Whether one waited for a disk when this was asked last."""
        return self._state is not None and bool(self._state.waits)


class _State(NamedTuple):
    ticks: int
    """CPU time of all together."""
    waits: frozenset[tuple[str, bytes]]
    """The threads that wait for a disk, and how often each has waited."""


def _state(pid: int) -> _State | None:
    """Return the state of a process and its descendants; None if one is busy or hidden."""
    total, left = 0, [pid]
    waits: set[tuple[str, bytes]] = set()
    try:
        while left:
            tasks = Path(f"/proc/{left.pop()}/task")
            for task in os.listdir(tasks):
                with open(tasks / task / "stat", "rb") as file:
                    facts = file.read(_STAT_MAX).rpartition(b") ")[2].split()
                if facts[0] == b"D":
                    waits.add((task, _switches(tasks / task / "status")))
                elif facts[0] not in _SLEEPS:
                    return None
                total += int(facts[11]) + int(facts[12])  # utime, stime
                left += map(int, (tasks / task / "children").read_text().split())
    except (OSError, ValueError, IndexError):
        return None
    return _State(total, frozenset(waits))


def _switches(status: Path) -> bytes:
    """Return the line that counts how often a thread has waited."""
    return status.read_bytes().partition(b"\nvoluntary_ctxt_switches:")[2].partition(b"\n")[0]
