"""Open a FUSE connection and mount it, with mount(2) alone.

libfuse also runs mount(8), to update ``/etc/mtab``, and waits for it before it serves any request. If the
new mount hides that program or one of its libraries, both wait for ever.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection

from cowfs.linux import mounts

FSTYPE = "fuse.cowfs"
"""The type of a cowfs mount in the mount table."""
LISTED = "cowfs list lists the mounts"
"""The hint of an error about a mount that does not exist."""

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
"""Flags that are set unless the option is given, as in libfuse (lib/mount.c)."""
_FOR_FUSE = frozenset({"default_permissions", "allow_other"})


def open_connection() -> int:
    """Return a FUSE connection that is not mounted yet. OSError."""
    return os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)


def mount_connection(fd: int, mountpoint: str, source: str, given: Collection[str]) -> None:
    """Mount *fd* at a directory, with options as mount(8) spells them.

    Accesses to it wait until a process serves *fd*. Raises what stat(2) and mount(2) raise; ELOOP if a
    symbolic link is on the way to *mountpoint*, as when another user has replaced a directory.
    """
    options = set(given)
    flags = sum(bit for name, bit in _FLAGS.items() if name in options)
    flags |= sum(bit for name, bit in _NEGATED.items() if name not in options or f"no{name}" in options)
    with mounts.reached(mountpoint) as place:
        mode = stat.S_IFMT(os.stat(place).st_mode)
        words = [f"fd={fd}", f"rootmode={mode:o}", f"user_id={os.getuid()}", f"group_id={os.getgid()}"]
        words += sorted(options & _FOR_FUSE)
        mounts.mount(source, place, "fuse.cowfs", flags, ",".join(words))


def remount(mountpoint: str, options: Collection[str], *, read_only: bool) -> None:
    """Make a mount writable or read-only. *options* are all that it has then, as in mountinfo.

    Raises what mount(2) raises: EBUSY while a file in it is open for writing, EPERM.
    """
    words = set(options) - {"ro"} | ({"ro"} if read_only else set())
    if not words & {"noatime", "relatime"}:
        words.add("strictatime")
    bits = {**_FLAGS, "nosuid": mounts.MS_NOSUID, "nodev": mounts.MS_NODEV}
    mounts.mount("none", mountpoint, "none", mounts.MS_REMOUNT | sum(bits.get(word, 0) for word in words), "")
