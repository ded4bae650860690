"""Keep a store that is in memory: write it out as an image, and go on with that."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from cowfs.errors import StoreError, UsageError
from cowfs.linux.files import segments
from cowfs.store import create, lock, tools
from cowfs.store.sizes import LARGEST, check_room, format_size
from cowfs.store.store import Store

Step = Callable[[], None]
_CHUNK = 1 << 20


def persist(store: Store, directory: int, name: str, path: str, size: int | None) -> Iterator[Step | str]:
    """Write the store in memory out as *name* in the open *directory*, and go on with it there.

    The image gets *size* bytes, or as many as it has in memory. Yields what is to be told, and what is
    to be called by another thread before the next step: users of the store go on meanwhile. Only
    what they change meanwhile is copied while they wait. *path* is for messages, and where the
    store says it is from then on.

    Raises StoreError and UsageError; the file is whole or not there, and the store goes on in memory.
    """
    memory = store.memory
    if memory is None:
        raise StoreError(f"{store.path}: is kept already" if store.kind != "memory" else _NOT_OURS)
    wanted = _wanted(memory.size, size)
    place = f"/proc/self/fd/{directory}"
    if name in os.listdir(place):
        raise StoreError(f"{path}: exists already", "choose another name")
    check_room(path, place, wanted)
    layer: Any = store.layer
    with create.unfinished(os.path.join(place, name), place) as fd:
        yield f"allocating {format_size(wanted)}"
        yield lambda: create.allocate(fd, path, 0, wanted)
        yield "copying"
        copied: dict[int, bytes] = {}
        yield lambda: _copy(memory.fd, fd, copied)
        yield lambda: os.fsync(fd)
        yield "copying what changed meanwhile"
        layer.suspend(store.work)
        kept = -1
        try:
            if store.memory is not memory:
                raise StoreError(f"{path}: the store went elsewhere meanwhile: {store.path}")
            if memory.size > wanted:
                raise StoreError(f"{path}: the changes have outgrown {format_size(wanted)} meanwhile")
            _copy(memory.fd, fd, copied)
            if wanted > memory.size:
                _fill(fd, path)
            os.fsync(fd)
            lock.lock(fd, path)
            kept = fd
        finally:
            layer.resume(store.work, kept)
        os.dup2(fd, memory.fd, inheritable=False)  # the memory is free; close() closes the image
        store.kind, store.path, store.memory = "image", path, None
        layer.spare_bytes = 0


_NOT_OURS = "memory: a tmpfs of the kernel's cannot be kept; --engine process makes stores that can"


def _wanted(present: int, size: int | None) -> int:
    if size is None:
        return present
    if size >= LARGEST:
        raise UsageError(f"{format_size(size)} is too large for ext3", f"less than {format_size(LARGEST)}")
    if size < present:
        raise UsageError(
            f"{format_size(size)} is too small: in memory the store has {format_size(present)} by now",
            f"give it {format_size(present)} or more",
        )
    return size & ~4095


def _copy(source: int, target: int, copied: dict[int, bytes]) -> None:
    """Copy what is not in *copied*, which tells the digest of each chunk that has been."""
    length = os.fstat(source).st_size
    seen = set()
    for start, stop in segments(source, length):
        for chunk in range(start // _CHUNK, (stop - 1) // _CHUNK + 1):
            if chunk in seen:
                continue
            seen.add(chunk)
            data = os.pread(source, min(_CHUNK, length - chunk * _CHUNK), chunk * _CHUNK)
            digest = hashlib.blake2b(data, digest_size=16).digest()
            if copied.get(chunk) != digest:
                _write(target, data, chunk * _CHUNK)
                copied[chunk] = digest
    for chunk in copied.keys() - seen:  # a hole by now
        _write(target, bytes(min(_CHUNK, length - chunk * _CHUNK)), chunk * _CHUNK)
        del copied[chunk]


def _write(fd: int, data: bytes, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, memoryview(data)[done:], offset + done)


def _fill(fd: int, path: str) -> None:
    """Let the filesystem fill its file."""
    done = tools.run(["resize2fs", "-f", f"/proc/self/fd/{fd}"], pass_fds=[fd], merge=True)
    if done.returncode:
        raise StoreError(f"{path}: resize2fs failed: {tools.last_line(done.stdout)}")
