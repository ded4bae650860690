"""Warn in time that a store is nearly full, and tell how to give it more space."""

from __future__ import annotations

import logging
from collections.abc import Callable

from cowfs.store.format.sizes import format_size
from cowfs.store.served import disk_space, presence
from cowfs.store.served.store import Store

log = logging.getLogger(__name__)

NEARLY = 90
"""The percentage in use from which on a warning is logged."""
_LITTLE = 256 << 20
"""Bytes. With more free space on the disk there is no warning."""
_AGAIN = 80
"""The percentage in use below which another warning can be logged later."""


def nearly_full(path: str, used: int, of: int, used_inodes: int, of_inodes: int) -> str:
    """Return a warning with advice if the store at *path* (or ``memory``) is nearly full; else ""."""
    blocks, inodes = _percent(used, of), _percent(used_inodes, of_inodes)
    if max(blocks, inodes) < NEARLY:
        return ""
    full = f"{blocks} % full" if blocks >= inodes else f"{inodes} % of its inodes are in use"
    if path == "memory":
        return f"{full}; cowfs grow MOUNTPOINT SIZE raises its limit, cowfs persist moves it to a disk"
    name = "MOUNTPOINT" if path.startswith("/dev/") else path  # on a disk that only the daemon has mounted
    return f"{full}; cowfs grow {name} SIZE makes it larger"


def disk_nearly_full(disk: disk_space.Disk | None, size: int) -> str:
    """Return a warning if the disk, of *size* bytes, of a directory store is nearly full; else ""."""
    if disk is None or disk.free >= min(size * (100 - NEARLY) // 100, _LITTLE):
        return ""
    return f"its disk has only {format_size(disk.free)} free: free space there"


def hint(store: Store) -> str:
    """Return a warning about an open store, or about its disk if that will be full first; else ""."""
    on_disk = disk_space.disk(store)
    room = store.layer.statfs()
    if not _can_grow(store):
        return disk_nearly_full(on_disk, room.blocks * room.frsize)
    lacks = disk_space.lacks_room(on_disk)
    if lacks:
        return lacks
    return nearly_full(store.path, room.blocks - room.bfree, room.blocks, room.files - room.ffree, room.files)


def watch(store: Store, whereabouts: presence.Whereabouts | None = None) -> Callable[[], None]:
    """Return a function to call every few seconds.

    It logs once that the store is nearly full, and what happened to its file or its lowers.
    """
    told = told_of_disk = False
    done_to_them: set[str] = set()

    def look() -> None:
        nonlocal told, told_of_disk
        lost = disk_space.unsaved(store)
        done = [f"{store.path}: {lost}"] if lost is not None and not lost.since else []
        for said in (*done, *(whereabouts.described() if whereabouts else ())):
            if said not in done_to_them:
                done_to_them.add(said)
                log.error("%s", said)
        on_disk = disk_space.disk(store)
        room = store.layer.statfs()
        lacks = disk_space.lacks_room(on_disk)
        if not _can_grow(store):
            lacks = disk_nearly_full(on_disk, room.blocks * room.frsize)
        if lacks and not told_of_disk:
            log.warning("%s: %s", store.path, lacks)
        told_of_disk = bool(lacks)
        if lacks or not _can_grow(store):
            return
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
