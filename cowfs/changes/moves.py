"""Find where a file is now, and where it was, after thousands of renames."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator


class Moves:
    """Renames in the order in which they were made. Each also moves everything below it.

    Following a path takes time in proportion to its depth and to how often it was moved, not to all renames.
    """

    def __init__(self) -> None:
        self._all: list[tuple[bytes, bytes]] = []
        self._from: dict[bytes, list[int]] = {}
        """The numbers of the moves from a path."""
        self._to: dict[bytes, list[int]] = {}

    def __len__(self) -> int:
        return len(self._all)

    def add(self, here: bytes, there: bytes) -> None:
        """Note that what was *here* is *there* now."""
        self._from.setdefault(here, []).append(len(self._all))
        self._to.setdefault(there, []).append(len(self._all))
        self._all.append((here, there))

    def now(self, path: bytes, since: int = 0) -> bytes:
        """Return the current path of what was at *path* after the first *since* moves."""
        while True:
            numbers = (
                known[at]
                for above in _above(path)
                if (known := self._from.get(above)) and (at := bisect_left(known, since)) < len(known)
            )
            number = min(numbers, default=None)
            if number is None:
                return path
            here, there = self._all[number]
            path, since = there + path[len(here) :], number + 1

    def before(self, path: bytes) -> Iterator[tuple[bytes, int, int]]:
        """Yield the former paths of what is at *path* now, the last one first.

        Each comes with the numbers of moves after which it began and ended.
        """
        until = len(self._all)
        while True:
            numbers = (
                known[at - 1]
                for above in _above(path)
                if (known := self._to.get(above)) and (at := bisect_left(known, until)) > 0
            )
            number = max(numbers, default=-1)
            yield path, number + 1, until
            if number < 0:
                return
            here, there = self._all[number]
            path, until = here + path[len(there) :], number


def _above(path: bytes) -> Iterator[bytes]:
    """Yield a path, and the directories above it except the root."""
    yield path
    while b"/" in path:
        path = path.rpartition(b"/")[0]
        yield path
