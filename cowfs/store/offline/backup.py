"""Copy an open store as it is at one moment.

An image is copied while it is in use. Parts that were written meanwhile are copied again, until few are left.
Then the image is suspended, which makes it clean, and the rest is copied while its users wait. If the copy
can share its blocks with the image, only this last step is needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

from cowfs.errors import StoreError
from cowfs.linux import files
from cowfs.store.format import copy_detection
from cowfs.store.served.image import open_layer
from cowfs.store.served.store import Store

Step = Callable[[], None]
Steps = Generator[Step | str, None, int]
_UNIT = 1 << 20
"""The unit, in bytes, in which the engine reports writes (track.c)."""
_BATCH = 64
"""How many units are copied in one step."""
_FEW = 32
"""How many units at most are copied while everybody waits."""
_ROUNDS = 8
_ATTEMPTS = 3
_PUNCH = 3
"""FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE."""
_PIECE = 1 << 20


def backup_image(store: Store, target: int) -> Steps:
    """Copy the image of an open store to the empty file *target*; return its size in bytes.

    Yields messages, and calls for another thread to make before the next step. The store stays in use
    meanwhile. The result is a clean store with the contents of the original at one moment near the end.
    StoreError; OSError if *target* cannot be written.
    """
    layer: Any = store.layer
    if not hasattr(layer, "suspend"):
        raise StoreError(f"{store.path}: the kernel has it mounted", "unmount it first, and name the store")
    source = store.fd if store.memory is None else store.memory.fd
    if files.reflink(source, target):
        yield "sharing blocks"
        with suspended(store):
            _share(source, target)
    else:
        yield from _copied(store, source, target)
    yield partial(finish_copy, target, store.path)
    return os.fstat(target).st_size


def _share(source: int, target: int) -> None:
    if not files.reflink(source, target):
        raise StoreError("the copy cannot share blocks any more", "try again")


def _copied(store: Store, source: int, target: int) -> Steps:
    layer: Any = store.layer
    image = layer.image
    if image.is_tracked:  # only one caller at a time can track writes
        raise StoreError(f"{store.path}: another backup is being made", "try again when that is complete")
    try:
        for _ in range(_ATTEMPTS):
            before = image.resumed
            image.track(True)
            os.ftruncate(target, 0)
            size = files.size_of(source)
            os.ftruncate(target, size)
            yield "copying"
            for pieces in _batches(_data_of(source, size)):
                yield partial(_copy_runs, source, target, pieces)
            for _ in range(_ROUNDS):
                units = image.tracked()
                yield partial(_copy_units, source, target, units)
                if len(units) <= _FEW:
                    break
            yield partial(os.fsync, target)
            if image.resumed == before:
                with suspended(store):
                    _copy_units(source, target, image.tracked())
                return 0
            yield "the store was resized meanwhile: beginning anew"
    finally:
        image.track(False)
    raise StoreError(f"{store.path}: is resized again and again", "try again when it is not")


@contextmanager
def suspended(store: Store) -> Iterator[None]:
    """Suspend an open store for the block: all its users wait, and its image is clean. Blocks.

    StoreError if it cannot be suspended.
    """
    layer: Any = store.layer
    memory = store.memory
    if memory is not None:
        memory.release_reserve(store.work)
    try:
        try:
            layer.suspend(store.work)
        except OSError as error:
            raise StoreError(f"{store.path}: cannot be paused: {error.strerror}") from None
        try:
            yield
        finally:
            layer.resume(store.work)
    finally:
        if memory is not None:
            memory.reserve_space(store.work)


def finish_copy(fd: int, path: str) -> None:
    """Complete a clean copy of an image, so that it is a store of its own. Blocks until it is on disk."""
    with ExitStack() as stack:
        layer = open_layer(fd, path, stack)
        copy_detection.note(layer, fd)
    os.fsync(fd)
    copy_detection.closed(fd)


def copy_image(source: int, target: int) -> Iterator[int]:
    """Copy an unused image to an empty file; yield the number of bytes of each step. Blocks; OSError."""
    size = files.size_of(source)
    if files.reflink(source, target):
        yield size
        return
    os.ftruncate(target, size)
    for pieces in _batches(_data_of(source, size)):
        _copy_runs(source, target, pieces)
        yield sum(stop - start for start, stop in pieces)


def _data_of(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the runs of data (start, end) of a file, in pieces of at most 1 MiB."""
    for start, stop in files.segments(fd, size):
        for at in range(start, stop, _PIECE):
            yield at, min(stop, at + _PIECE)


def _batches(pieces: Iterator[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    batch: list[tuple[int, int]] = []
    for piece in pieces:
        batch.append(piece)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _copy_runs(source: int, target: int, pieces: list[tuple[int, int]]) -> None:
    for start, stop in pieces:
        at = start
        while at < stop:
            data = os.pread(source, stop - at, at)
            if not data:  # the file has become shorter
                break
            done = 0
            while done < len(data):
                done += os.pwrite(target, memoryview(data)[done:], at + done)
            at += len(data)


def _copy_units(source: int, target: int, units: list[int]) -> None:
    """Copy units again; holes stay holes."""
    size = files.size_of(source)
    os.ftruncate(target, size)
    for unit in sorted(units):
        start, stop = unit * _UNIT, min((unit + 1) * _UNIT, size)
        if start >= stop:
            continue
        runs = [(max(one, start), min(other, stop)) for one, other in files.segments(source, stop, start)]
        if runs != [(start, stop)]:
            _clear(target, start, stop)
        _copy_runs(source, target, runs)


def _clear(fd: int, start: int, stop: int) -> None:
    with suppress(OSError):
        files.fallocate(fd, start, stop - start, _PUNCH)
        return
    done = start
    while done < stop:
        done += os.pwrite(fd, bytes(min(_PIECE, stop - done)), done)
