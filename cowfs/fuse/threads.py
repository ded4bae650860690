"""The threads that do long work for requests, and that wait for slow lowers."""

from __future__ import annotations

import errno
import functools
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

from cowfs.fuse.loop import RequestLoop
from cowfs.fuse.user_threads import UserThreads, in_thread
from cowfs.layers.slow import Answers, NotYet, Question
from cowfs.overlay.fs import Steps

R = TypeVar("R")
log = logging.getLogger(__name__)
_SOON = 0.02
"""How many seconds calls that nobody waits for are delayed."""

SLICE = 0.001
"""How many seconds of long work this thread does before others have a turn."""
_PAUSE = 0.002
"""How many seconds others have in between, where nobody waits for the work."""


class Threads:
    """The threads that work for the requests of one loop, some of each kind for each user."""

    def __init__(self, loop: RequestLoop) -> None:
        self._loop = loop
        self.copies, self.reads, self.syncs = UserThreads(), UserThreads(), UserThreads()
        # Work that may hang has threads of its own.
        self.slow_copies, self.slow_reads = UserThreads(), UserThreads()
        self._questions = UserThreads()
        self._later: dict[int, list[Callable[[], None]]] = {}

    @asynccontextmanager
    async def turn(self, turns: UserThreads, uid: int) -> AsyncIterator[None]:
        """Wait for this user's turn for a kind of long work; others are served meanwhile.

        Take resources such as descriptors only afterwards, so that waiting requests hold none.
        """
        loop = self._loop
        begun = turns.begin(uid) if loop.may_work() else None
        if begun is not None:
            try:
                yield
            finally:
                if turns.has_more_work(uid):
                    loop.in_trio(functools.partial(turns.end, uid, begun))
                else:
                    turns.end(uid, begun)
            return
        await loop.step_aside()
        loop.waiting += 1
        try:
            async with turns.turn(uid):
                yield
        finally:
            loop.waiting -= 1

    async def run(self, call: Callable[[], R], turns: UserThreads, uid: int) -> R:
        """Run *call* in a thread, at the user's turn, and return its result."""
        async with self.turn(turns, uid):
            return await self.do(call)

    async def do(self, call: Callable[[], R]) -> R:
        """Run *call* in a thread now and return its result: it is already the user's turn."""
        if self._loop.may_work():
            return await self._loop.work(call)
        await self._loop.step_aside()
        return await in_thread(call)

    async def run_patiently(self, call: Callable[[], R], turns: UserThreads, uid: int) -> R:
        """Like :meth:`run`, for a call that may never return: EIO if it has not when the mount ends."""
        await self._loop.step_aside()
        with self._loop.patience():
            async with self.turn(turns, uid):
                return await in_thread(call, may_hang=True)
        raise _given_up()

    async def patiently(self, call: Callable[[], R]) -> R:
        """Like :meth:`run_patiently`, but now: it is already the user's turn."""
        await self._loop.step_aside()
        with self._loop.patience():
            return await in_thread(call, may_hang=True)
        raise _given_up()

    async def stepwise(self, steps: Steps[R], uid: int, *, is_urgent: bool = True) -> R:
        """Do long work for a user in steps; return its result. Meanwhile, anything may have changed."""
        end = time.monotonic() + SLICE
        try:
            call = next(steps)
            while True:
                if call is not None:
                    try:
                        given = await self.run(call, self.reads, uid)
                    except OSError as failure:
                        call = steps.throw(failure)
                    else:
                        call = steps.send(given)
                    continue
                if time.monotonic() > end:
                    await (self._loop.yield_turn() if is_urgent else trio.sleep(_PAUSE))
                    end = time.monotonic() + SLICE
                call = next(steps)
        except StopIteration as stop:
            result: R = stop.value
            return result
        finally:
            steps.close()

    async def ask(self, question: Question, answers: Answers, names: Sequence[bytes] = ()) -> None:
        """Get the answer to a question from a slow lower, and the answers to likely next questions.

        If the question is a lookup, *names* are also looked up.
        """
        ask = functools.partial(question.ask, names)
        answers.add(await self.run_patiently(ask, self._questions, answers.uid))

    async def answered(self, call: Callable[[], R], answers: Answers, names: Sequence[bytes] = ()) -> R:
        """Return the result of *call*, as soon as the *answers* contain everything that it needs."""
        while True:
            try:
                return call()
            except NotYet as need:
                await self.ask(need.question, answers, names)

    def later(self, uid: int, call: Callable[[], None]) -> None:
        """Run *call* soon, in a thread of this user. If it hangs, only this user's questions wait."""
        calls = self._later.setdefault(uid, [])
        calls.append(call)
        if len(calls) > 1:
            return

        def begin() -> None:
            try:
                trio.lowlevel.spawn_system_task(self._do_later, uid)
            except RuntimeError:  # the mount has ended: the layers close all open files
                del self._later[uid]

        self._loop.in_trio(begin)

    async def _do_later(self, uid: int) -> None:
        await trio.sleep(_SOON)  # one thread for many
        try:
            async with self._questions.turn(uid):
                await in_thread(functools.partial(_do_all, self._later.pop(uid)), may_hang=True)
        except Exception:
            log.exception("a background operation failed")


def _do_all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _given_up() -> OSError:
    log.warning("a lower does not answer; giving up a request")
    return OSError(errno.EIO, "a lower does not answer")
