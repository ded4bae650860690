"""Serve a union with slow lowers as the FUSE adapter does, but without an event loop."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from unittest import mock

from cowfs.layers.slow import Answers, NotYet, SlowLayer

R = TypeVar("R")
_threads = ThreadPoolExecutor(4)


def serve(layer: SlowLayer) -> None:
    """Answer the questions of *layer* in a thread from now on."""
    layer.serve(lambda _, call: _in_thread(call))


def treat_lowers_as_slow() -> Any:
    """Treat every lower that is opened within the block as slow."""
    return mock.patch("cowfs.lowers.may_wait", lambda fd: True)


def answered(call: Callable[[], R]) -> R:
    """Repeat *call* until it has all the answers it needs; return its result."""
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
    """A proxy of a layer or union with slow layers, whose methods block until they have their answers."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return value
        return lambda *args, **more: answered(lambda: value(*args, **more))
