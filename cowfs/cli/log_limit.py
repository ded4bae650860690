"""Limits the log, so that neither a hostile image nor a user of the mount can fill the disk with it."""

from __future__ import annotations

import logging
import time

_BURST = 200
"""How many lines may be written at once: of warnings and below, and of errors."""
_PER_SECOND = 0.1
"""How many more lines may be written each second."""
_ALIKE = 3
"""How often the same line may be written in a row."""
_ALIKE_SECONDS = 60.0
"""For how many seconds such a line is suppressed then."""
_REMEMBERED = 500
"""How many different lines are remembered."""


class Limit(logging.Filter):
    """Passes a limited number of lines. The next line says how many were left out."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[str, tuple[int, float]] = {}
        self._budgets = {False: float(_BURST), True: float(_BURST)}
        self._last = time.monotonic()
        self._left_out = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to write a line. Lines of --debug are always written."""
        if record.levelno <= logging.DEBUG:
            return True
        now = time.monotonic()
        for kind, budget in self._budgets.items():
            self._budgets[kind] = min(budget + (now - self._last) * _PER_SECOND, _BURST)
        self._last = now
        text, is_error = record.getMessage(), record.levelno >= logging.ERROR
        count, since = self._seen.get(text, (0, 0.0))
        if (count >= _ALIKE and now - since < _ALIKE_SECONDS) or self._budgets[is_error] < 1:
            self._left_out += 1
            return False
        self._budgets[is_error] -= 1
        if len(self._seen) >= _REMEMBERED:
            self._seen.clear()
        self._seen[text] = count + 1, now
        if self._left_out:
            record.msg, record.args = f"{text} ({self._left_out} earlier lines were left out)", ()
            self._left_out = 0
        return True
