"""What keeps a directory layer in its directory, whoever made what is in there, or changes it meanwhile.

A layer is walked one name at a time, each relative to a descriptor of the directory above, and no link is
ever followed. That leaves two ways out: a name that is none, and a mount. Where we may, the layer is in a
mount of its own, on which nobody mounts anything (:func:`cowfs.linux.mounts.private_clone`). Else the kernel
is told to refuse mounts, at the price of two system calls more, and what is mounted on is an empty directory:
what is below it nobody can see. To walk on would be to wait for ourselves where the mount is our own.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from cowfs.linux import files, mounts
from cowfs.types import Attr, AttrData

_NO_NAMES = {b"", b".", b".."}


def check_name(name: bytes) -> None:
    """Raise EINVAL for what is not one name in one directory: images and notes say what they like."""
    if name in _NO_NAMES or b"/" in name or b"\0" in name:
        raise OSError(errno.EINVAL, "no name in a directory", name)


@dataclass(frozen=True, slots=True)
class Ways:
    """How to get at what is in a directory; both raise EXDEV for what something is mounted on."""

    stat: Callable[[int, bytes], os.stat_result]
    """fstatat(2) without following."""
    open: Callable[[int, bytes, int], int]
    """openat(2) without following."""


def _stat(dir_fd: int, name: bytes) -> os.stat_result:
    return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)


def _open(dir_fd: int, name: bytes, flags: int) -> int:
    return os.open(name, flags | os.O_NOFOLLOW, dir_fd=dir_fd)


def _open_beneath(dir_fd: int, name: bytes, flags: int) -> int:
    return files.open_beneath(dir_fd, name, flags | os.O_NOFOLLOW)


PLAIN = Ways(_stat, _open)
"""Where nothing is mounted."""
_GUARDED = Ways(files.stat_beneath, _open_beneath)


def enclosed(root: int) -> tuple[int, Ways]:
    """Return a descriptor (O_PATH) of the directory *root* to be used in its place, and the ways in it.

    It may be *root* itself. If it is not, *root* shall stay open as long: what it is on is then in use for
    all to see.
    """
    with suppress(OSError):
        return mounts.private_clone(root), PLAIN
    try:
        os.close(files.open_beneath(root, b".", os.O_PATH))
    except OSError:  # a sandbox does not know openat2(2)
        return root, PLAIN
    return root, _GUARDED


def covered(directory: int, name: bytes) -> Attr:
    """Return the attributes to show of a directory that something is mounted on.

    EXDEV when it is no directory: nothing true can be shown then.
    """
    above = os.fstat(directory)
    here = os.open(b".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
    try:
        with os.scandir(here) as entries:
            for entry in entries:
                if os.fsencode(entry.name) == name:
                    if entry.is_dir(follow_symlinks=False):
                        return _like(above, entry.inode())
                    break
    finally:
        os.close(here)
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), name)


def _like(above: os.stat_result, ino: int) -> Attr:
    return AttrData(
        st_mode=stat.S_IFDIR | 0o755,
        st_ino=ino,
        st_dev=above.st_dev,
        st_nlink=2,
        st_uid=above.st_uid,
        st_gid=above.st_gid,
        st_rdev=0,
        st_size=0,
        st_blocks=0,
        st_blksize=above.st_blksize,
        st_atime_ns=above.st_mtime_ns,
        st_mtime_ns=above.st_mtime_ns,
        st_ctime_ns=above.st_ctime_ns,
    )
