"""Make a store larger. Needs no privilege but that to write to the image."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from typing import Any

from cowfs.errors import StoreError, UsageError
from cowfs.store import lock, tools
from cowfs.store.create import allocate, fill_holes
from cowfs.store.image import open_file
from cowfs.store.signals import cleaned_up, deferred
from cowfs.store.sizes import LARGEST, check_room, format_size
from cowfs.store.store import Store
from cowfs.store.superblock import read_superblock
from cowfs.store.tools import Progress, quiet


def grow_store(path: str, size: int | None, *, progress: Progress = quiet) -> int:
    """Extend the image at *path* to *size* bytes and let its filesystem fill it; return the size. Blocks.

    Without *size* only the filesystem grows, to the size that the file has. What is in the store stays.
    Whatever fails, the store is as usable as before, and the same call again goes on from there: a
    file that has the size already is no error. Raises StoreError, StoreBusy, UsageError.
    """
    if size is not None and size >= LARGEST:
        raise UsageError(f"{format_size(size)} is too large for ext3", f"less than {format_size(LARGEST)}")
    if os.path.isdir(path):
        raise StoreError(f"{path}: a directory store has no size of its own")
    path = os.path.abspath(path)
    with cleaned_up(), ExitStack() as stack:
        fd = open_file(path)
        stack.callback(os.close, fd)
        lock.lock(fd, path)
        lock.refuse_mounted_image(fd, path)
        return _grow(fd, path, size, progress)


def grow_open_store(store: Store, size: int | None, *, progress: Progress = quiet) -> int:
    """Do the same to a store that is open, under its users, who have to wait. Blocks.

    For the thread that the store's layer belongs to, and images that are read in this process.
    """
    layer: Any = store.layer
    if store.kind != "image" or store.read_only or not hasattr(layer, "suspend"):
        raise StoreError(f"{store.path}: cannot grow while it is mounted like this", "unmount it first")
    with ExitStack() as stack:
        fd = open_file(store.path)
        stack.callback(os.close, fd)
        if lock.try_lock(fd):  # it would be locked, by us
            raise StoreError(f"{store.path}: is another file than when it was mounted")
        try:
            layer.suspend(store.work)
        except OSError as error:
            raise StoreError(f"{store.path}: cannot be left alone now: {error.strerror}") from None
        stack.callback(layer.resume, store.work)
        return _grow(fd, store.path, size, progress)


def _grow(fd: int, path: str, size: int | None, progress: Progress) -> int:
    filesystem = read_superblock(fd, path, smallest=0).size
    length = os.fstat(fd).st_size
    size = (length if size is None else size) & ~4095
    _check_size(path, size, length, filesystem)
    if size == filesystem:
        progress(f"{path}: has {format_size(size)} already")
        return size
    _check_filesystem(path)
    if size > length:
        check_room(path, os.path.dirname(path), size, length)
        progress(f"extending {path} from {format_size(length)} to {format_size(size)}")
        allocate(fd, path, length, size)
        os.fsync(fd)
    else:
        progress(f"{path}: the file has {format_size(size)} already, its filesystem is to fill it")
        allocate(fd, path, filesystem, size, length)  # its holes, if somebody used truncate(1)
    _resize(path)
    fill_holes(fd, filesystem, size)
    os.fsync(fd)
    return read_superblock(fd, path, smallest=0).size


def _check_size(path: str, size: int, length: int, filesystem: int) -> None:
    if size >= length & ~4095:
        return
    if filesystem < length:
        raise StoreError(
            f"{path}: the file has {format_size(length)} already, its filesystem {format_size(filesystem)}",
            f"cowfs grow {path} completes it",
        )
    raise StoreError(
        f"{path}: has {format_size(length)}, more than the {format_size(size)} asked for",
        "a store can grow only; make a new one and copy the content",
    )


def _check_filesystem(path: str) -> None:
    """Check, and where that is safe repair, the filesystem: resize2fs demands it."""
    with deferred():
        code, said = tools.fsck(path, "-f", "-p")
    if code & ~(tools.FSCK_CORRECTED | 2):
        raise StoreError(
            f"{path}: e2fsck found damage that it cannot repair by itself: {tools.reason(said)}",
            f"nothing was extended; make a copy, then try: e2fsck -f {path}",
        )


def _resize(path: str) -> None:
    on_terminal = sys.stdout.isatty()
    options = ["-p"] if on_terminal else []
    with deferred():
        done = tools.run(["resize2fs", *options, path], show=on_terminal)
    if done.returncode:
        raise StoreError(
            f"{path}: resize2fs failed: {tools.last_line(done.stderr)}",
            "the same command again goes on from here",
        )
