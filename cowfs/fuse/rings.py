"""Requests by io_uring: a thread for each CPU serves the requests made there; requests that must wait
continue in trio.

The caller of a request and the thread that serves it are on one CPU, so that no other CPU has to wake up,
which takes longer than most requests (docs/benchmarks.md). ``ring.c`` moves the requests; this module runs
the handlers.

pyfuse3 serves requests in coroutines, each a loop of receiving, handling and answering. Such a coroutine
starts in trio, up to where it waits for a request; then a ring's thread drives it. A handler that does not
wait never uses trio. One that must wait calls :meth:`Rings.leave` first: its coroutine continues as a trio
task, which ends after the answer, and the thread drives a new coroutine.

Most handlers that wait do so for one piece of work: an fsync, the data of a copy-up, a read that
decompresses. They call :meth:`Rings.work`: a worker does the work, drives the coroutine until it has
answered, and gives it back. That saves two switches between threads, which take longer than most such work.

The core lock (``core_lock.c``) lets one thread at a time run this code: trio's thread holds it except while
it waits for I/O, and a worker holds it while it drives a coroutine.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import threading
import time
import types
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from contextlib import asynccontextmanager
from contextvars import Context, copy_context
from typing import Any, NamedTuple, TypeVar, cast

import pyfuse3
import trio

from cowfs.errors import SystemFailure
from cowfs.fuse import libfuse
from cowfs.linux.limits import may_step_back

log = logging.getLogger(__name__)
R = TypeVar("R")

BODY = "_session_loop"
"""pyfuse3's coroutine that serves requests: a private name."""
_SWITCH = "/sys/module/fuse/parameters/enable_uring"
_POSSIBLE = "/sys/devices/system/cpu/possible"
_SPARE = 4
"""How many coroutines are ready for requests before they are needed."""
_WORKERS = 8
"""The most requests that workers handle at a time; others wait in trio."""
_NEVER = 1 << 30
_NO_MEMORY = 0.01
"""Seconds until a request that failed for lack of memory is received again."""


class _Here(threading.local):
    serves = False
    """Whether this thread runs handlers, and is not in trio."""
    works = False
    """Whether it is a worker."""


_here = _Here()


class _Move:
    """Yielded by a coroutine that must continue in trio."""


class _Ready:
    """Yielded by a coroutine that waits for a request."""


class _Apart(NamedTuple):
    """Yielded by a coroutine that wants a call to be made in this thread, while it does not run."""

    call: Callable[[], Any]


class _Work(NamedTuple):
    """Yielded by a coroutine that waits for some work."""

    call: Callable[[], Any]


@types.coroutine
def _pause(why: object) -> Generator[object, Any, Any]:
    return (yield why)


class _Job(NamedTuple):
    """Some work, and the coroutine that waits for it."""

    coroutine: Coroutine[Any, Any, None]
    context: Context
    call: Callable[[], Any]

    def go_on(self, value: Any, failure: BaseException | None) -> object:
        """Give the coroutine the result of the work; return what it waits for next, None if it has ended."""
        try:
            if failure is not None:
                return self.context.run(self.coroutine.throw, failure)
            return self.context.run(self.coroutine.send, value)
        except StopIteration:
            return None
        except Exception:
            log.exception("serving a request failed")
            return None


def _outcome(call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """Return the result of *call*, or its exception."""
    try:
        return call(), None
    except BaseException as failure:
        return None, failure


class Rings:
    """The rings of one mount, and their threads. :meth:`serving` runs them."""

    def __init__(self, cpus: tuple[int, ...]) -> None:
        self._cpus = cpus
        self._threads: list[threading.Thread] = []
        self._spare: deque[Coroutine[Any, Any, None]] = deque()
        self._more = threading.Semaphore(0)
        self._making = False
        self._stopped = False
        self._adopted: set[trio.lowlevel.Task] = set()
        self._left = 0
        self._all_left = trio.Event()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._workers: list[threading.Thread] = []
        self._working = 0
        self._all_done = trio.Event()
        self._token: trio.lowlevel.TrioToken
        self._nursery: trio.Nursery
        self._told: Callable[[], None]
        self.hurry: Callable[[bool], object] = lambda on: None
        """Each thread tells it whether it runs handlers, which must not wait for the disk."""

    @asynccontextmanager
    async def serving(self, nursery: trio.Nursery, ended: Callable[[], None]) -> AsyncIterator[None]:
        """Serve requests in threads; call *ended* in trio when no more will arrive.

        Requests that must wait continue in *nursery*. After the block, no new request is received, and the
        nursery has the unfinished ones.
        """
        self._nursery = nursery
        self._told = ended
        self._token = trio.lowlevel.current_trio_token()
        for _ in range(_SPARE):
            self._make()
        for number in range(len(self._cpus)):
            thread = threading.Thread(target=self._serve, args=(number,), name=f"ring {number}", daemon=True)
            self._threads.append(thread)
            thread.start()
        try:
            yield
        finally:
            self._stopped = True
            libfuse.ring.ring_stop()
            for _ in self._threads:
                self._more.release()
            with trio.CancelScope(shield=True):
                await self._all_left.wait()
                if self._working:
                    await self._all_done.wait()

    def describe(self) -> str:
        """Describe how many threads serve."""
        count = len(self._cpus)
        return f"{count} {'thread' if count == 1 else 'threads'}"

    async def close(self) -> None:
        """End the threads, after the last answer."""
        libfuse.ring.ring_quit()
        for _ in self._workers:
            self._jobs.put(None)
        with trio.CancelScope(shield=True):
            for thread in self._threads + self._workers:
                await trio.to_thread.run_sync(thread.join)
        libfuse.ring.ring_close()

    def receives(self) -> bool | Awaitable[bool] | None:
        """Whether the caller, pyfuse3's wait for a request, should receive one; None: it is not a ring's."""
        if _here.works:
            return self._begin() if len(self._spare) < _SPARE else False
        if _here.serves:
            return True
        if self._making:
            return self._begin()
        return False if trio.lowlevel.current_task() in self._adopted else None

    @staticmethod
    async def _begin() -> bool:
        await _pause(_Ready)
        return True

    @staticmethod
    def here() -> bool:
        """Whether the caller runs outside trio, and may await only :meth:`leave` and :meth:`work`."""
        return _here.serves

    @staticmethod
    def leave() -> Awaitable[None]:
        """Continue in trio, so that the thread can serve others."""
        return _pause(_Move)

    def may_work(self) -> bool:
        """Whether the caller runs outside trio, and a worker is free for it."""
        if _here.works:
            return True
        if self._working >= _WORKERS:
            return False
        if self._working < len(self._workers):
            return True
        thread = threading.Thread(target=self._work, name=f"worker {len(self._workers)}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # there are too many threads
            return False
        self._workers.append(thread)
        return True

    @staticmethod
    async def work(call: Callable[[], R]) -> R:
        """Run *call* in a worker and return its result; :meth:`may_work` was true."""
        return cast("R", await _pause(_Work(call)))

    @staticmethod
    async def apart(call: Callable[[], R]) -> R:
        """Run *call*, which may let others run, in this ring's thread, and return its result.

        A coroutine of pyfuse3 that has not been suspended does not hold what it awaits: another thread that
        receives a request would free that.
        """
        return cast("R", await _pause(_Apart(call)))

    def in_trio(self, call: Callable[[], object]) -> None:
        """Run *call* in trio's thread, soon."""
        self._token.run_sync_soon(call)

    def _make(self) -> None:
        """Start another coroutine in trio, which a thread then continues."""
        self._making = True
        try:
            # It would start others if it found fewer than this number, which it counts down.
            coroutine = getattr(pyfuse3, BODY)(self._nursery, _NEVER, -_NEVER)
            coroutine.send(None)
        finally:
            self._making = False
        self._spare.append(coroutine)
        self._more.release()

    def _serve(self, number: int) -> None:
        ring = libfuse.ring
        try:
            if not ring.ring_join(number):
                return
            _here.serves = True
            self.hurry(True)
            while not self._stopped:
                self._more.acquire()
                if self._stopped:
                    break
                coroutine, context = self._spare.popleft(), copy_context()
                try:
                    why = context.run(coroutine.send, None)
                    while isinstance(why, _Apart):
                        why = context.run(coroutine.send, why.call())
                except StopIteration:
                    break  # the session has ended
                except Exception as failure:
                    ring.core_give()  # or trio could not make the coroutine that this thread waits for
                    _tell(failure)
                    self._token.run_sync_soon(self._make)
                    continue
                ring.ring_leave()
                if isinstance(why, _Work):
                    self._working += 1
                    self._jobs.put(_Job(coroutine, context, why.call))
                    if not self._spare:
                        self._token.run_sync_soon(self._make)
                else:
                    self._token.run_sync_soon(self._adopt, coroutine, context)
                ring.core_give()
        except OSError as error:
            log.error("a ring cannot be used; unmounting: %s", error.strerror)
        finally:
            _here.serves = False
            ring.core_give()
            self._token.run_sync_soon(self._has_left)
            ring.ring_finish()

    def _work(self) -> None:
        """Run a worker."""
        ring = libfuse.ring
        _here.works = True
        while (job := self._jobs.get()) is not None:
            why: object = _Work(job.call)
            while isinstance(why, _Work):
                value, failure = _outcome(why.call)
                ring.core_take()
                _here.serves = True
                self.hurry(True)
                try:
                    why = job.go_on(value, failure)
                finally:
                    _here.serves = False
                    self.hurry(False)
                    if isinstance(why, _Work):
                        ring.core_unlock()
            if why is _Ready:
                self._spare.append(job.coroutine)
                self._more.release()
            elif why is _Move:
                self._token.run_sync_soon(self._adopt, job.coroutine, job.context)
            self._working -= 1
            if self._stopped and not self._working:
                self._token.run_sync_soon(self._all_done.set)
            ring.core_unlock()

    def _has_left(self) -> None:
        self._left += 1
        if self._left == len(self._threads):
            self._all_left.set()
        if libfuse.rings_serve():
            self._told()

    def _adopt(self, coroutine: Coroutine[Any, Any, None], context: Context) -> None:
        self._make()
        context.run(self._nursery.start_soon, self._go_on, coroutine)  # with the variables set there

    async def _go_on(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = trio.lowlevel.current_task()
        self._adopted.add(task)
        try:
            await _resume(coroutine)
        except Exception:
            log.exception("serving a request failed")
        finally:
            self._adopted.discard(task)


@types.coroutine
def _resume(coroutine: Coroutine[Any, Any, None]) -> Generator[Any, Any, None]:
    """Continue a suspended coroutine in the caller's task."""
    value: Any = None
    failure: BaseException | None = None
    while True:
        try:
            trap = coroutine.send(value) if failure is None else coroutine.throw(failure)
        except StopIteration:
            return
        try:
            value, failure = (yield trap), None
        except BaseException as error:
            failure = error


def _tell(failure: Exception) -> None:
    """Log an unexpected failure; not lack of memory, which passes, and logging needs memory."""
    if isinstance(failure, MemoryError) or getattr(failure, "errno", 0) == errno.ENOMEM:
        time.sleep(_NO_MEMORY)
    else:
        log.exception("serving a request failed")


class CoreLock(trio.abc.Instrument):
    """Releases the core lock to the rings' threads while trio's thread waits for I/O."""

    def before_io_wait(self, timeout: float) -> None:
        del timeout
        libfuse.ring.core_unlock()

    def after_io_wait(self, timeout: float) -> None:
        del timeout
        libfuse.ring.core_lock()


def why_not() -> str:
    """Return why this kernel does not deliver requests through io_uring; "" if it does."""
    if libfuse.ring is None:
        return "cowfs was built without it"
    if not hasattr(pyfuse3, BODY):
        return "this version of pyfuse3 is not supported"
    try:
        with open(_SWITCH, encoding="ascii") as switch:
            on = switch.read().strip() == "Y"
    except FileNotFoundError:
        return f"this kernel ({os.uname().release}) does not support it; Linux 6.14 or newer does"
    except OSError as error:
        return f"{_SWITCH}: {error.strerror}"
    return "" if on else f"it is turned off (as root: echo Y > {_SWITCH})"


def rings_for(wanted: str, tell: Callable[[str], None]) -> Rings | None:
    """Make the rings of a mount, if *wanted* (auto, on or off) and available; else return None.

    SystemFailure if they are required and not available; *tell* is called with messages for the user.
    """
    if wanted == "off":
        return None
    why = why_not()
    if not why:
        try:
            return open_rings()
        except OSError as error:
            why = error.strerror or str(error)
            if wanted == "auto":
                tell(f"slower than it could be: io_uring cannot be used: {why}")
    if wanted == "on":
        raise SystemFailure(
            f"io_uring cannot be used: {why}", "remove io_uring=on: the default uses it where possible"
        )
    return None


def open_rings() -> Rings:
    """Make the rings, before the filesystem is mounted. OSError: EPERM, ENOMEM, ENOSYS."""
    cpus = tuple(sorted(os.sched_getaffinity(0)))
    libfuse.ring.ring_open(_possible(), cpus, may_step_back())
    return Rings(cpus)


def _possible() -> int:
    """Return the number of possible CPUs, counted up to the highest number."""
    with open(_POSSIBLE, encoding="ascii") as numbers:
        return int(numbers.read().strip().replace(",", "-").rsplit("-", 1)[-1]) + 1
