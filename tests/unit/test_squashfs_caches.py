"""The caches of the squashfs reader."""

from __future__ import annotations

import errno
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cowfs.formats.squashfs.cache import GenerationCache, OnceCache


def test_a_cache_keeps_to_its_limit_and_what_is_used() -> None:
    cache: GenerationCache[int, bytes] = GenerationCache(1000, len)
    for number in range(500):
        cache.put(number, bytes(10))
        assert cache.get(0) is not None, "what is asked for again and again stays"
    kept = sum(cache.get(number) is not None for number in range(500))
    assert kept <= 100
    cache.put(-1, bytes(5000))
    assert cache.get(-1) is not None, "one that is larger than all is kept alone"
    assert cache.get(499) is None


def test_a_failure_is_not_remembered() -> None:
    cache: OnceCache[str] = OnceCache(1000)

    def fail(key: str) -> bytes:
        raise OSError(errno.EIO, "damaged")

    with pytest.raises(OSError):
        cache.get("key", fail)
    assert cache.get("key", str.encode) == b"key"


def test_those_who_wait_get_the_same_failure() -> None:
    cache: OnceCache[str] = OnceCache(1000)
    started, go = threading.Event(), threading.Event()

    def fail(key: str) -> bytes:
        started.set()
        assert go.wait(10)
        raise OSError(errno.EIO, "damaged")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.get, "key", fail)
        assert started.wait(10)
        second = pool.submit(cache.get, "key", lambda _: b"not called")
        while not second.running():
            pass
        go.set()
        assert isinstance(first.exception(), OSError)
        failure = second.exception()
    # Whether it waited, or came when all was over, is up to the scheduler.
    assert failure is None or (isinstance(failure, OSError) and failure.errno == errno.EIO)
