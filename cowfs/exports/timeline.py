"""Draw when files were changed, and by which programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape as xml

from cowfs.errors import printable

if TYPE_CHECKING:
    from cowfs.changes.blame import Record

_MOST_BINS = 120
_MOST_TOLD = 20
_LONGEST = 60
_LATEST = 253402300799
"""The end of the year 9999, in seconds."""
_WIDTH, _HEIGHT, _FOOT = 1200, 160, 22


class Timeline:
    """Counts records by time, in a limited number of bins, and by program."""

    def __init__(self, note: Callable[[bytes, str], object] | None = None) -> None:
        """*note* is called with each path and the program that changed it, the newest first. Without it,
        *who* records the last program of each path."""
        self._width = 1
        """The width of a bin in milliseconds."""
        self._bins: dict[int, Counter[str]] = {}
        self._programs: Counter[str] = Counter()
        self.who: dict[bytes, str] = {}
        """The program that was the last to do something to a path."""
        self._note = note or self.who.setdefault

    def add(self, record: Record) -> None:
        """Count a record. Records come in order, the newest first."""
        process = record.process
        program = printable(process.program)[:_LONGEST] if process is not None else "the kernel"
        program = program or "a hidden process"
        self._programs[program] += 1
        for path in (record.path, record.to):
            if path is not None:
                self._note(path, program)
        self._count(record.last // 1000 // self._width, program, 1)
        while max(self._bins) - min(self._bins) >= _MOST_BINS:
            self._width *= 2
            finer, self._bins = self._bins, {}
            for number, counts in finer.items():
                for name, count in counts.items():
                    self._count(number // 2, name, count)

    def _count(self, number: int, program: str, count: int) -> None:
        self._bins.setdefault(number, Counter())[program] += count

    def programs(self) -> list[tuple[str, int]]:
        """Return the programs with the most records, and the number of these."""
        return sorted(self._programs.items(), key=lambda item: (-item[1], item[0]))[:_MOST_TOLD]

    def picture(self) -> str:
        """Return an SVG element; "" if there are no records."""
        if not self._bins:
            return ""
        first, last = min(self._bins), max(self._bins)
        wide = _WIDTH / (last - first + 1)
        most = max(map(Counter.total, self._bins.values()))
        begin, end = self._time(first), self._time(last + 1)
        lines = [
            f'<svg class="timeline" role="img" viewBox="0 0 {_WIDTH} {_HEIGHT + _FOOT}" '
            f'aria-label="Changes from {begin} to {end}">'
        ]
        for number in sorted(self._bins):
            counts = self._bins[number]
            high = max(counts.total() / most * (_HEIGHT - 4), 2)
            told = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:4]
            names = ", ".join(f"{name} {count}" for name, count in told)
            lines.append(
                f'<rect x="{(number - first) * wide:.1f}" y="{_HEIGHT - high:.1f}" '
                f'width="{max(min(wide, 40) - 1, 1):.1f}" height="{high:.1f}">'
                f"<title>{self._time(number)}: {xml(names)}</title></rect>"
            )
        lines.append(f'<line x1="0" x2="{_WIDTH}" y1="{_HEIGHT}" y2="{_HEIGHT}"/>')
        lines.append(f'<text x="0" y="{_HEIGHT + 17}">{begin}</text>')
        lines.append(f'<text x="{_WIDTH}" y="{_HEIGHT + 17}" text-anchor="end">{end}</text></svg>')
        return "".join(lines)

    def _time(self, number: int) -> str:
        seconds = min(number * self._width // 1000, _LATEST)
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
