"""Check that a daemon really has a store at a path before we say so: its word is not enough."""

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
    """Return if *name* in an open directory is a sound image of *size* bytes, and in use by the daemon that
    sent *facts*. Otherwise StoreError says what is wrong; *path* is for messages. Blocks.
    """
    try:
        seen = os.stat(name, dir_fd=directory, follow_symlinks=False)
        fd = open_file(f"/proc/self/fd/{directory}/{name}", read_only=True)
    except OSError as error:
        raise _untrue(path, f"{error.strerror}") from None
    try:
        if not os.path.samestat(seen, os.fstat(fd)):
            raise _untrue(path, "a symbolic link is there")
        _check(fd, path, facts, size, unused=_SMALL_GROUP)
        identity = read_superblock(fd, path).uuid
        if identity != facts["store"].get("uuid"):  # what stood in memory had that of its store
            raise _untrue(path, f"it is another store ({identity})")
    finally:
        os.close(fd)


def has_size(path: str, facts: dict[str, Any], size: int) -> None:
    """Check the same for the image at *path*, which the daemon has enlarged, if we can see it."""
    try:
        fd = open_file(path, read_only=True)
    except StoreError:
        return  # hidden by the mount, on a disk that is not mounted, or in another mount namespace
    try:
        if not lock.try_lock(fd, shared=True):  # else it is another file
            _check(fd, path, facts, size, unused=0)
    finally:
        os.close(fd)


_SMALL_GROUP = 16 << 20
"""Bytes at the end of a file that mke2fs and resize2fs leave unused: no block group fits in them."""


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
