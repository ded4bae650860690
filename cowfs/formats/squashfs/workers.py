"""The threads that decompress: one per processor, at most four, started when needed."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from cowfs.linux.signals import start

T = TypeVar("T")
_Task = tuple["Future[Any]", Callable[..., Any], tuple[object, ...]]


class Workers:
    """A pool of threads that also works if no thread can be started.

    :class:`concurrent.futures.ThreadPoolExecutor` keeps a task in its queue even if ``submit`` has raised for
    lack of a thread. The task could then write to a file that is closed already.
    """

    def __init__(self) -> None:
        """Starts nothing yet."""
        self.count = min(4, len(os.sched_getaffinity(0)))
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._started = False
        self._closed = False
        self._lock = threading.Lock()

    def submit(self, function: Callable[..., T], *args: object) -> Future[T]:
        """Call ``function(*args)`` in one of the threads, or in this one if none can be started.

        EBADF after close.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise OSError(errno.EBADF, "the image is closed")
            if not self._started:
                self._start()
            if self._threads:
                self._tasks.put((future, function, args))
                return future
        _do((future, function, args))
        return future

    def _start(self) -> None:
        self._started = True
        for number in range(self.count):
            thread = threading.Thread(target=self._work, name=f"squashfs-{number}", daemon=True)
            try:
                start(thread)
            except RuntimeError:  # too many processes, or too little memory
                return
            self._threads.append(thread)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            _do(task)

    def close(self) -> None:
        """Wait for running tasks, and drop waiting ones. Safe to call twice."""
        with self._lock:
            self._closed = True
            threads, self._threads = self._threads, []
        with suppress(Empty):
            while (task := self._tasks.get_nowait()) is not None:
                task[0].cancel()
        for _ in threads:
            self._tasks.put(None)
        for thread in threads:
            thread.join()


def _do(task: _Task) -> None:
    future, function, args = task
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)
