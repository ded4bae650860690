"""Who else than root can change what a path leads to."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterator

from cowfs.linux.mounts import mount_id, mountinfo

_LINKS = 40
"""As many symbolic links as the kernel follows (MAXSYMLINKS in include/linux/namei.h)."""


def who_can_change(path: str | bytes) -> str | None:
    """Return why others than root can change what *path* leads to; None when they cannot.

    Looks at each directory and symbolic link on the way, and at the file itself: its owner, its permissions
    (an ACL's are within the group's, acl(5)), and who serves its filesystem. A directory with the sticky bit
    keeps what is in it from those it does not belong to. OSError if it leads nowhere.

    Of a directory's content nothing is looked at: there the kernel sees to it that nobody makes set-user-ID
    files and devices of root's.
    """
    served = _served_by_users({0})
    for here, info in _way(path):
        reason = _why(here, info) or _why_served(here, info, served)
        if reason is not None:
            return reason
    return None


def who_leads_astray(path: str | bytes) -> str | None:
    """Return why another user, neither root nor ourselves, can let *path* lead to any directory at all; None
    when nobody can: by a symbolic link of theirs, or on a filesystem that they serve. OSError as above.

    Who may only rename what is on the way can choose among the directories that are there.
    """
    mine = {0, os.geteuid()}
    served = _served_by_users(mine)
    for here, info in _way(path):
        if stat.S_ISLNK(info.st_mode) and info.st_uid not in mine:
            return f"{os.fsdecode(here)} is a symbolic link of another user's (uid {info.st_uid})"
        reason = _why_served(here, info, served)
        if reason is not None:
            return reason
    return None


def _way(path: str | bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    """Yield each directory and symbolic link on the way that the kernel takes, and the file itself."""
    rest = os.path.join(os.getcwdb(), os.fsencode(path)).split(b"/")[::-1]
    at, links = b"/", 0
    yield at, os.stat(at)
    while rest:
        name = rest.pop()
        if name in {b"", b"."}:
            continue
        if name == b"..":
            at = os.path.dirname(at)
            continue
        here = os.path.join(at, name)
        info = os.lstat(here)
        yield here, info
        if stat.S_ISLNK(info.st_mode):
            links += 1
            if links > _LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            target = os.readlink(here)
            rest += target.split(b"/")[::-1]
            at = b"/" if target.startswith(b"/") else at
        else:
            at = here


def _why(path: bytes, info: os.stat_result) -> str | None:
    shown = os.fsdecode(path)
    if info.st_uid != 0:
        return f"{shown} belongs to uid {info.st_uid}"
    if stat.S_ISLNK(info.st_mode) or (stat.S_ISDIR(info.st_mode) and info.st_mode & stat.S_ISVTX):
        return None
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{shown} can be written to by others than root"
    return None


def _served_by_users(trusted: Collection[int]) -> dict[str, int]:
    """Return the users who mounted each FUSE filesystem (``major:minor``), but for the *trusted*: owners and
    modes there are what their daemons say, and another thing whenever they like."""
    served = {}
    for mount in mountinfo():
        if mount.fstype.startswith("fuse"):
            for option in mount.super_words:
                who = option.removeprefix("user_id=")
                if who != option and who.isdigit() and int(who) not in trusted:
                    served[mount.dev] = int(who)
    return served


def _why_served(path: bytes, info: os.stat_result, served: dict[str, int]) -> str | None:
    who = served.get(f"{os.major(info.st_dev)}:{os.minor(info.st_dev)}")
    return None if who is None else f"{os.fsdecode(path)} is on a filesystem that uid {who} serves"


def mount_forbids(path: str | bytes) -> set[str]:
    """Return which of ``nosuid`` and ``nodev`` the filesystem that *path* is on is mounted with."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        at = mount_id(fd)
    finally:
        os.close(fd)
    options = next((mount.options for mount in mountinfo() if mount.id == at), "")
    return {"nosuid", "nodev"} & set(options.split(","))
