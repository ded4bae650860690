"""Grow a store. Needs no privilege except permission to write to the image."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple, NoReturn

from cowfs.errors import StoreError, UsageError
from cowfs.linux.files import size_of
from cowfs.store.e2fsprogs import tools
from cowfs.store.e2fsprogs.signals import cleaned_up, deferred
from cowfs.store.e2fsprogs.tools import Progress, quiet
from cowfs.store.format.sizes import LARGEST, check_room, format_size
from cowfs.store.format.superblock import read_superblock
from cowfs.store.offline.unused import open_unused, refuse_directory
from cowfs.store.served.allocate import allocate, fill_holes
from cowfs.store.served.image import open_file
from cowfs.store.served.memory import Memory
from cowfs.store.served.store import Store

Step = Callable[[], None]
_ROOM = "free space on its disk"


def grow_store(path: str, size: int | None, *, progress: Progress = quiet) -> int:
    """Grow the image at *path*, with its filesystem, to *size* bytes; return the size. Blocks.

    Without *size*, the filesystem grows to the size of the file. If it fails, the store can still be used,
    and the same call can be repeated: a file that already has the size is not an error. StoreError,
    StoreBusy, UsageError.
    """
    refuse_directory(path, _ROOM)
    path = os.path.abspath(path)
    with cleaned_up(), ExitStack() as stack:
        return _grow(open_unused(path, stack), path, size, progress)


def grow_open_store(store: Store, size: int | None) -> Generator[Step | str, None, int]:
    """Grow an open store while it is in use, as :func:`grow_store` does; return the size in bytes.

    Call it in the thread that owns the store's layer, for an image that this process reads. It yields
    messages, and calls for another thread to make before the next step. Users continue meanwhile, except
    while e2fsck and resize2fs run. For a store in memory, it only sets the size limit.
    """
    if store.memory is not None:
        return _allow(store.memory, size)
    path = store.path
    if store.kind == "directory":
        raise StoreError(f"{path}: a directory store has no size of its own", _ROOM)
    if store.kind != "image" or store.read_only or not hasattr(store.layer, "suspend"):
        raise StoreError(f"{path}: cannot grow while the kernel has it mounted", "unmount it first")
    if path in _growing:
        raise StoreError(f"{path}: is already being resized", "wait until that has finished")
    with ExitStack() as stack:
        _growing.add(path)
        stack.callback(_growing.remove, path)
        # Open it by its descriptor: cowfs's own mount may hide its path, or it is on an invisible mount.
        fd = open_file(tools.place(store.fd))
        stack.callback(os.close, fd)
        if not store.is_in_place():
            raise StoreError(f"{path}: is not the file that was mounted", "unmount it first")
        plan = _plan(fd, path, size)
        if plan.size > plan.filesystem and stat.S_ISBLK(os.fstat(fd).st_mode):
            why = "a store on a device cannot grow while it is mounted"
            raise StoreError(f"{path}: {why}", "unmount it first")
        if plan.size == plan.filesystem:
            yield f"{path}: already has {format_size(plan.size)}"
            return plan.size
        yield plan.message
        with ExitStack() as undo:
            undo.callback(_cut_back, fd, plan)
            yield partial(_extend, fd, plan)
            _resize_open(store, fd, undo)
        yield partial(_filled, fd, plan, alone=False)
        return read_superblock(fd, path, smallest=0).size


def _resize_open(store: Store, fd: int, undo: ExitStack) -> None:
    """Check and resize while all users wait. *undo* is cleared before resize2fs writes."""
    layer: Any = store.layer
    try:
        layer.suspend(store.work)
    except OSError as error:
        raise StoreError(f"{store.path}: cannot be paused: {error.strerror}") from None
    try:
        _check_filesystem(fd, store.path)
        undo.pop_all()
        _resize(fd, store.path)
    finally:
        layer.resume(store.work)


_growing: set[str] = set()
"""Paths of stores that are open in this process and being grown."""


def _allow(memory: Memory, size: int | None) -> int:
    if size is None:
        raise UsageError("memory: no size given", "512 or 512M is 512 MiB")
    if size < memory.limit:
        raise StoreError(
            f"memory: the limit is {format_size(memory.limit)}, larger than the requested"
            f" {format_size(size)}",
            "give more than it has, or +SIZE",
        )
    if size >= LARGEST:
        raise UsageError(
            f"{format_size(size)} is too large for ext3", f"give less than {format_size(LARGEST)}"
        )
    memory.limit = size
    return size


class _Plan(NamedTuple):
    """The present and new sizes of an image, in bytes."""

    path: str
    filesystem: int
    length: int
    """The present size of the file."""
    size: int
    """The new size of the file and the filesystem."""

    @property
    def message(self) -> str:
        if self.size > self.length:
            return f"extending {self.path} from {format_size(self.length)} to {format_size(self.size)}"
        return (
            f"{self.path}: the file already has {format_size(self.size)}; resizing its filesystem to fill it"
        )


def _plan(fd: int, path: str, size: int | None) -> _Plan:
    """Plan how to grow an image. UsageError, StoreError if that is not possible."""
    superblock = read_superblock(fd, path, smallest=0)
    filesystem, unit = superblock.size, max(superblock.block_size, 4096)  # resize2fs rounds to pages
    largest = min(LARGEST, superblock.block_size << 32)
    if size is not None and size >= largest:
        raise UsageError(f"{format_size(size)} is too large for it", f"give less than {format_size(largest)}")
    length = size_of(fd)
    size = (length if size is None else size) & -unit
    if size < length & -unit:
        _refuse_to_shrink(path, size, length, filesystem)
    size = max(size, filesystem)
    if size > length and stat.S_ISBLK(os.fstat(fd).st_mode):
        raise StoreError(f"{path}: the device has only {format_size(length)}", "make the device larger first")
    if size > length:
        check_room(path, f"/proc/self/fd/{fd}", size, length)
    return _Plan(path, filesystem, length, size)


def _extend(fd: int, plan: _Plan) -> None:
    """Give a file its new size, and allocate all blocks of the filesystem. A device has them."""
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        return
    if plan.size > plan.length:
        allocate(fd, plan.path, plan.length, plan.size)
    else:
        allocate(fd, plan.path, plan.filesystem, plan.size, plan.length)  # truncate(1) may have left holes


def _cut_back(fd: int, plan: _Plan) -> None:
    if plan.size > plan.length:
        os.ftruncate(fd, plan.length)


def _filled(fd: int, plan: _Plan, *, alone: bool) -> None:
    fill_holes(fd, plan.filesystem, plan.size, alone=alone)
    os.fsync(fd)


def _grow(fd: int, path: str, size: int | None, progress: Progress) -> int:
    plan = _plan(fd, path, size)
    if plan.size == plan.filesystem:
        progress(f"{path}: already has {format_size(plan.size)}")
        return plan.size
    _check_filesystem(fd, path)
    progress(plan.message)
    _extend(fd, plan)
    _resize(fd, path)
    _filled(fd, plan, alone=True)
    return read_superblock(fd, path, smallest=0).size


def _refuse_to_shrink(path: str, size: int, length: int, filesystem: int) -> NoReturn:
    if filesystem < length:
        raise StoreError(
            f"{path}: the file already has {format_size(length)}, its filesystem {format_size(filesystem)}",
            f"cowfs grow {path} finishes the resize",
        )
    raise StoreError(
        f"{path}: is {format_size(length)}, larger than the requested {format_size(size)}",
        f"a store can only grow here; cowfs shrink {path} makes it smaller",
    )


def _check_filesystem(fd: int, path: str) -> None:
    """Check the filesystem, and make the safe repairs: resize2fs requires it. *path* is for messages."""
    with deferred():
        code, said = tools.fsck(fd, path, "-f", "-p")
    if code & ~(tools.FSCK_CORRECTED | 2):
        raise StoreError(
            f"{path}: e2fsck found damage that it cannot repair automatically: {tools.reason(said)}",
            f"nothing was resized; copy the file, then run on the copy: e2fsck -f {path}",
        )


def _resize(fd: int, path: str) -> None:
    """Grow the filesystem to the size of its file, after _check_filesystem().

    resize2fs would look for that check in the superblock's times, which are wrong if the clock is. So -f
    skips this test.
    """
    on_terminal = sys.stdout.isatty()
    options = ["-f", "-p"] if on_terminal else ["-f"]
    hint = "run the same command again to continue"
    tools.resize(fd, path, *options, show=on_terminal, hint=hint)
