"""Do what the adapter does for a union with slow lowers, without an event loop."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from unittest import mock

from cowfs.layers.slow import Answers, NotYet, SlowLayer

R = TypeVar("R")
_threads = ThreadPoolExecutor(4)


def serve(layer: SlowLayer) -> None:
    """Let the layer answer at once from now on."""
    layer.serve(lambda _, call: _in_thread(call))


def all_wait() -> Any:
    """Whatever lower is opened inside counts as one that may wait for others."""
    return mock.patch("cowfs.lowers.may_wait", lambda fd: True)


def answered(call: Callable[[], R]) -> R:
    """Repeat *call* until it has all answers that it needs."""
    answers = Answers(0)
    try:
        with answers.at_hand():
            while True:
                try:
                    return call()
                except NotYet as need:
                    answers.add(_in_thread(need.question.ask))
    finally:
        answers.close()


def _in_thread(call: Callable[[], R]) -> R:
    return _threads.submit(call).result()


class Asking:
    """A layer or a union with slow layers in it, for callers who can wait."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return value
        return lambda *args, **more: answered(lambda: value(*args, **more))
