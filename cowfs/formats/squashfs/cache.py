"""Bounded caches, safe to use from several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from cowfs.url.waiting import WouldWait, must_not_wait

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class GenerationCache(Generic[K, V]):
    """A cache that holds at most *limit* in weight, or one heavier entry.

    It has two dictionaries, and adds entries to the young one. When that reaches half the limit, it becomes
    the old one, and the entries of the former old one that were not used meanwhile are dropped. So a hit
    takes one dictionary lookup and no lock, and the order of eviction is approximate.
    """

    __slots__ = ("_half", "_lock", "_old", "_weigh", "_weight", "_young")

    def __init__(self, limit: int, weigh: Callable[[V], int]) -> None:
        """*limit* is in the unit that *weigh* returns: bytes, or entries."""
        self._half = limit // 2
        self._weigh = weigh
        self._weight = 0
        self._young: dict[K, V] = {}
        self._old: dict[K, V] = {}
        self._lock = threading.Lock()

    def get(self, key: K) -> V | None:
        """Return the value, or None."""
        value = self._young.get(key)
        if value is None:
            value = self._old.get(key)
            if value is not None:
                self.put(key, value)
        return value

    def put(self, key: K, value: V) -> None:
        """Add *value*, and drop others if necessary."""
        weight = self._weigh(value)
        with self._lock:
            if self._weight + weight > self._half:
                # A value heavier than the whole cache is kept alone, or it would be made again at each use.
                self._old = {} if weight > self._half else self._young
                self._young = {}
                self._weight = 0
            self._young[key] = value
            self._weight += weight

    def clear(self) -> None:
        """Drop all values."""
        with self._lock:
            self._young, self._old, self._weight = {}, {}, 0


class _Making:
    """A value that one thread is making, and for which others wait."""

    __slots__ = ("_done", "_error", "_value")

    def __init__(self) -> None:
        self._done = threading.Lock()
        self._done.acquire()
        self._value = b""
        self._error: BaseException | None = None

    def finish(self, value: bytes, error: BaseException | None = None) -> None:
        """Set the result, and wake the waiting threads. Call it once."""
        self._value, self._error = value, error
        self._done.release()

    def wait(self) -> bytes:
        """Wait for the value. Raises a copy of an error, because threads must not share a traceback."""
        with self._done:
            error = self._error
        if error is None:
            return self._value
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror) from error
        raise RuntimeError("another reader of the block failed") from error


class OnceCache(Generic[K]):
    """A cache of bytes. A missing value is made once, however many threads request it."""

    def __init__(self, limit: int) -> None:
        """*limit* is in bytes."""
        self._cache: GenerationCache[K, bytes] = GenerationCache(limit, len)
        self._making: dict[K, _Making] = {}
        self.hits = self.misses = 0
        """How often a value was cached, and how often it was made. Approximate with several threads."""

    def get(self, key: K, make: Callable[[K], bytes]) -> bytes:
        """Return the value of *key*. If it is missing, one thread calls *make*, and the others wait for it.

        Blocks. An exception of *make* is raised in all these threads, and not cached.
        """
        value = self._cache.get(key)
        if value is not None:
            self.hits += 1
            return value
        if must_not_wait():
            return self._make_at_once(key, make)
        mine = _Making()
        other = self._making.setdefault(key, mine)  # atomic: only one thread gets its own object
        if other is not mine:
            self.hits += 1
            return other.wait()
        try:
            value = self._cache.get(key)  # another thread may have made it just before setdefault()
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
        """Make a value without waiting for another thread, and without other threads waiting for it."""
        if key in self._making:
            raise WouldWait
        value = make(key)
        self.misses += 1
        self._cache.put(key, value)
        return value

    def peek(self, key: K) -> bytes | None:
        """Return the value of *key* if it is cached, else None. Does not block."""
        return self._cache.get(key)

    def clear(self) -> None:
        """Drop all values."""
        self._cache.clear()
