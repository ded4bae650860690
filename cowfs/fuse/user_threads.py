"""Threads for the long work of each user: a user with much work waits only for his own."""

from __future__ import annotations

import errno
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

from cowfs.linux.limits import is_lack_of_threads

R = TypeVar("R")

_EACH = 4
"""How many pieces of one user's work of one kind run at a time."""
_ANY = trio.CapacityLimiter(math.inf)


class UserThreads:
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
        except BaseException:
            self._tidy(uid, limiter)
            raise
        try:
            yield
        finally:
            self.end(uid, me)

    def begin(self, uid: int) -> object | None:
        """Begin a piece of this user's work, and return what to give to :meth:`end`; None: it has to wait.

        For any thread that has the core lock, as the two below.
        """
        limiter = self._limiters.setdefault(uid, trio.CapacityLimiter(_EACH))
        me = object()
        try:
            limiter.acquire_on_behalf_of_nowait(me)
        except trio.WouldBlock:
            return None
        return me

    def has_more_work(self, uid: int) -> bool:
        """Whether more of this user's work waits: then :meth:`end` is for trio's thread alone."""
        return bool(self._limiters[uid].statistics().tasks_waiting)

    def end(self, uid: int, me: object) -> None:
        """Let the next piece of work begin."""
        limiter = self._limiters[uid]
        limiter.release_on_behalf_of(me)
        self._tidy(uid, limiter)

    def _tidy(self, uid: int, limiter: trio.CapacityLimiter) -> None:
        if not limiter.borrowed_tokens and not limiter.statistics().tasks_waiting:
            self._limiters.pop(uid, None)


async def in_thread(call: Callable[[], R], *, may_hang: bool = False) -> R:
    """Run *call* in a thread at once and return its result; the caller has waited for its turn.

    Only a call that *may_hang* can be cancelled meanwhile: the thread continues. If no thread can be started,
    the caller's thread runs it and others wait; EAGAIN for a call that may hang.
    """
    try:
        return await trio.to_thread.run_sync(call, limiter=_ANY, abandon_on_cancel=may_hang)
    except RuntimeError as error:
        if not is_lack_of_threads(error):
            raise
    if may_hang:
        raise OSError(errno.EAGAIN, "no thread available")
    return call()
