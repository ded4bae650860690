"""Return memory when the kernel has forgotten most inodes, and when memory is short.

When the kernel needs memory, it drops inodes and sends FORGET requests. That frees their nodes, but neither
the pages that the nodes were on nor the cached contents of images. This module frees both: caches drop what
they can read again, and the allocator returns unused pages (malloc_trim(3)).
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import re
import time
from contextlib import suppress

from cowfs.layers.base import Cached
from cowfs.layers.slow import unwrapped
from cowfs.linux import limits
from cowfs.overlay.overlay import Overlay

log = logging.getLogger(__name__)

_FEW = 4096
"""With fewer nodes it is not worth the work."""
_SHORT = 5.0
"""Percent of the last ten seconds in which somebody had to wait for memory (PSI): then it is short."""
_AGAIN = 30.0
"""Seconds until caches are emptied again for lack of memory. Caches emptied more often would be of no use."""
_SOME = re.compile(rb"some avg10=(\d+\.\d+)")


class MemoryReclaimer:
    """Watches the memory of a union's daemon. Make it while the system's files are accessible."""

    def __init__(self, fs: Overlay) -> None:
        self._fs = fs
        self._emptied = 0.0
        self._trims_again = False
        self._pressure = _open_pressure()

    def look(self) -> None:
        """Return memory if it is time to. Call it every few seconds."""
        if self._trims_again:  # the store has freed what was only in its journal
            self._trims_again = False
            _trim()
        nodes = self._fs.nodes
        if nodes.most - len(nodes) > max(_FEW, nodes.most // 2):
            self._give_back()
        elif self._is_short() and time.monotonic() - self._emptied > _AGAIN:
            log.info("memory is short: caches are emptied")
            self._give_back()

    def _give_back(self) -> None:
        fs = self._fs
        self._emptied = time.monotonic()
        uppers = [union.upper for union in fs.unions()]
        for layer in (*uppers, *fs.lowers):
            inner = unwrapped(layer)
            if isinstance(inner, Cached):
                inner.shrink()
        fs.nodes.compact()
        gc.collect()
        _trim()
        self._trims_again = True

    def _is_short(self) -> bool:
        if self._pressure < 0:
            return False
        try:
            found = _SOME.match(os.pread(self._pressure, 100, 0))
        except OSError:  # the cgroup was removed
            return False
        return found is not None and float(found[1]) > _SHORT


def _trim() -> None:
    with suppress(AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _open_pressure() -> int:
    """Return a descriptor of the file with this process's memory pressure; -1 if there is none."""
    for path in (limits.cgroup_file("memory.pressure"), "/proc/pressure/memory"):
        with suppress(OSError):
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return -1
