"""The request loop: which task waits for the next request, and how.

Waking up on another CPU costs a FUSE daemon more than the work of a request (docs/benchmarks.md). So while
requests keep coming, the loop polls for the next one for some microseconds before it sleeps; otherwise it
sleeps at once and uses no CPU time.

pyfuse3 runs several tasks, each of which waits, receives, handles and replies. Here one of them *leads*:
only it waits, and it keeps leading through any number of requests that it can answer without awaiting. A
handler that must await (a thread, another request) first *hands over* to an idle task. So the common request
needs no task switch, and a slow one delays nobody.

This module replaces the waiting function, a private name of pyfuse3. If a pyfuse3 does not have that name,
its own loop serves, only slower.

With io_uring (``rings.py``), threads serve most requests. This loop then serves only the first request, the
inodes that the kernel forgets, and requests that must wait.
"""

from __future__ import annotations

import errno
import functools
import logging
import math
import os
import select
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pyfuse3
import trio

from cowfs.fuse import libfuse
from cowfs.fuse.crowd import Crowd
from cowfs.fuse.rings import BODY, CoreLock, Rings

log = logging.getLogger(__name__)
R = TypeVar("R")

_WAIT = "_wait_fuse_readable"
_MAX_IDLE = 8
"""How many idle tasks are kept; more from a burst end."""
_POLLS = 80
_KEEP_COMING_NS = 1_000_000
"""After a request, another one within this time means that more will follow."""
_PREEMPTED_NS = 500_000
"""Polling that takes this long was preempted: others want the CPU, and polling takes it from them …"""
_BUSY_NS = 100_000_000
"""… so it is not tried again for this long."""
_YIELD_NS = 500_000
"""After this long a run of requests, other tasks (signals, the control socket) have a turn."""
_YIELD_WHEN_OTHERS_WAIT_NS = 50_000
_MOST_TURNS = 64
"""How often a request lets others be served first."""
_PATIENCE = 5.0
"""Seconds to wait, when the filesystem ends, for something that may never come."""
_PAUSE_NS = 50_000_000
"""After this long without a request the machine may have slept: freezing and thawing take longer …"""
_FORGETS = 0.02
"""Seconds in which FORGETs gather before they are handled, where requests come by io_uring."""
_WAKING_NS = 20_000_000
"""… and for so long from then on it may still be waking: others run before the kernel counts the sleep."""


class RequestLoop:
    """Serves the session that :func:`pyfuse3.init` opened; call :meth:`attach` first."""

    def __init__(self, rings: Rings | None = None) -> None:
        self._rings = rings
        self.after_pause: Callable[[], None] | None = None
        """Called before requests are received after a pause."""
        self.hurry: Callable[[bool], object] = lambda on: None
        """Each thread that runs handlers tells it that they must not wait for the disk."""
        self.waiting = 0
        self._forget_now, self._forgotten = trio.Event(), trio.Event()
        self._attached = False
        self._patient: set[trio.CancelScope] = set()
        self._patience = self._end = math.inf
        self._leader: trio.lowlevel.Task | None = None
        self._idle: list[trio.lowlevel.Task] = []
        self._first: trio.lowlevel.Task | None = None
        self._nursery: trio.Nursery | None = None
        self._closing = False
        self._spin = False
        self._yielded = 0
        self._busy_until = 0
        self._last = 0
        self._waking_until = 0
        self._fd = -1
        self._poll = select.poll()

    def attach(self) -> None:
        """Remember the session that was just opened. Call it before anything else opens ``/dev/fuse``."""
        self._attached = True
        if hasattr(pyfuse3, _WAIT):
            self._fd = _fuse_fd()

    def connection(self) -> int:
        """Return the descriptor of the connection to the kernel, -1 if not known."""
        return self._fd

    async def run(self) -> None:
        """Serve requests until the filesystem is unmounted or :meth:`stop` is called."""
        stock = getattr(pyfuse3, _WAIT, None)
        if stock is None or not hasattr(pyfuse3, BODY):
            await pyfuse3.main()
            return
        self._poll.register(self._fd, select.POLLIN)
        setattr(pyfuse3, _WAIT, self._readable)
        self.hurry(True)
        watch = _TaskWatch(self._task_ended)
        trio.lowlevel.add_instrument(watch)
        try:
            if self._rings is None:
                async with trio.open_nursery() as self._nursery:
                    await pyfuse3.main(1, 0)  # one task, which makes no others: this class makes them
            else:
                await self._run_rings(self._rings)
        finally:
            self.hurry(False)
            self._nursery = None
            trio.lowlevel.remove_instrument(watch)
            setattr(pyfuse3, _WAIT, stock)

    async def _run_rings(self, rings: Rings) -> None:
        libfuse.ring.watch_pauses(self.after_pause)
        rings.hurry = self.hurry
        lock = CoreLock()
        libfuse.ring.core_lock()
        trio.lowlevel.add_instrument(lock)
        try:
            async with trio.open_nursery() as self._nursery, rings.serving(self._nursery, self.stop):
                await pyfuse3.main(1, 0)
            await rings.close()
        finally:
            trio.lowlevel.remove_instrument(lock)
            libfuse.ring.core_unlock()

    def stop(self) -> None:
        """Make :meth:`run` return after the requests that are being handled; give up those that hang."""
        self._close()
        pyfuse3.terminate()

    @contextmanager
    def patience(self) -> Iterator[trio.CancelScope]:
        """Wait in the block for something that may never come, until the filesystem is to end.

        Then the block is cancelled at its await, and the scope's ``cancelled_caught`` is true.
        """
        scope = trio.CancelScope(deadline=min(self._end, trio.current_time() + self._patience))
        self._patient.add(scope)
        try:
            with scope:
                yield scope
        finally:
            self._patient.discard(scope)

    def stop_waiting_soon(self) -> None:
        """From now on, wait at most a few seconds for anything: a later result is of no use."""
        self._patience = _PATIENCE
        self._hurry(trio.current_time() + _PATIENCE)

    def _hurry(self, end: float) -> None:
        for scope in self._patient:
            scope.deadline = min(scope.deadline, end)

    def is_quiet(self) -> bool:
        """Whether no other request has arrived, and no thread handles one."""
        if self.waiting:
            return False
        if self._rings is not None and self._rings.here():
            return bool(libfuse.ring.ring_quiet())
        return self._fd >= 0 and not self._poll.poll(0)

    def has_next_request(self) -> bool:
        """Whether a request has arrived that is not received yet."""
        return self._fd >= 0 and bool(self._poll.poll(0))

    async def serve_others(self) -> None:
        """First serve requests that have arrived, if there are not too many."""
        if self.forgets_wait():
            await self.take_forgets()
            return
        for _ in range(_MOST_TURNS):
            if not self.has_next_request():
                return
            await self.yield_turn()

    def forget_attributes(self, ino: int) -> None:
        """Make the kernel ask again for an inode's attributes before it uses them. Does not block."""
        if not self._attached:
            return
        try:
            pyfuse3.invalidate_inode(ino, attr_only=True)
        except OSError as error:
            if error.errno != errno.ENOENT:  # the kernel does not know the inode
                log.warning("the kernel may still use old attributes of inode %d: %s", ino, error.strerror)

    def ask_again(self, ino: int, name: bytes | None) -> None:
        """Make the kernel forget all that it knows about an inode, or about a *name* in a directory.

        Blocks until pending requests are answered, so the thread that answers them must not call it.
        """
        self._notify(ino, functools.partial(pyfuse3.invalidate_inode, ino))
        if name is not None:
            self.look_up_again(ino, name)

    def look_up_again(self, ino: int, name: bytes) -> None:
        """Make the kernel look a *name* in a directory up again. Blocks as :meth:`ask_again` does."""
        self._notify(ino, functools.partial(pyfuse3.invalidate_entry, ino, name))

    def _notify(self, ino: int, call: Callable[[], None]) -> None:
        if not self._attached:
            return
        try:
            call()
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.ENOTEMPTY, errno.EBUSY}:
                log.warning("the kernel may still use the former state of inode %d: %s", ino, error.strerror)

    def ask_again_soon(self, ino: int, name: bytes) -> None:
        """Call :meth:`ask_again` in a thread. Does not block."""

        async def ask() -> None:
            await trio.to_thread.run_sync(self.ask_again, ino, name)

        self.in_trio(lambda: trio.lowlevel.spawn_system_task(ask))

    async def step_aside(self) -> None:
        """Let other requests be served: the caller is about to await something."""
        if self._rings is not None and self._rings.here():
            libfuse.empty_buffer()
            await self._rings.leave()
        else:
            self._hand_over()

    def may_work(self) -> bool:
        """Whether the caller can use :meth:`work`, which is shorter than stepping aside."""
        return self._rings is not None and self._rings.here() and self._rings.may_work()

    def work(self, call: Callable[[], R]) -> Awaitable[R]:
        """Run a blocking call in a worker, and continue there, while others are served. Ask
        :meth:`may_work`."""
        assert self._rings is not None
        return self._rings.work(call)

    @staticmethod
    def apart(call: Callable[[], R]) -> Awaitable[R]:
        """Let a ring's thread make a call while the caller, whom it runs, is suspended."""
        return Rings.apart(call)

    def tell(self, crowd: Crowd) -> None:
        """Let the waiters continue; any thread may call it."""
        if crowd.is_waited_for:
            self.in_trio(crowd.set)
        else:
            crowd.set()

    def in_trio(self, call: Callable[[], object]) -> None:
        """Run *call* in trio's thread: at once if that is the caller."""
        if self._rings is not None and self._rings.here():
            self._rings.in_trio(call)
        else:
            call()

    def _hand_over(self) -> None:
        if self._leader is trio.lowlevel.current_task():
            self._leader = None
            libfuse.empty_buffer()
            self._appoint()

    def forgets_wait(self) -> bool:
        """Whether FORGET requests are waiting. Taking them may free space."""
        return self._rings is not None and libfuse.rings_serve() and bool(self._poll.poll(0))

    async def take_forgets(self) -> None:
        """Wait until they are taken."""
        if not self.forgets_wait():
            return
        await self.step_aside()
        if self._closing or not self._poll.poll(0):  # meanwhile
            return
        self._forget_now.set()
        await self._forgotten.wait()

    def take_forgets_soon(self) -> None:
        """Take the next FORGET requests soon, so that they do not accumulate."""
        if self._rings is not None:
            self.in_trio(self._forget_now.set)

    async def yield_turn(self) -> None:
        """Let others run: the caller has much to do."""
        await self.step_aside()
        self.waiting += 1
        try:
            await trio.lowlevel.checkpoint()
        finally:
            self.waiting -= 1

    def _task_ended(self, task: trio.lowlevel.Task) -> None:
        # A leader ends when it receives, between two waits, the news that the filesystem is unmounted.
        if task is self._leader:
            self._leader = None
            self._close()

    def _appoint(self) -> None:
        if self._idle:
            task = self._idle.pop()
            self._leader = task
            trio.lowlevel.reschedule(task)
        elif self._nursery is not None and not self._closing:
            body = getattr(pyfuse3, BODY)
            self._nursery.start_soon(body, self._nursery, 1, 0)

    def _close(self) -> None:
        if not self._closing:
            self._closing = True
            self._end = trio.current_time() + _PATIENCE
            self._hurry(self._end)
        self._forgotten.set()
        while self._idle:
            trio.lowlevel.reschedule(self._idle.pop())

    async def _readable(self) -> bool:
        """Return True if the caller should receive a request, False if it should end."""
        if self._rings is not None:
            receives = self._rings.receives()
            if receives is not None:
                return receives if isinstance(receives, bool) else await receives
        task = trio.lowlevel.current_task()
        if self._first is None:
            self._first = task  # pyfuse3.main ends with this task
        if self._leader is not task:
            if self._leader is not None and not self._closing:
                if len(self._idle) >= _MAX_IDLE and task is not self._first:
                    return False
                await self._park(task)
            else:
                self._leader = task
        if self._closing:
            await trio.lowlevel.checkpoint()
            return False
        return await self._lead()

    async def _park(self, task: trio.lowlevel.Task) -> None:
        def abort(_: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
            if task in self._idle:
                self._idle.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        self._idle.append(task)
        await trio.lowlevel.wait_task_rescheduled(abort)

    async def _lead(self) -> bool:
        poll = self._poll.poll
        now = time.monotonic_ns()
        pause = _YIELD_WHEN_OTHERS_WAIT_NS if self.waiting else _YIELD_NS
        if now - self._yielded > pause:
            await self._yield()
            if self._closing:
                return False
        events = poll(0)
        if not events and self._spin and now > self._busy_until:
            for _ in range(_POLLS):
                events = poll(0)
                if events:
                    break
            else:
                after = time.monotonic_ns()
                if after - now > _PREEMPTED_NS:
                    self._busy_until = after + _BUSY_NS
        if not events and self._forget_now.is_set():
            self._forget_now = trio.Event()
            self._forgotten.set()
            self._forgotten = trio.Event()
        while not events:
            asleep = time.monotonic_ns()
            try:
                await trio.lowlevel.wait_readable(self._fd)
            except trio.ClosedResourceError:
                self._close()
            if self._closing:
                return False
            if libfuse.rings_serve() and not _is_over(poll(0)):
                with trio.move_on_after(_FORGETS):
                    await self._forget_now.wait()
                if self._closing:
                    return False
            self._yielded = time.monotonic_ns()
            self._spin = self._yielded - asleep < _KEEP_COMING_NS and self._rings is None
            events = poll(0)
        if _is_over(events):
            self._close()
            return False
        if self.after_pause is not None:
            now = time.monotonic_ns()
            if now - self._last > _PAUSE_NS:
                self._waking_until = now + _WAKING_NS
            if now < self._waking_until:
                self.after_pause()
            self._last = now
        return True

    async def _yield(self) -> None:
        await trio.lowlevel.checkpoint()
        self._yielded = time.monotonic_ns()


def _is_over(events: list[tuple[int, int]]) -> bool:
    """Whether the filesystem is unmounted (POLLERR)."""
    return bool(events) and bool(events[0][1] & ~select.POLLIN)


class _TaskWatch(trio.abc.Instrument):
    """Notices when a task ends."""

    def __init__(self, told: Callable[[trio.lowlevel.Task], None]) -> None:
        self._told = told

    def task_exited(self, task: trio.lowlevel.Task) -> None:
        self._told(task)


def _fuse_fd() -> int:
    """Return the session's descriptor, which pyfuse3 does not expose."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                return int(name)
        except OSError:
            continue
    raise RuntimeError("no FUSE session is open")
