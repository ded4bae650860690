"""Find out which users other than root can change what a path leads to."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterable, Iterator

from cowfs.errors import os_error
from cowfs.linux.mount_table import mount_id, mountinfo

_LINKS = 40
"""How many symbolic links the kernel follows (MAXSYMLINKS in include/linux/namei.h)."""
_STEP = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST_SEEN = 20_000
"""How many names of a directory are examined, in about 50 ms."""


def who_can_change(path: str | bytes, trusted: Collection[int] = (0,)) -> str | None:
    """Return why users other than the *trusted* can change what *path* leads to; None if they cannot.

    Examines each directory and symbolic link on the way, and the file itself: its owner, its permissions
    (the group's include an ACL's, acl(5)), and which user serves its filesystem. In a directory with the
    sticky bit, users cannot replace files of others. OSError if the path leads nowhere.

    It does not examine the content of a directory: there the kernel prevents users from making set-user-ID
    files of root's, and devices.
    """
    served = _served_by_users(trusted)
    for here, info in _way(path):
        reason = _why(here, info, trusted) or _why_served(here, info, served)
        if reason is not None:
            return reason
    return None


def who_can_redirect(path: str | bytes, fd: int = -1) -> str | None:
    """Return why a user, neither root nor this one, can make *path* lead to any directory; None if none can.

    Such a user owns a symbolic link on the way, or serves a filesystem there. A user who may only rename
    directories on the way cannot, being limited to existing ones. *fd*, if given, was opened by *path*, and
    must still be what it leads to. OSError if the path leads nowhere.
    """
    mine = {0, os.geteuid()}
    served = _served_by_users(mine)
    here, info = b"/", os.stat("/")
    for here, info in _way(path):
        if stat.S_ISLNK(info.st_mode) and info.st_uid not in mine:
            return f"{os.fsdecode(here)} is a symbolic link owned by another user (uid {info.st_uid})"
        reason = _why_served(here, info, served)
        if reason is not None:
            return reason
    if fd >= 0 and not os.path.samestat(info, os.fstat(fd)):
        return f"{os.fsdecode(here)} was replaced by another file"
    return None


def who_can_substitute(path: str | bytes, fd: int) -> str | None:
    """Return why *fd*, opened for writing by *path*, may be another file than the user meant; None if not.

    Another user may have made a symbolic link on the way, or the name as a hard link. (In directories
    writable by all, the kernel forbids such links if fs.protected_symlinks and fs.protected_hardlinks of
    sysctl(8) are on.) OSError if the path no longer leads anywhere.
    """
    mine, seen = {0, os.geteuid()}, os.fstat(fd)
    here, info, directories = b"/", seen, {}
    for here, info in _way(path):
        directories[here] = info
        if stat.S_ISLNK(info.st_mode) and info.st_uid not in mine:
            return f"{os.fsdecode(here)} is a symbolic link owned by another user (uid {info.st_uid})"
    if not os.path.samestat(info, seen):
        return f"{os.fsdecode(here)} was replaced by another file"
    above = directories[os.path.dirname(here)]
    if stat.S_ISREG(seen.st_mode) and seen.st_nlink > 1:
        if above.st_uid not in mine or above.st_mode & stat.S_IWOTH:
            return f"{os.fsdecode(here)} has another name, and others may write to its directory"
    return None


def is_public(path: str | bytes) -> bool:
    """Whether all users may read what *path* leads to: a file, or a directory with everything in it.

    False for a directory with too many names to examine, and if the path or a name below it leads nowhere:
    its owner may change it at any time.
    """
    try:
        return _is_public(path)
    except OSError:
        return False


def _is_public(path: str | bytes) -> bool:
    """Do the work of :func:`is_public`. OSError."""
    *way, (there, info) = _way(path)
    if not all(stat.S_ISLNK(here.st_mode) or here.st_mode & stat.S_IXOTH for _, here in way):
        return False
    if not stat.S_ISDIR(info.st_mode):
        return stat.S_ISREG(info.st_mode) and bool(info.st_mode & stat.S_IROTH)
    if not _is_shown(info):
        return False
    seen, directories = 0, [there]
    while directories:
        with os.scandir(directories.pop()) as entries:
            for entry in entries:
                info = entry.stat(follow_symlinks=False)
                seen += 1
                if seen > _MOST_SEEN or not _is_shown(info):
                    return False
                if entry.is_dir(follow_symlinks=False):
                    directories.append(entry.path)
    return True


def _is_shown(info: os.stat_result) -> bool:
    """Whether all users may read a file, or list and enter a directory."""
    wanted = stat.S_IROTH | (stat.S_IXOTH if stat.S_ISDIR(info.st_mode) else 0)
    return stat.S_ISLNK(info.st_mode) or info.st_mode & wanted == wanted


def _way(path: str | bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    """Yield each directory and symbolic link that the kernel visits when it looks up *path*, and the file.

    It goes from one to the next by descriptors, so nobody can make what was seen lead elsewhere meanwhile.
    """
    name = os.fsencode(path)
    if not os.path.isabs(name):
        name = os.path.join(os.getcwdb(), name)
    rest = name.split(b"/")[::-1]
    at, links = b"/", 0
    fd = os.open("/", _STEP)
    try:
        yield at, os.fstat(fd)
        while rest:
            name = rest.pop()
            if name in {b"", b"."}:
                continue
            here = os.path.dirname(at) if name == b".." else os.path.join(at, name)
            found = os.open(name, _STEP, dir_fd=fd)
            try:
                info = os.fstat(found)
                yield here, info  # the path may end here
                if stat.S_ISLNK(info.st_mode):
                    links += 1
                    if links > _LINKS:
                        raise os_error(errno.ELOOP, path)
                    target = os.readlink(b"", dir_fd=found)
                    rest += target.split(b"/")[::-1]
                    if target.startswith(b"/"):
                        at, fd = b"/", _replaced(fd, os.open("/", _STEP))
                else:
                    at, fd = here, _replaced(fd, os.dup(found))
            finally:
                os.close(found)
    finally:
        os.close(fd)


def _replaced(old: int, new: int) -> int:
    os.close(old)
    return new


def forbidden(paths: Iterable[str], trusted: Collection[int] = (0,)) -> dict[str, str]:
    """Return, for each of ``nosuid`` and ``nodev`` that a mount of *paths* must have, the reason.

    Users other than the *trusted* who can change an image, a store, or the path to it could create a
    set-user-ID program of another user, or a device. If a path does not exist yet, its directory counts.
    """
    why: dict[str, str] = {}
    for path in paths:
        there = path if os.path.lexists(path) else os.path.dirname(path)
        reason = who_can_change(there, trusted)
        if reason is not None:
            return dict.fromkeys(("nosuid", "nodev"), reason)
        for option in mount_forbids(there):
            why.setdefault(option, f"{path} is on a filesystem that is mounted {option}")
    return why


def _why(path: bytes, info: os.stat_result, trusted: Collection[int]) -> str | None:
    shown = os.fsdecode(path)
    if info.st_uid not in trusted:
        return f"{shown} belongs to uid {info.st_uid}"
    if stat.S_ISLNK(info.st_mode) or (stat.S_ISDIR(info.st_mode) and info.st_mode & stat.S_ISVTX):
        return None
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        others = "root" if trusted == (0,) else "its owner"
        return f"{shown} is writable by users other than {others}"
    return None


def _served_by_users(trusted: Collection[int]) -> dict[str, int]:
    """Return the uids of users other than the *trusted* who serve FUSE filesystems, by ``major:minor``.

    Their daemons can report any owner and mode.
    """
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
    return None if who is None else f"{os.fsdecode(path)} is on a filesystem served by uid {who}"


def who_serves(info: os.stat_result) -> int | None:
    """Return the user, neither root nor this one, who serves the FUSE filesystem of a file; None if none.

    Owners and modes there are only what that user says.
    """
    return _served_by_users({0, os.geteuid()}).get(f"{os.major(info.st_dev)}:{os.minor(info.st_dev)}")


def mount_forbids(path: str | bytes) -> set[str]:
    """Return which of ``nosuid`` and ``nodev`` the mount of *path* has."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        at = mount_id(fd)
    finally:
        os.close(fd)
    options = next((mount.options for mount in mountinfo() if mount.id == at), "")
    return {"nosuid", "nodev"} & set(options.split(","))
