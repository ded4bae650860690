"""Threads for the long work of each user: who asks for much waits for his own work alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio

R = TypeVar("R")

_EACH = 4
"""So many pieces of one user's work of one kind are done at a time."""


class Turns:
    """One kind of work. The oldest that waits is next, among those of one user."""

    def __init__(self) -> None:
        self._limiters: dict[int, trio.CapacityLimiter] = {}

    async def run(self, uid: int, call: Callable[[], R]) -> R:
        """Return what *call* gives, which a thread runs when it is the turn of this work of the user's."""
        limiter = self._limiters.setdefault(uid, trio.CapacityLimiter(_EACH))
        try:
            return await trio.to_thread.run_sync(call, limiter=limiter)
        finally:
            if not limiter.borrowed_tokens and not limiter.statistics().tasks_waiting:
                self._limiters.pop(uid, None)
