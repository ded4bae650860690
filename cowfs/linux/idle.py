"""Whether a process does nothing, as far as /proc shows it (proc_pid_stat(5))."""

from __future__ import annotations

import os
import time
from pathlib import Path

_SLEEPS = frozenset((b"S", b"T", b"t", b"Z", b"X", b"I"))
_LITTLE = 2
"""Clock ticks of CPU time, of 10 ms: so much do timers take that do nothing."""
_STAT_MAX = 4096


class Idleness:
    """Watches a process, its threads and its children."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._since = time.monotonic()
        self._ticks: int | None = _ticks(pid)

    def seconds(self) -> float:
        """Return for how long none has run, waited for a CPU or a disk, or ended, whenever this was asked.

        0 if /proc does not show it.
        """
        ticks = _ticks(self._pid)
        now = time.monotonic()
        if ticks is None or self._ticks is None or not 0 <= ticks - self._ticks <= _LITTLE:
            self._ticks, self._since = ticks, now
        return now - self._since


def _ticks(pid: int) -> int | None:
    """Return the CPU time of a process and its descendants in ticks; None if one is busy or hidden."""
    total, left = 0, [pid]
    try:
        while left:
            tasks = Path(f"/proc/{left.pop()}/task")
            for task in os.listdir(tasks):
                with open(tasks / task / "stat", "rb") as file:
                    facts = file.read(_STAT_MAX).rpartition(b") ")[2].split()
                if facts[0] not in _SLEEPS:
                    return None
                total += int(facts[11]) + int(facts[12])  # utime, stime
                left += map(int, (tasks / task / "children").read_text().split())
    except (OSError, ValueError, IndexError):
        return None
    return total
