"""Threads for the long work of each user: who asks for much waits for his own work alone."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

R = TypeVar("R")

_EACH = 4
"""So many pieces of one user's work of one kind are done at a time."""
_ANY = trio.CapacityLimiter(math.inf)


class Turns:
    """One kind of work. The oldest that waits is next, among those of one user."""

    def __init__(self) -> None:
        self._limiters: dict[int, trio.CapacityLimiter] = {}

    @asynccontextmanager
    async def turn(self, uid: int) -> AsyncIterator[None]:
        """Wait for the turn of a piece of this user's work, and let the next one begin after it."""
        limiter = self._limiters.setdefault(uid, trio.CapacityLimiter(_EACH))
        me = object()
        try:
            await limiter.acquire_on_behalf_of(me)
            try:
                yield
            finally:
                limiter.release_on_behalf_of(me)
        finally:
            if not limiter.borrowed_tokens and not limiter.statistics().tasks_waiting:
                self._limiters.pop(uid, None)


async def in_thread(call: Callable[[], R], *, may_hang: bool = False) -> R:
    """Return what *call* gives, which a thread runs at once: to wait for a turn is the caller's.

    To be cancelled meanwhile is only for one that *may_hang*: the thread goes on then.
    """
    return await trio.to_thread.run_sync(call, limiter=_ANY, abandon_on_cancel=may_hang)
