"""Threads that must not wait for another machine, and the exception if they would have to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

R = TypeVar("R")


class WouldWait(Exception):
    """The data is not cached: ask again in a thread that may wait.

    It is no OSError, so that nothing takes it for an error of a layer.
    """


class _Here(threading.local):
    must_not_wait = False


_here = _Here()


def must_not_wait() -> bool:
    """Whether this thread must not wait, because it serves others."""
    return _here.must_not_wait


def at_once(call: Callable[..., R], *arguments: object) -> R:
    """Return the result of *call*; WouldWait if it would have to wait for another machine."""
    before, _here.must_not_wait = _here.must_not_wait, True
    try:
        return call(*arguments)
    finally:
        _here.must_not_wait = before
