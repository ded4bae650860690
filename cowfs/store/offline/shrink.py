"""Shrink a store, and return its free space to the disk."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any

from cowfs.errors import StoreError, UsageError
from cowfs.layers.base import Key, UpperLayer
from cowfs.store.e2fsprogs import tools
from cowfs.store.e2fsprogs.signals import cleaned_up, deferred
from cowfs.store.e2fsprogs.tools import Share
from cowfs.store.format import copy_detection
from cowfs.store.format.sizes import SMALLEST, format_size
from cowfs.store.format.superblock import read_superblock
from cowfs.store.offline.backup import copy_image, finish_copy, suspended
from cowfs.store.offline.unused import open_unused, refuse_directory
from cowfs.store.served.allocate import allocate
from cowfs.store.served.image import open_layer
from cowfs.store.served.store import Store

Step = Callable[[], None]
Replacing = Callable[[str], AbstractContextManager[int]]
_MINIMUM = re.compile(r"minimum size of the filesystem: (\d+)")


def shrink_store(
    path: str,
    size: int | None,
    replacing: Replacing,
    *,
    share: Share | None = None,
    tick: Callable[[int], object] = lambda _: None,
) -> int:
    """Shrink the image at *path* to *size* bytes, or as far as possible; return its size. Blocks.

    *replacing* provides a file that replaces *path* at the end. The image is copied to it, and the copy is
    shrunk. So after an interruption, the image is either the old or the new one. *tick* gets the number of
    bytes copied, *share* is told how far e2fsck and resize2fs are. StoreError, StoreBusy, UsageError.
    """
    with cleaned_up(), ExitStack() as stack:
        fd, path = _open(path, stack)
        superblock = read_superblock(fd, path, smallest=0)
        before, unit = os.fstat(fd).st_size, superblock.block_size
        if size is not None and size >= before:
            raise UsageError(f"{path}: has {format_size(before)}", "give less, or use cowfs grow")
        if size is not None and size < SMALLEST:
            raise UsageError(
                f"{format_size(size)} is too small for a store", f"give at least {format_size(SMALLEST)}"
            )
        is_whole = os.fstat(fd).st_blocks * 512 >= before
        directory = os.path.dirname(path)
        _must_have_room(fd, path, directory)
        copy = stack.enter_context(replacing(path))
        for length in copy_image(fd, copy):
            tick(length)
        _check(copy, path, "-f", "-p", is_copy=True, share=share)
        least = max(_least(copy, path) * unit, SMALLEST)
        wanted = least if size is None else max(size, unit) // unit * unit
        if wanted < least:
            raise StoreError(
                f"{path}: needs {format_size(least)} for its content",
                f"give {_in_mb(least)}, or delete files",
            )
        if wanted < superblock.size:
            with _same_times(copy, path):
                tools.shrink(copy, path, f"{wanted // 1024}K", share)
        os.ftruncate(copy, read_superblock(copy, path, smallest=0).size)
        finish_copy(copy, path)
        if is_whole:
            allocate(copy, path, 0, os.fstat(copy).st_size, os.fstat(copy).st_size)
        _set_attributes(fd, copy)
        _must_be_there(fd, path)
        return os.fstat(copy).st_size


def trim_store(path: str, *, share: Share | None = None) -> int:
    """Return the free space of the image at *path* to the disk; return the number of bytes. Blocks.

    *share* is told how far e2fsck is. StoreError, StoreBusy.
    """
    with cleaned_up(), ExitStack() as stack:
        fd, path = _open(path, stack)
        freed = _trim(fd, path, share)
        copy_detection.closed(fd)
        return freed


def trim_open_store(store: Store) -> Generator[Step | str, None, int]:
    """Return the free space in the image of an open store to the disk; return the number of bytes.

    All users of the mount wait while e2fsck runs. Call it in the thread that serves the filesystem.
    StoreError for a directory, and for an image that the kernel has mounted.
    """
    layer: Any = store.layer
    if not hasattr(layer, "suspend"):
        why = (
            "a directory store has no free space to return"
            if store.kind == "directory"
            else "the kernel has it mounted"
        )
        raise StoreError(f"{store.path}: {why}", "" if store.kind == "directory" else "use fstrim(8)")
    if store.memory is None:
        refuse_device(store.fd, store.path)
    yield store.save
    with suspended(store):
        freed = _trim(store.fd if store.memory is None else store.memory.fd, store.path)
    return freed


def _trim(fd: int, path: str, share: Share | None = None) -> int:
    before = os.fstat(fd).st_blocks
    _check(fd, path, "-f", "-p", "-E", "discard", share=share)
    os.fsync(fd)
    return max(before - os.fstat(fd).st_blocks, 0) * 512


def _open(path: str, stack: ExitStack) -> tuple[int, str]:
    """Open an unused image, and lock it until *stack* ends; return its descriptor and its real path."""
    refuse_directory(path, "delete files in it")
    fd = open_unused(path, stack, refuse_device)
    path = os.path.realpath(path)
    _must_be_there(fd, path)
    stack.callback(_still_closed, fd)
    return fd, path


def _must_be_there(fd: int, path: str) -> None:
    """StoreError if another file has replaced the one that was opened."""
    with suppress(OSError):
        if os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd)):
            return
    raise StoreError(f"{path}: was replaced by another file", "give the file itself")


def refuse_device(fd: int, path: str) -> None:
    """StoreError for a store on a block device."""
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        raise StoreError(
            f"{path}: a store on a device keeps its size, and its space", "use a store in a file"
        )


def _still_closed(fd: int) -> None:
    with suppress(StoreError):
        if read_superblock(fd, "", smallest=0).state == "clean":
            copy_detection.closed(fd)


def _must_have_room(fd: int, path: str, directory: str) -> None:
    """StoreError if the directory has no space for a copy of the image."""
    needed = os.fstat(fd).st_blocks * 512
    room = os.statvfs(directory)
    free = room.f_bavail * room.f_frsize
    if needed > free:
        raise StoreError(
            f"{path}: a copy needs {format_size(needed)} beside it, and {format_size(free)} are free",
            f"cowfs trim {path} returns its free space to the disk; or free space there",
        )


def _check(fd: int, path: str, *options: str, is_copy: bool = False, share: Share | None = None) -> None:
    with deferred():
        code, said = tools.fsck(fd, path, *options, show=share)
    if code & ~(tools.FSCK_CORRECTED | 2):
        unchanged = "nothing was changed; " if is_copy else ""
        raise StoreError(
            f"{path}: e2fsck found damage that it cannot repair automatically: {tools.reason(said)}",
            f"{unchanged}copy the file, then run on the copy: e2fsck -f {path}",
        )


def _least(fd: int, path: str) -> int:
    """Return the smallest size, in blocks, to which resize2fs can shrink the image."""
    done = tools.run(["resize2fs", "-P", tools.place(fd)], pass_fds=[fd], merge=True)
    found = _MINIMUM.search(done.stdout.decode(errors="replace"))
    if done.returncode or found is None:
        raise StoreError(f"{path}: resize2fs failed: {tools.last_line(done.stdout)}", "nothing was changed")
    return int(found[1])


@contextmanager
def _same_times(fd: int, path: str) -> Iterator[None]:
    """Keep the times of an image's directories: resize2fs changes them when it renumbers inodes."""
    with ExitStack() as stack:
        layer = open_layer(fd, path, stack, read_only=True)
        before = {name: layer.stat(key).st_mtime_ns for name, key in _directories(layer)}
    yield
    with ExitStack() as stack:
        layer = open_layer(fd, path, stack)
        for name, key in _directories(layer):
            attr = layer.stat(key)
            if attr.st_mtime_ns != before.get(name, attr.st_mtime_ns):
                layer.utimens(key, attr.st_atime_ns, before[name])


def _directories(layer: UpperLayer) -> Iterator[tuple[bytes, Key]]:
    """Yield the path of each directory, and its key."""
    waiting: list[tuple[bytes, Key]] = [(b"", layer.root)]
    while waiting:
        path, directory = waiting.pop()
        yield path, directory
        for entry in layer.readdir(directory):
            found = layer.lookup(directory, entry.name) if entry.type in {0, stat.S_IFDIR} else None
            if found is not None and stat.S_ISDIR(found[1].st_mode):
                waiting.append((path + b"/" + entry.name, found[0]))


def _in_mb(size: int) -> str:
    return f"{-(-size >> 20)} MiB"


def _set_attributes(source: int, target: int) -> None:
    """Give the new file the owner and mode of the old one."""
    info = os.fstat(source)
    with suppress(PermissionError):
        os.fchown(target, info.st_uid, info.st_gid)
    os.fchmod(target, stat.S_IMODE(info.st_mode))
    os.fsync(target)
