"""Check what a daemon reports about its store before cowfs repeats it to the user."""

from __future__ import annotations

import os
from typing import Any

from cowfs.errors import StoreError
from cowfs.linux import locks
from cowfs.linux.files import size_of
from cowfs.store.format.sizes import format_size
from cowfs.store.format.superblock import read_superblock
from cowfs.store.served import lock
from cowfs.store.served.image import open_file


def is_kept(directory: int, name: str, path: str, facts: dict[str, Any], size: int) -> None:
    """StoreError unless *name* in an open directory is a sound image of *size* bytes in use by the daemon.

    *facts* are those that the daemon sent; *path* is for messages. Blocks.
    """
    try:
        seen = os.stat(name, dir_fd=directory, follow_symlinks=False)
        fd = open_file(f"/proc/self/fd/{directory}/{name}", read_only=True)
    except OSError as error:
        raise _untrue(path, f"{error.strerror}") from None
    try:
        if not os.path.samestat(seen, os.fstat(fd)):
            raise _untrue(path, "it is a symbolic link")
        _check(fd, path, facts, size, unused=_SMALL_GROUP)
        identity = read_superblock(fd, path).uuid
        if identity != facts["store"].get("uuid"):  # the store in memory had the same UUID
            raise _untrue(path, f"it is another store ({identity})")
    finally:
        os.close(fd)


def has_size(path: str, facts: dict[str, Any], size: int) -> None:
    """Check the same for the image at *path*, which the daemon has enlarged, if it is visible."""
    try:
        fd = open_file(path, read_only=True)
    except StoreError:
        return  # hidden by the mount, on a disk that is not mounted, or in another mount namespace
    try:
        if not lock.try_lock(fd, shared=True):  # otherwise it is another file
            _check(fd, path, facts, size, unused=0)
    finally:
        os.close(fd)


_SMALL_GROUP = 16 << 20
"""How many bytes at the end of a file mke2fs and resize2fs may leave unused, for lack of a block group."""


def _check(fd: int, path: str, facts: dict[str, Any], size: int, *, unused: int) -> None:
    superblock = read_superblock(fd, path)
    length = size_of(fd)
    user = locks.who_locks(f"/proc/self/fd/{fd}")
    if superblock.has_errors:
        raise _untrue(path, "its filesystem has errors")
    if (
        size < superblock.size
        or superblock.size + superblock.block_size + unused <= min(size, length)
        or length < size
    ):
        told = f"{format_size(superblock.size)} in a {format_size(length)} file"
        raise _untrue(path, f"it has {told}, not {format_size(size)}")
    if user not in {None, facts["pid"]} or lock.try_lock(fd, shared=True):
        raise _untrue(path, f"process {user} uses it" if user else "nobody uses it")


def _untrue(path: str, why: str) -> StoreError:
    return StoreError(
        f"{path}: differs from what the daemon of the mount reports: {why}", "see cowfs info MOUNTPOINT"
    )
