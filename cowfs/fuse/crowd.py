"""An event for many waiters, which do not all continue at once, so that others are served in between."""

from __future__ import annotations

import trio

_AT_ONCE = 16
"""How many run together: some milliseconds of work."""
_PAUSE = 0.0005
"""Seconds in which others have their turn."""


class Crowd:
    """Like trio.Event, but the waiters continue a few at a time. Only for trio's thread."""

    def __init__(self) -> None:
        self._waiters = trio.lowlevel.ParkingLot()
        self._is_set = False
        self._woken = 0

    @property
    def is_waited_for(self) -> bool:
        """Whether anybody waits."""
        return bool(self._waiters)

    def set(self) -> None:
        """Let the waiters continue."""
        self._is_set = True
        self._waiters.unpark(count=_AT_ONCE)

    async def wait(self) -> None:
        """Wait until it is set, and it is the caller's turn."""
        if self._is_set:
            return
        await self._waiters.park()
        self._woken += 1
        if self._woken % _AT_ONCE == 0:  # the last of a group wakes the next
            try:
                await trio.sleep(_PAUSE)
            finally:  # also if this waiter is cancelled: others wait for it
                self._waiters.unpark(count=_AT_ONCE)
