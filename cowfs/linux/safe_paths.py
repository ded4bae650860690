"""Resolve paths that other users chose without waiting for their filesystems.

The source of a mount may be any path, for example one into a mount whose daemon is stopped: stat(2) on it
would wait for ever. So this module opens each component without asking its filesystem (O_PATH, following no
link), and stops at a mount that may wait for others.
"""

from __future__ import annotations

import os
import stat

from cowfs.linux.files import matching
from cowfs.linux.loop_devices import loop_backing, loop_inode
from cowfs.linux.mount_table import MountInfo, mount_id, mountinfo

_MOST_LINKS = 40
"""How many symbolic links the kernel follows (path_resolution(7))."""
_WAIT = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "coda", "autofs"}


def is_same_file(path: str | bytes, wanted: os.stat_result) -> bool:
    """Whether the absolute *path* leads to the file *wanted*.

    False if the path enters a filesystem that may wait for a program or another machine, unless the file is
    on it too: then the caller waits for it anyway. OSError if nothing is there.
    """
    mounts = {mount.id: mount for mount in mountinfo()}
    names = os.fsencode(path).split(b"/")[::-1]
    way: list[bytes] = []
    seen: os.stat_result | None = None
    links = 0
    while names:
        name = names.pop()
        if name == b"..":
            del way[-1:]
            seen = None
        if name in {b"", b".", b".."}:
            continue
        place = b"/" + b"/".join([*way, name])
        fd = os.open(place, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if _may_wait(mounts.get(mount_id(fd)), wanted):
                return False
            info = os.fstat(fd)
            target = os.readlink(b"", dir_fd=fd) if stat.S_ISLNK(info.st_mode) else None
        finally:
            os.close(fd)
        if target is None:
            way.append(name)
            seen = info
            continue
        links += 1
        if links > _MOST_LINKS:
            return False
        if target.startswith(b"/"):
            way.clear()
        names += target.split(b"/")[::-1]
    return seen is not None and os.path.samestat(seen, wanted)


def loop_users(path: str | bytes | os.PathLike[str]) -> list[str]:
    """Return the loop devices that use the file *path*, whatever name it had when they opened it.

    Needs no privilege, except for files whose name at that time no longer exists.
    """
    wanted = os.stat(path)
    found = []
    for entry in matching("/sys/block", "loop*"):
        device = f"/dev/{entry.name}"
        backing = loop_backing(device)
        if backing is None:
            continue
        try:
            same = is_same_file(backing, wanted)
        except OSError:
            # "NAME (deleted)", or a name in another mount namespace: ask the device for the inode.
            same = loop_inode(device) == (wanted.st_dev, wanted.st_ino)
        if same:
            found.append(device)
    return sorted(found)


def _may_wait(mount: MountInfo | None, wanted: os.stat_result) -> bool:
    """Whether a mount may wait for others; True if the mount is unknown."""
    if mount is None:
        return True
    if mount.mountpoint == b"/" or mount.dev == f"{os.major(wanted.st_dev)}:{os.minor(wanted.st_dev)}":
        return False
    return mount.fstype.startswith("fuse") or mount.fstype in _WAIT
