"""Bounded caches, safe to use from several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from cowfs.url.waiting import WouldWait, must_not_wait

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class GenerationCache(Generic[K, V]):
    """A cache that holds at most *limit* in weight, or one single heavier entry.

    Two dictionaries: entries are added to the young one; when that has half the limit it becomes
    the old one, whose entries are dropped but for those that were asked for meanwhile. So a hit
    costs one dictionary lookup and needs no lock, at the price of an approximate order of eviction.
    """

    __slots__ = ("_half", "_lock", "_old", "_weigh", "_weight", "_young")

    def __init__(self, limit: int, weigh: Callable[[V], int]) -> None:
        """*limit* is in whatever unit *weigh* counts: bytes, or entries."""
        self._half = limit // 2
        self._weigh = weigh
        self._weight = 0
        self._young: dict[K, V] = {}
        self._old: dict[K, V] = {}
        self._lock = threading.Lock()

    def get(self, key: K) -> V | None:
        """The value, or None."""
        value = self._young.get(key)
        if value is None:
            value = self._old.get(key)
            if value is not None:
                self.put(key, value)
        return value

    def put(self, key: K, value: V) -> None:
        """Remember *value*, and forget others for it."""
        weight = self._weigh(value)
        with self._lock:
            if self._weight + weight > self._half:
                # A value heavier than the whole cache is kept alone, so that working with it is possible.
                self._old = {} if weight > self._half else self._young
                self._young = {}
                self._weight = 0
            self._young[key] = value
            self._weight += weight

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._young, self._old, self._weight = {}, {}, 0


class _Making:
    """A value that a thread is making, for those who want it too."""

    __slots__ = ("_done", "_error", "_value")

    def __init__(self) -> None:
        self._done = threading.Lock()
        self._done.acquire()
        self._value = b""
        self._error: BaseException | None = None

    def finish(self, value: bytes, error: BaseException | None = None) -> None:
        """Let those who wait go on. Once."""
        self._value, self._error = value, error
        self._done.release()

    def wait(self) -> bytes:
        """The value, once it is made; an error is copied, for tracebacks are not shared."""
        with self._done:
            error = self._error
        if error is None:
            return self._value
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror) from error
        raise RuntimeError("another reader of the block failed") from error


class OnceCache(Generic[K]):
    """A cache of bytes in which a missing value is made once, however many threads ask for it."""

    def __init__(self, limit: int) -> None:
        """*limit* is in bytes."""
        self._cache: GenerationCache[K, bytes] = GenerationCache(limit, len)
        self._making: dict[K, _Making] = {}
        self.hits = self.misses = 0
        """How often a value was there, and how often it was made. Threads may lose a few of these."""

    def get(self, key: K, make: Callable[[K], bytes]) -> bytes:
        """The value of *key*; the first who misses it calls *make*, the others wait for the result.

        Blocks. What *make* raises is raised to all that waited, and not remembered.
        """
        value = self._cache.get(key)
        if value is not None:
            self.hits += 1
            return value
        if must_not_wait():
            return self._make_at_once(key, make)
        mine = _Making()
        other = self._making.setdefault(key, mine)  # one step: of several threads one gets its own
        if other is not mine:
            self.hits += 1
            return other.wait()
        try:
            value = self._cache.get(key)  # made by another between the two lines above
            if value is None:
                self.misses += 1
                value = make(key)
                self._cache.put(key, value)
        except BaseException as error:
            del self._making[key]
            mine.finish(b"", error)
            raise
        del self._making[key]
        mine.finish(value)
        return value

    def _make_at_once(self, key: K, make: Callable[[K], bytes]) -> bytes:
        """Make a value without waiting for another who does, and without letting others wait for it."""
        if key in self._making:
            raise WouldWait
        value = make(key)
        self.misses += 1
        self._cache.put(key, value)
        return value

    def peek(self, key: K) -> bytes | None:
        """The value of *key* if it is there; never waits."""
        return self._cache.get(key)

    def clear(self) -> None:
        """Forget everything."""
        self._cache.clear()
