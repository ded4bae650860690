"""Threads for the long work of each user. A user with much work delays only that user."""

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
    """The threads for one kind of work. Each user's work is done in the order of arrival."""

    def __init__(self) -> None:
        self._limiters: dict[int, trio.CapacityLimiter] = {}

    @asynccontextmanager
    async def turn(self, uid: int) -> AsyncIterator[None]:
        """Wait for the turn of this user's work; after the block, the next one starts."""
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
        """Start a piece of this user's work; return the value to pass to :meth:`end`; None if it must wait.

        Any thread that holds the core lock may call this and the two methods below.
        """
        limiter = self._limiters.setdefault(uid, trio.CapacityLimiter(_EACH))
        me = object()
        try:
            limiter.acquire_on_behalf_of_nowait(me)
        except trio.WouldBlock:
            return None
        return me

    def has_more_work(self, uid: int) -> bool:
        """Whether more of this user's work waits: then only trio's thread may call :meth:`end`."""
        return bool(self._limiters[uid].statistics().tasks_waiting)

    def end(self, uid: int, me: object) -> None:
        """End a piece of work, and let the next one start."""
        limiter = self._limiters[uid]
        limiter.release_on_behalf_of(me)
        self._tidy(uid, limiter)

    def _tidy(self, uid: int, limiter: trio.CapacityLimiter) -> None:
        if not limiter.borrowed_tokens and not limiter.statistics().tasks_waiting:
            self._limiters.pop(uid, None)


async def in_thread(call: Callable[[], R], *, may_hang: bool = False) -> R:
    """Run *call* in a thread at once and return its result; the caller has waited for its turn.

    Only a call that *may_hang* can be cancelled; its thread then continues. If no thread can be started, run
    the call in the caller's thread, while others wait; EAGAIN for a call that may hang.
    """
    try:
        return await trio.to_thread.run_sync(call, limiter=_ANY, abandon_on_cancel=may_hang)
    except RuntimeError as error:
        if not is_lack_of_threads(error):
            raise
    if may_hang:
        raise OSError(errno.EAGAIN, "no thread available")
    return call()
