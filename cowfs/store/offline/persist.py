"""Persist a store in memory: write it to an image, and use the image from then on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from cowfs.errors import StoreError, UsageError
from cowfs.linux.files import segments
from cowfs.store.e2fsprogs import tools
from cowfs.store.format.copy_detection import note
from cowfs.store.format.sizes import LARGEST, check_room, format_size
from cowfs.store.offline import create
from cowfs.store.served import allocate, lock
from cowfs.store.served.store import Store

Step = Callable[[], None]
_CHUNK = 1 << 20
_CHUNKS = 64
"""How many chunks are copied in one step. The caller can stop after each step."""


def persist(
    store: Store, directory: int, name: str, path: str, size: int | None
) -> Generator[Step | str, None, int]:
    """Write the store in memory to the image *name* in the open *directory*, and use the image from then on.

    The image gets *size* bytes, or its size in memory; that is returned. Yields messages, and calls for
    another thread to make before the next step. Users of the store continue meanwhile; they only wait while
    their last changes are copied. *path* is the store's new path, also for messages.

    StoreError, UsageError. Until the image is complete and has its name, the store stays in memory: after a
    failure, or if the generator is closed, there is no file.
    """
    memory = store.memory
    if memory is None:
        raise StoreError(
            f"{store.path}: its changes are already kept (cowfs backup copies the store)"
            if store.kind != "memory"
            else _NOT_OURS
        )
    if memory.leaving:
        raise StoreError(f"{store.path}: is already being written to {memory.leaving}", "wait for that")
    wanted = _wanted(memory.size, size)
    place = f"/proc/self/fd/{directory}"
    try:
        if name in os.listdir(place):
            raise StoreError(f"{path}: already exists", "choose another name")
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}", "choose another directory") from None
    check_room(path, place, wanted)
    memory.leaving = path
    try:
        with ExitStack() as unnamed:
            fd = unnamed.enter_context(create.unfinished(os.path.join(place, name), place, path))
            yield f"allocating {format_size(wanted)}"
            yield partial(allocate.allocate, fd, path, 0, wanted)
            yield "copying"
            copied: dict[int, bytes] = {}
            chunks = _present(memory.fd)
            for first in range(0, len(chunks), _CHUNKS):
                yield partial(_copy, memory.fd, fd, chunks[first : first + _CHUNKS], copied)
            yield partial(os.fsync, fd)
            kept = _switch(store, fd, path, wanted, size is None, copied, unnamed.close)
        os.dup2(kept, memory.fd, inheritable=False)  # frees the memory; close() closes the image
        os.close(kept)
        store.fd = store.locked = memory.fd
        store.mounted_as(store.dev)
        _note(store, memory.top)
        return os.fstat(memory.fd).st_size
    finally:
        memory.leaving = ""


def _switch(
    store: Store,
    fd: int,
    path: str,
    wanted: int,
    may_grow: bool,
    copied: dict[int, bytes],
    publish: Callable[[], None],
) -> int:
    """Copy what has changed since *copied*, name the file, and switch the store to it, while all users
    wait."""
    memory = store.memory
    layer: Any = store.layer
    memory.release_reserve(store.work)
    layer.suspend(store.work)
    kept = -1
    try:
        if memory.size > wanted:
            if not may_grow:
                raise StoreError(
                    f"{path}: the changes have outgrown {format_size(wanted)} in the meantime",
                    "run it again with a larger SIZE",
                )
            allocate.allocate(fd, path, wanted, memory.size)
        chunks = _present(memory.fd)
        _copy(memory.fd, fd, chunks, copied)
        _clear(fd, copied.keys() - set(chunks))
        if wanted > memory.size:
            _fill(fd, path)
        allocate.fill_holes(fd, 0, wanted)
        os.fsync(fd)
        lock.lock(fd, path)
        keeping = os.dup(fd)  # both descriptors hold the lock
        try:
            publish()
        except BaseException:
            os.close(keeping)
            raise
        kept = keeping
        store.kind, store.path, store.memory = "image", os.path.join(path, memory.subdir).rstrip("/"), None
        layer.spare_bytes = 0
    finally:
        layer.resume(store.work, kept)
        if kept < 0:
            memory.reserve_space(store.work)
    return kept


def _note(store: Store, top: Any) -> None:
    """Record in which file the image is, if its root *top* is a store."""
    layer: Any = store.layer
    root, layer.root = layer.root, top
    try:
        note(layer, store.fd)
    finally:
        layer.root = root


_NOT_OURS = "memory: changes in a tmpfs (--engine kernel) cannot be kept; --engine process allows it"


def _wanted(present: int, size: int | None) -> int:
    if size is None:
        return present
    if size >= LARGEST:
        raise UsageError(
            f"{format_size(size)} is too large for ext3", f"give less than {format_size(LARGEST)}"
        )
    if size < present:
        raise UsageError(
            f"{format_size(size)} is too small: the store in memory has {format_size(present)}",
            f"give {format_size(present)} or more",
        )
    return size & ~4095


def _present(source: int) -> list[int]:
    """Return the numbers of the chunks that contain data."""
    return sorted(
        {
            chunk
            for start, stop in segments(source, os.fstat(source).st_size)
            for chunk in range(start // _CHUNK, (stop - 1) // _CHUNK + 1)
        }
    )


def _copy(source: int, target: int, chunks: Sequence[int], copied: dict[int, bytes]) -> None:
    """Copy the *chunks* that have changed since they were copied. *copied* has their digests then."""
    for chunk in chunks:
        data = os.pread(source, _CHUNK, chunk * _CHUNK)
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if copied.get(chunk) != digest:
            _write(target, data, chunk * _CHUNK)
            copied[chunk] = digest


def _clear(target: int, chunks: Iterable[int]) -> None:
    """Write zeros over chunks that have become holes."""
    length = os.fstat(target).st_size
    for chunk in chunks:
        _write(target, bytes(min(_CHUNK, length - chunk * _CHUNK)), chunk * _CHUNK)


def _write(fd: int, data: bytes, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, memoryview(data)[done:], offset + done)


def _fill(fd: int, path: str) -> None:
    """Grow the filesystem to the size of its file."""
    tools.resize(fd, path, "-f")
