"""Threads that must not wait for another machine, and what is raised where they would have to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

R = TypeVar("R")


class WouldWait(Exception):
    """The answer is not at hand: ask in a thread that may wait.

    No OSError, so that nobody takes it for what a layer says.
    """


class _Here(threading.local):
    must_not_wait = False


_here = _Here()


def must_not_wait() -> bool:
    """Whether this thread serves others right now."""
    return _here.must_not_wait


def at_once(call: Callable[..., R], *arguments: object) -> R:
    """Return what *call* gives; WouldWait if it would have to wait for another machine for that."""
    before, _here.must_not_wait = _here.must_not_wait, True
    try:
        return call(*arguments)
    finally:
        _here.must_not_wait = before
