"""Use an image in every way; only refusals and OSError may result."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable
from contextlib import closing
from typing import ParamSpec, TypeVar

from cowfs.errors import LayerError
from cowfs.layers.base import File, Key, LowerLayer
from cowfs.layers.kernel_file import KernelFile
from cowfs.layers.squashfs import SquashfsLayer

P = ParamSpec("P")
T = TypeVar("T")
ALLOWED = {errno.EIO, errno.EFBIG, errno.ENODATA, errno.EOPNOTSUPP}
_NAMES = 400
"""The maximum number of names to look at in an image."""
_BYTES = 4 << 20
"""The number of bytes to read of a file."""


def exercise(image: bytes) -> int:
    """Open *image*, walk it, read and copy; return the number of names, or -1 if it was refused.

    Raises whatever an image must not lead to: any exception but LayerError and the expected OSErrors.
    """
    logging.disable(logging.CRITICAL)
    return exercise_as(SquashfsLayer, image)


def exercise_as(kind: Callable[[str], LowerLayer], data: bytes) -> int:
    """Use *data* as a layer of this kind, in the same way."""
    fd = os.memfd_create("image")
    try:
        os.write(fd, data)
        try:
            layer = kind(f"/proc/self/fd/{fd}")
        except LayerError:
            return -1
        with closing(layer):
            return walk(layer)
    finally:
        os.close(fd)


def walk(layer: LowerLayer, top: Key = None) -> int:
    """Use a layer in every way, from *top* or its root; return the number of names."""
    layer.statfs()
    for call in ("identity", "summary"):
        if hasattr(layer, call):
            _try(getattr(layer, call))
    count = 0
    pending = [layer.root if top is None else top]
    while pending and count < _NAMES:
        directory = pending.pop()
        if _try(layer.lookup, directory, b"no such name") is not None:
            raise AssertionError("found what is not there")
        for name, _ in (_try(layer.readdir, directory) or [])[:_NAMES]:
            count += 1
            assert b"/" not in name and b"\0" not in name and name not in {b".", b"..", b""}, name
            found = _try(layer.lookup, directory, name)
            if found is None:
                continue
            key, attr = found
            _try(_look, layer, key, attr.st_mode)
            if stat.S_ISDIR(attr.st_mode):
                pending.append(key)
    return count


def _look(layer: LowerLayer, key: Key, mode: int) -> None:
    handle = layer.handle(key)
    if handle is not None:  # another inode has the same number
        layer.handle_ino(handle)
    for name in _try(layer.listxattr, key) or []:
        _try(layer.getxattr, key, name)
    if stat.S_ISLNK(mode):
        layer.readlink(key)
    if stat.S_ISREG(mode):
        file = layer.open(key, os.O_RDONLY)
        size = file.stat().st_size
        for offset in (0, size // 2, max(size - 5000, 0)):
            _try(file.pread, 70_000, offset)
        if size < _BYTES:
            _try(_whole, file, size)


def _whole(file: File, size: int) -> None:
    list(file.segments(size))
    for offset in range(0, size, 16384):
        assert len(file.pread(16384, offset)) == min(16384, size - offset)
    target = KernelFile(os.memfd_create("copy"))
    try:
        file.copy_to(target)
    finally:
        target.close()


def _try(function: Callable[P, T], *arguments: P.args, **more: P.kwargs) -> T | None:
    try:
        return function(*arguments, **more)
    except OSError as error:
        if error.errno not in ALLOWED:
            raise
        return None
