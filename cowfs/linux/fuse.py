"""A connection to FUSE and its mount, by mount(2) and nothing else.

libfuse mounts too, but afterwards it starts ``mount`` for the sake of ``/etc/mtab`` and waits for it, before
anybody serves: where the mount hides that program, or a library of its, both wait for ever.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection

from cowfs.linux import mounts

FSTYPE = "fuse.cowfs"
"""Of our mounts."""
LISTED = "cowfs list lists the mounts"
"""What to do about a mount that is not there."""

_FLAGS = {
    "ro": mounts.MS_RDONLY,
    "noexec": mounts.MS_NOEXEC,
    "sync": 16,
    "dirsync": 128,
    "noatime": 1024,
    "nodiratime": 2048,
    "strictatime": 1 << 24,
}
UNKNOWN_TO_LIBFUSE = frozenset({"nodiratime", "strictatime"})
"""Options that only :func:`mount_connection` knows."""
_NEGATED = {"suid": mounts.MS_NOSUID, "dev": mounts.MS_NODEV}
"""What is set unless the option is there, as libfuse has it (lib/mount.c)."""
_FOR_FUSE = frozenset({"default_permissions", "allow_other"})


def open_connection() -> int:
    """Return a connection to FUSE that is not mounted yet. Raises OSError."""
    return os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)


def mount_connection(fd: int, mountpoint: str, source: str, given: Collection[str]) -> None:
    """Mount *fd* at a directory, with options in the words of mount(8).

    Accesses wait for the process that serves *fd*. Raises what stat(2) and mount(2) raise.
    """
    options = set(given)
    flags = sum(bit for name, bit in _FLAGS.items() if name in options)
    flags |= sum(bit for name, bit in _NEGATED.items() if name not in options or f"no{name}" in options)
    mode = stat.S_IFMT(os.stat(mountpoint).st_mode)
    words = [f"fd={fd}", f"rootmode={mode:o}", f"user_id={os.getuid()}", f"group_id={os.getgid()}"]
    words += sorted(options & _FOR_FUSE)
    mounts.mount(source, mountpoint, "fuse.cowfs", flags, ",".join(words))


def remount(mountpoint: str, options: Collection[str], *, read_only: bool) -> None:
    """Make a mount writable or read-only. *options* are its present ones, as in mountinfo.

    Raises what mount(2) raises: EBUSY while a file in it is open to write, EPERM.
    """
    words = set(options) - {"ro"} | ({"ro"} if read_only else set())
    if not words & {"noatime", "relatime"}:
        words.add("strictatime")
    bits = {**_FLAGS, "nosuid": mounts.MS_NOSUID, "nodev": mounts.MS_NODEV}
    mounts.mount("none", mountpoint, "none", mounts.MS_REMOUNT | sum(bits.get(word, 0) for word in words), "")
