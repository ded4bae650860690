"""A directory as a lower layer that any number of threads may use at once, without locks.

It keeps descriptors of directories in objects, which close them when nothing refers to them any more. So a
call that hangs keeps its descriptors, and delays no other call.
"""

from __future__ import annotations

import os
import threading
from collections import deque

from cowfs.layers import beneath
from cowfs.layers.beneath import stale
from cowfs.layers.directory import DirectoryLayer
from cowfs.layers.keys import PathKey
from cowfs.types import FileHandle

_IN_USE = 4
"""A call needs fewer at a time."""


class _Descriptor:
    """A descriptor that is closed when nothing refers to it any more."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


class _InUse(threading.local):
    """The last few descriptors that a thread used: a call opens its directories one after the other."""

    def __init__(self) -> None:
        self.last: deque[_Descriptor] = deque(maxlen=_IN_USE)


class SharedDirectoryLayer(DirectoryLayer):
    """A read-only :class:`DirectoryLayer` for any thread. Of its keys, only the root's has a descriptor."""

    def __init__(self, root_fd: int, name: str, *, alone: bool = False) -> None:
        """May block: it reads the filesystem's UUID, so that :meth:`handle_ino` need not."""
        super().__init__(root_fd, name, alone=alone)
        self._kept: dict[PathKey, _Descriptor] = {}
        self._in_use = _InUse()
        self._most_listed = beneath.most_listed()
        try:
            self._uuid = self.uuid
        except OSError:
            self._uuid = b""  # no handles

    def _open_dir(self, key: PathKey) -> int:
        kept = self._kept
        chain = []
        walk = key
        found = kept.get(walk)
        while found is None and walk.fd < 0:
            chain.append(walk)
            if walk.parent is None:
                raise stale(walk.name)
            walk = walk.parent
            found = kept.get(walk)
        for step in reversed(chain):
            found = _Descriptor(self._enter(walk.fd if found is None else found.fd, step))
            self._keep(step, found)
        assert found is not None
        self._in_use.last.append(found)
        return found.fd

    def _keep(self, key: PathKey, descriptor: _Descriptor) -> None:
        self._kept[key] = descriptor
        most = self._most()
        if len(self._kept) > most:
            for old in list(self._kept)[: most // 2]:  # another thread may do the same
                self._kept.pop(old, None)

    def _reach(self, key: PathKey) -> int:
        return key.fd if key.fd >= 0 else self._enter(self._above(key), key)

    def handle(self, key: PathKey) -> FileHandle | None:
        return super().handle(key) if self._uuid else None

    def forget(self, key: PathKey) -> None:
        self._kept.pop(key, None)

    def close(self) -> None:
        self._kept.clear()
        self._in_use = (
            _InUse()
        )  # of all threads: the lower's filesystem would stay in use as long as they live
        super().close()
