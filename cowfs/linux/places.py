"""Notice when files and directories are renamed, deleted, replaced or unmounted.

Each is held by a descriptor (O_PATH), whose current path the kernel shows (proc(5)). That path follows
renames, also of the directories above, and shows deletions and unmounts. Reading it looks up no name. So it
enters no mount on the way, not even the daemon's own, and waits for no other machine or program.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import suppress

from cowfs.linux.mount_table import mount_id, mountinfo
from cowfs.linux.remote import may_wait

Inode = tuple[int, int]
"""st_dev and st_ino."""
_DELETED = " (deleted)"


class Places:
    """The files and directories that were found at some paths."""

    def __init__(self, paths: Sequence[str]) -> None:
        """Hold what is at *paths* now. An empty path means nothing, for which no change is reported."""
        self._held = [_hold(path) for path in paths]

    def changes(self, opened: Sequence[Inode | None] = (), *, mounts_move: bool = False) -> list[str]:
        """Return for each path what has happened to it since; "" if nothing.

        Does not block. *opened* are the inodes that another process has opened by these paths, as far as
        known; if one differs from the held inode, the file was replaced meanwhile. *mounts_move*: ignore that
        a mount above has moved, as when a root filesystem is prepared.
        """
        known = [*opened, *[None] * (len(self._held) - len(opened))]
        return [
            "" if held is None else held.change(inode, mounts_move=mounts_move)
            for held, inode in zip(self._held, known, strict=False)
        ]

    def put(self, number: int, fd: int) -> None:
        """Hold the file of *fd* (O_PATH) instead of the one at the index *number*."""
        before, self._held[number] = self._held[number], _held(os.dup(fd))
        if before is not None:
            os.close(before.fd)

    def close(self) -> None:
        """Close the descriptors."""
        for held in self._held:
            if held is not None:
                os.close(held.fd)
        self._held = []


class _Held:
    def __init__(self, fd: int, *, is_watched: bool) -> None:
        self.fd = fd
        self._is_watched = is_watched
        self._path = self._now()
        info = os.fstat(fd)
        self._inode: Inode = info.st_dev, info.st_ino
        self._size = info.st_size
        self._what = "the directory" if stat.S_ISDIR(info.st_mode) else "its file"

    def change(self, opened: Inode | None, *, mounts_move: bool) -> str:
        if not self._is_watched:
            return ""
        now = self._now()
        info = os.fstat(self.fd)
        if not info.st_nlink:
            return f"{self._what} was deleted or replaced"
        if stat.S_ISREG(info.st_mode) and info.st_size < self._size:
            return f"{self._what} was truncated"
        if opened is not None and opened != self._inode:
            return f"{self._what} was replaced"
        if now == self._path:
            return ""
        if now.endswith(_DELETED):
            return f"{self._what} has another name now" if stat.S_ISREG(info.st_mode) else ""
        if mounts_move:
            same = os.path.basename(now) == os.path.basename(self._path)
            return "" if same else f"{self._what} was renamed to {os.path.basename(now)}"
        here = mount_id(self.fd)
        if all(mount.id != here for mount in mountinfo()):
            return f"the filesystem that {self._what.removeprefix('its ')} is on was unmounted"
        return f"{self._what} was renamed to {now}"

    def _now(self) -> str:
        return os.readlink(f"/proc/self/fd/{self.fd}")


def _hold(path: str) -> _Held | None:
    """Hold the file at *path*, so that it is seen to be in use; None if there is none.

    Files on another machine, or served by a program, are not watched: the kernel reports some of those as
    deleted that only need a new lookup.
    """
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    return _held(fd)


def _held(fd: int) -> _Held:
    waits = True
    with suppress(OSError):
        waits = may_wait(fd)
    return _Held(fd, is_watched=not waits)
