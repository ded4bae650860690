"""Who else than root can change what a path leads to."""

from __future__ import annotations

import os
import stat

from cowfs.linux.mounts import mount_id, mountinfo

_LINKS = 40
"""As many symbolic links as the kernel follows (MAXSYMLINKS in include/linux/namei.h)."""


def who_can_change(path: str | bytes) -> str | None:
    """Return why others than root can change what *path* leads to; None when they cannot.

    Looks at each directory and symbolic link on the way, and at the file itself: its owner and its
    permissions (an ACL's are within the group's, acl(5)). A directory with the sticky bit keeps what
    is in it from those it does not belong to. OSError if it leads nowhere.
    """
    rest = os.path.abspath(os.fsencode(path)).split(b"/")[::-1]
    at, links = b"/", 0
    reason = _why(at, os.stat(at))
    while rest and reason is None:
        name = rest.pop()
        if name in {b"", b"."}:
            continue
        if name == b"..":
            at = os.path.dirname(at)
            continue
        here = os.path.join(at, name)
        info = os.lstat(here)
        reason = _why(here, info)
        if stat.S_ISLNK(info.st_mode):
            links += 1
            if links > _LINKS:
                raise OSError(40, os.strerror(40), path)  # ELOOP
            target = os.readlink(here)
            rest += target.split(b"/")[::-1]
            at = b"/" if target.startswith(b"/") else at
        else:
            at = here
    return reason


def _why(path: bytes, info: os.stat_result) -> str | None:
    shown = os.fsdecode(path)
    if info.st_uid != 0:
        return f"{shown} belongs to uid {info.st_uid}"
    if stat.S_ISLNK(info.st_mode) or (stat.S_ISDIR(info.st_mode) and info.st_mode & stat.S_ISVTX):
        return None
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{shown} can be written to by others than root"
    return None


def mount_forbids(path: str | bytes) -> set[str]:
    """Return which of ``nosuid`` and ``nodev`` the filesystem that *path* is on is mounted with."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        at = mount_id(fd)
    finally:
        os.close(fd)
    options = next((mount.options for mount in mountinfo() if mount.id == at), "")
    return {"nosuid", "nodev"} & set(options.split(","))
