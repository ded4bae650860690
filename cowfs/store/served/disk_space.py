"""Unsaved changes of a store, free space on its disk, and waiting for more space."""

from __future__ import annotations

import errno
import os
import stat
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from cowfs.jsontext import local_time
from cowfs.linux.signals import forget_held_back, wait_asked
from cowfs.overlay.aufs import written_through
from cowfs.store.format.sizes import format_size
from cowfs.store.served import presence

if TYPE_CHECKING:
    from cowfs.store.served.store import Store


class Unsaved(NamedTuple):
    """Changes that were acknowledged but could not be written to disk."""

    why: str
    since: float
    """Changes before this time (seconds since the epoch) are on disk. 0: nothing on disk can be used."""
    waits: bool
    """Whether they are written as soon as the disk accepts them; otherwise they are lost at the end."""

    def __str__(self) -> str:
        if not self.since:
            return f"{self.why}: its contents are lost when it is unmounted"
        since = local_time(self.since)
        if self.waits:
            until = "accepts them" if self.why == os.strerror(errno.EIO) else "has space"
            return f"{self.why}: the changes since {since} are only in memory until its disk {until}"
        return f"{self.why}: changes since {since} are lost when it is unmounted"


class Disk(NamedTuple):
    """Space on the disk of a store, in bytes."""

    free: int
    missing: int
    """What the store's sparse file may still allocate."""


def unsaved(store: Store) -> Unsaved | None:
    """Return a store's unsaved changes, as far as they are known. Does not block."""
    gone = "" if store.read_only else presence.lost(store)
    if gone:
        return Unsaved(gone, 0, False)
    image: Any = getattr(store.layer, "image", None)
    if image is not None and not store.read_only:
        facts = image.facts()
        if facts.stalled or facts.aborted:
            why = os.strerror(facts.stalled or facts.aborted)
            return Unsaved(why, facts.saved_ns / 1e9, not facts.aborted)
        return None
    if store.failure is not None:
        return Unsaved(os.strerror(store.failure.errno or errno.EIO), store.saved, False)
    return None


def disk(store: Store) -> Disk | None:
    """Return the space on the disk of a store; None for one in memory. Does not block."""
    if store.kind == "memory":
        return None
    image: Any = getattr(store.layer, "image", None)
    if image is not None:
        facts = image.facts()
        if facts.disk_free < 1 << 63:
            return Disk(facts.disk_free, facts.missing)
    root: Any = written_through(store.layer).root
    fd = store.fd if store.kind == "image" else root.fd
    return disk_of(fd) if fd >= 0 else None


def disk_of(file: str | int) -> Disk | None:
    """Return the space on the disk of a file or directory; None if unknown.

    A path must not lead into the caller's own mount.
    """
    try:
        state, room = os.stat(file), os.statvfs(file)
    except OSError:
        return None
    if stat.S_ISBLK(state.st_mode):  # a block device has all its space
        return None
    missing = max(state.st_size - state.st_blocks * 512, 0) if stat.S_ISREG(state.st_mode) else 0
    return Disk(room.f_bavail * room.f_frsize, missing)


def wait_for_room(store: Store, seconds: float, *, heeds_signals: bool = False) -> None:
    """Write everything to disk; while the disk is full, retry for at most *seconds*.

    Blocks. With *heeds_signals*, a (blocked) signal to terminate stops the waiting, but never the writing.
    Raises the last OSError.
    """
    deadline = time.monotonic() + seconds
    waited = False
    while True:
        try:
            store.save()
            return
        except OSError as error:
            waits = unsaved(store)
            if not waits or not waits.waits or time.monotonic() > deadline:
                raise
            failure = error
        if not heeds_signals:
            time.sleep(1.0)
            continue
        if not waited:
            forget_held_back()  # signals that arrived while it wrote
            waited = True
        if wait_asked(1.0):
            raise failure


def lacks_room(what: Disk | None) -> str:
    """Return a warning if the disk has no space for a sparse file's missing blocks; else ""."""
    if what is None or what.missing <= what.free:
        return ""
    return (
        f"its disk has only {format_size(what.free)} free, but the store's sparse file still needs "
        f"{format_size(what.missing)}: free space there"
    )
