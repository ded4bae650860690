"""Open an unused image to work on it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack

from cowfs.errors import StoreError
from cowfs.store.format import copy_detection
from cowfs.store.format.sniff import is_plain_directory, not_a_store
from cowfs.store.format.superblock import read_superblock
from cowfs.store.served import lock
from cowfs.store.served.image import open_file, refuse_torn


def refuse_directory(path: str, hint: str) -> None:
    """StoreError, with *hint*, for a directory: it has no size that can be changed."""
    if os.path.isdir(path):
        if is_plain_directory(path):
            raise not_a_store(path)
        raise StoreError(f"{path}: a directory store has no size of its own", hint)


def open_unused(
    path: str, stack: ExitStack, check: Callable[[int, str], None] = lambda _fd, _path: None
) -> int:
    """Open an image and lock it until *stack* ends. Blocks. StoreBusy; StoreError for a torn copy.

    *check* is called with the open file and *path* first.
    """
    fd = open_file(path)
    stack.callback(os.close, fd)
    check(fd, path)
    lock.lock(fd, path)
    lock.refuse_mounted_image(fd, path)
    refuse_torn(fd, path, read_superblock(fd, path, smallest=0))
    copy_detection.opened(fd)
    return fd
