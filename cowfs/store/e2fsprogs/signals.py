"""Handle signals to terminate: clean up first, or finish first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from cowfs.linux.signals import held_back


@contextmanager
def cleaned_up() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise SystemExit in the block, so that ``finally`` and ``with`` clean up.

    SIGINT raises KeyboardInterrupt already. Does nothing outside of the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Block SIGINT, SIGTERM and SIGHUP until the end of the block, so that it is not interrupted half-way.

    Programs started in the block inherit this: a service manager may signal every process of a service.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with held_back():
        yield
