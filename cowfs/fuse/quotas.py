"""Resources that all users of a mount share, and that no user may exhaust: open files and descriptors.

A user other than root may not have more of a resource than is left. So a single user gets at most half, and
the other half is left. Two users who take all that they can get a third each, and a third is left. There is
no number to configure, a single user is hardly limited, and something is left for everybody.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from cowfs.errors import os_error
from cowfs.linux import limits

_A_FILE = 1 << 10
"""About how many bytes of memory an open file takes."""
_A_NAME = 100
"""About how many bytes a name in a listing takes."""
_LEAST_DATA = 64 << 20
"""Bytes of data that writes may hold while they wait, on the smallest machine."""
_ROOTS_PART = 8
"""This fraction is reserved for root."""


class Bounds(NamedTuple):
    """How much of each resource the users of a mount have."""

    opened: int
    """Files and directories that may be open at a time: each takes memory."""
    descriptors: int
    """Descriptors of the open files that have one."""
    names: int
    """Names kept for open listings of directories."""
    shared: bool
    """Whether users other than the one who mounted can use the mount."""
    data: int = 64 << 20
    """Bytes of data that waiting writes hold (``held_data.c``)."""


def bounds(*, shared: bool) -> Bounds:
    """Return what this process can give: parts of its memory, and five eighths of its descriptors.

    The other descriptors are for directories that layers keep open, inodes without a name, copy-ups, and the
    daemon itself.
    """
    memory = limits.memory()
    descriptors = limits.descriptors() * 5 // 8 - limits.open_now()
    data = max(memory // 128, _LEAST_DATA)
    return Bounds(memory // 16 // _A_FILE, descriptors, memory // 32 // _A_NAME, shared, data)


class Quota:
    """An amount of one resource, and how much of it each user has."""

    __slots__ = ("_held", "_left", "_roots", "_shared")

    def __init__(self, total: int, *, shared: bool) -> None:
        self._shared = shared
        self._roots = total // _ROOTS_PART if shared else 0
        self._left = total
        self._held: dict[int, int] = {}

    def may_have(self, uid: int) -> bool:
        """Whether a user may have one more."""
        left = self._left
        if uid and self._shared:
            left -= self._roots + self._held.get(uid, 0)
        return left > 0

    def must_have(self, uid: int) -> None:
        """Raise EMFILE if a user may not have one more."""
        if not self.may_have(uid):
            raise os_error(errno.EMFILE)

    def claim(self, uid: int) -> None:
        """Count one more as a user's, or raise EMFILE."""
        self.must_have(uid)
        self.take(uid)

    def take(self, uid: int) -> None:
        """Count one more as a user's, even if that exceeds the limit."""
        self._left -= 1
        self._held[uid] = self._held.get(uid, 0) + 1

    def give_back(self, uid: int) -> None:
        """Count one less."""
        self._left += 1
        held = self._held.pop(uid) - 1
        if held:
            self._held[uid] = held
