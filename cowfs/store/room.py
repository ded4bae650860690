"""Say in time that a store is nearly full, and how it gets more room."""

from __future__ import annotations

import logging
from collections.abc import Callable

from cowfs.store.store import Store

log = logging.getLogger(__name__)

NEARLY = 90
"""Percent in use from which on it is told."""
_AGAIN = 80
"""Percent below which it must have been to be told again in the log."""


def nearly_full(path: str, used: int, of: int, used_inodes: int, of_inodes: int) -> str:
    """Say so, and what to do, if that is so of the store at *path*; "" else. *path* may be ``memory``."""
    blocks, inodes = _percent(used, of), _percent(used_inodes, of_inodes)
    if max(blocks, inodes) < NEARLY:
        return ""
    full = f"{blocks} % full" if blocks >= inodes else f"{inodes} % of its inodes are in use"
    if path == "memory":
        return f"{full}; cowfs grow MOUNTPOINT SIZE lets it have more, cowfs persist moves it to a disk"
    name = "MOUNTPOINT" if path.startswith("/dev/") else path  # on a disk that only its daemon has mounted
    return f"{full}; cowfs grow {name} SIZE makes it larger"


def hint(store: Store) -> str:
    """Return the same of an open store; of one that has no room of its own, nothing."""
    if not _can_grow(store):
        return ""
    room = store.layer.statfs()
    return nearly_full(store.path, room.blocks - room.bfree, room.blocks, room.files - room.ffree, room.files)


def watch(store: Store) -> Callable[[], None]:
    """Return what is to be called every few seconds: it logs once that the store has become nearly full."""
    told = False

    def look() -> None:
        nonlocal told
        if not _can_grow(store):
            return
        room = store.layer.statfs()
        percent = max(
            _percent(room.blocks - room.bfree, room.blocks), _percent(room.files - room.ffree, room.files)
        )
        if percent >= NEARLY and not told:
            told = True
            log.warning("%s: %s", store.path, hint(store))
        elif percent < _AGAIN:
            told = False

    return look


def _can_grow(store: Store) -> bool:
    return store.kind == "image" or store.memory is not None


def _percent(part: int, whole: int) -> int:
    return 100 * part // whole if whole else 0
