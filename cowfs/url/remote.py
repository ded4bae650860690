"""The bytes of a file on a server: from memory, from the disk, or fetched, and fetched ahead of a sequential
reader.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from cowfs.url.disk_cache import DiskCache
from cowfs.url.link import Fetch, Link
from cowfs.url.protocol import Version
from cowfs.url.waiting import WouldWait, must_not_wait

BLOCK = 128 << 10
"""The size of a block, which is kept and checked as one."""
_MEMORY, _MEMORY_BESIDE_DISK = 32 << 20, 8 << 20
"""Bytes of one file to keep in memory; fewer if the disk has them, as the kernel caches some of those."""
_RUN = 8
"""How many blocks are requested at once, at most."""
_AHEAD = 32
"""How many blocks ahead of a sequential reader are requested, at most …"""
_AHEAD_RUNS = 3
"""… and how many such requests are under way: others have precedence."""
_STREAMS = 8
"""How many sequential readers are told apart."""


class _Stream(NamedTuple):
    """A sequential reader."""

    read: int
    """How many blocks it has read one after the other."""
    until: int
    """The first block that has not been asked for."""


class RemoteFile:
    """A file on a server: bytes that do not change. Any thread may call the methods."""

    def __init__(self, link: Link, version: Version, disk: DiskCache | None) -> None:
        """Takes over *link* and *disk*."""
        self.url = link.url
        self.version = version
        self.size = version.size
        self.hits = self.misses = self.fetched = 0
        """How often a block was at hand, and was not; how many bytes came from the server."""
        self._link = link
        self._disk = disk
        self._count = -(-version.size // BLOCK)
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._bytes = 0
        self._most = _MEMORY if disk is None else _MEMORY_BESIDE_DISK
        self._flights: dict[int, Fetch] = {}
        self._lock = threading.Lock()
        self._streams: OrderedDict[int, _Stream] = OrderedDict()
        """The sequential readers, by the block that each is expected to read next."""
        self._ahead = 0
        link.received = self._received

    def pread(self, size: int, at: int, is_over: Callable[[], bool] = lambda: False) -> bytes:
        """Return up to *size* bytes at *at*, fewer at the end of the file, as os.pread(2).

        May wait for the server until the timeout; WouldWait if this thread must not wait. EIO, also once
        *is_over* is true; ETIMEDOUT; ESTALE if the file on the server has changed.
        """
        end = min(at + size, self.size)
        if at < 0 or at >= end:
            return b""
        first, last = at // BLOCK, (end - 1) // BLOCK
        if first == last:
            data = self._one(first, is_over)
            base = first * BLOCK
            return data[at - base : end - base]
        found = self._several(first, last, is_over)
        base = first * BLOCK
        return b"".join(found)[at - base : end - base]

    def _one(self, number: int, is_over: Callable[[], bool]) -> bytes:
        data = self._at_hand(number)
        if data is not None:
            self.hits += 1
            if number in self._streams:
                self._read_on(number, number, is_new=False)
            return data
        return self._several(number, number, is_over)[0]

    def _several(self, first: int, last: int, is_over: Callable[[], bool]) -> list[bytes]:
        found = {number: self._at_hand(number) for number in range(first, last + 1)}
        missing = [number for number, data in found.items() if data is None]
        if missing and must_not_wait():
            raise WouldWait
        self.hits += len(found) - len(missing)
        self.misses += len(missing)
        flights = self._ask(missing, urgent=True)
        self._read_on(first, last, is_new=bool(missing))
        for number, flight in zip(missing, flights, strict=True):
            data = self._link.wait(flight, is_over)
            at = (number * BLOCK) - flight.start
            found[number] = data[at : at + BLOCK]
        return [data for data in found.values() if data is not None]

    def _at_hand(self, number: int) -> bytes | None:
        with self._lock:
            data = self._blocks.get(number)
            if data is not None:
                self._blocks.move_to_end(number)
                return data
            if number in self._flights:
                return None
        data = None if self._disk is None else self._disk.get(number)
        if data is not None:
            self._keep(number, data)
        return data

    def _keep(self, number: int, data: bytes) -> None:
        with self._lock:
            if number in self._blocks:
                return
            self._blocks[number] = data
            self._bytes += len(data)
            while self._bytes > self._most:
                self._bytes -= len(self._blocks.popitem(last=False)[1])

    def _ask(self, numbers: list[int], *, urgent: bool) -> list[Fetch]:
        """Return the request of each block. Request blocks that have none, several in one request."""
        flights = []
        at = 0
        while at < len(numbers):
            with self._lock:
                flight = self._flights.get(numbers[at])
                if flight is None:
                    stop = at + 1
                    while (
                        stop < len(numbers)
                        and stop - at < _RUN
                        and numbers[stop] == numbers[stop - 1] + 1
                        and numbers[stop] not in self._flights
                    ):
                        stop += 1
                    flight = self._begin(numbers[at], numbers[stop - 1], urgent=urgent)
                    flights += [flight] * (stop - at)
                    at = stop
                    continue
            flights.append(flight)
            at += 1
        return flights

    def _begin(self, first: int, last: int, *, urgent: bool) -> Fetch:
        start, end = first * BLOCK, min((last + 1) * BLOCK, self.size)
        flight = self._link.prepare(start, end - start, urgent=urgent)
        for number in range(first, last + 1):
            self._flights[number] = flight
        self._ahead += not urgent
        self._link.send(flight)
        return flight

    def _received(self, flight: Fetch) -> None:
        """Store received data. The receiving thread calls it, before waiting readers continue."""
        first = flight.start // BLOCK
        last = (flight.start + flight.length - 1) // BLOCK
        if flight.error is None:
            data = flight.data()
            self.fetched += len(data)
            for number in range(first, last + 1):
                block = data[(number - first) * BLOCK : (number - first + 1) * BLOCK]
                self._keep(number, block)
                if self._disk is not None:
                    self._disk.put(number, block)
        with self._lock:
            self._ahead -= not flight.urgent
            for number in range(first, last + 1):
                self._flights.pop(number, None)

    def _read_on(self, first: int, last: int, *, is_new: bool) -> None:
        """Request the next blocks if somebody reads sequentially: half as much as was read that way.

        Does not wait. So at most a third of the fetched data is useless if the reader stops.
        """
        with self._lock:
            expected = next((number for number in range(first, last + 1) if number in self._streams), None)
            stream = None if expected is None else self._streams.pop(expected)
            if stream is None and not is_new:
                return
            read = last + 1 - (first if expected is None else expected) + (stream.read if stream else 0)
            begin = max(stream.until if stream else 0, last + 1)
            window = min(read // 2, _AHEAD)
            end = min(last + 1 + window, self._count, begin + (_AHEAD_RUNS - self._ahead) * _RUN)
            if begin - last > window // 2:  # enough is requested, or too much
                end = begin
            self._streams[last + 1] = _Stream(read, max(begin, end))
            if len(self._streams) > _STREAMS:
                self._streams.popitem(last=False)
        self._ask([number for number in range(begin, end) if not self._is_at_hand(number)], urgent=False)

    def _is_at_hand(self, number: int) -> bool:
        with self._lock:
            if number in self._blocks or number in self._flights:
                return True
        return self._disk is not None and self._disk.has(number)

    def forget(self, size: int, at: int) -> None:
        """Drop wrong bytes from the caches, so that the next read fetches them again."""
        for number in range(at // BLOCK, (at + max(size, 1) - 1) // BLOCK + 1):
            with self._lock:
                self._bytes -= len(self._blocks.pop(number, b""))
            if self._disk is not None:
                self._disk.forget(number)

    def caches(self) -> dict[str, tuple[int, int]]:
        """Return how many blocks were cached, and how many had to be fetched."""
        return {"blocks by URL": (self.hits, self.misses)}

    def stop(self) -> None:
        """Those who share it have ways of their own (:class:`cowfs.url.opened.Opened`)."""

    def shrink(self) -> None:
        """Drop cached data that can be read again without the server."""
        if self._disk is not None:
            with self._lock:
                self._blocks.clear()
                self._bytes = 0

    def close(self) -> None:
        """End the fetching process. Waiting readers get EIO."""
        self._link.close()
        if self._disk is not None:
            self._disk.close()
