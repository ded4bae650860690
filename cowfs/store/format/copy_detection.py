"""Detect a copy that was made while the store was in use, by the file that the image was last written in.

The superblock of an open image says that it is in use. A copy of that image says so too, and is torn: it was
read while the original was written to. An image whose user was killed also says that it is in use, but is
sound. To tell them apart, the directory ``cowfs/`` of an image has an attribute that identifies the file
(:func:`~cowfs.store.format.identity.identify_file`) in which the image was last opened for writing.

A copy may be written back into that same file (``cp COPY STORE``, ``dd``, ``rsync --inplace``), which keeps
the file's own attributes. So a file whose image is not in use has an attribute that records the superblock at
the time it was closed.

The lock file of a directory store in use identifies the directory. In a copy, it identifies another one.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress

from cowfs.errors import StoreError
from cowfs.formats.ext3 import features
from cowfs.layers.base import Key, UpperLayer
from cowfs.linux import files
from cowfs.store.format import layout
from cowfs.store.format.identity import identify_file

ATTRIBUTE = b"trusted.overlay.cowfs.file"
"""An attribute of ``cowfs/``. cowfs can set it in an image without privilege."""

_CLOSED = "user.cowfs.closed"
"""An attribute of the file with the image: the superblock at the time it was closed."""


def _superblock(fd: int) -> bytes:
    block = os.pread(fd, features.SUPERBLOCK_SIZE, features.SUPERBLOCK)
    return hashlib.sha256(block).hexdigest().encode()


def closed(fd: int) -> None:
    """Record that the image in the file *fd* is clean and not in use, if the file can have attributes.
    Blocks."""
    with suppress(OSError):
        files.fsetxattr(fd, _CLOSED, _superblock(fd))


def opened(fd: int) -> None:
    """Remove the record of :func:`closed`, before anything else is written. Blocks until that is on disk."""
    with suppress(OSError):
        files.fremovexattr(fd, _CLOSED)
        os.fsync(fd)


def _is_another(fd: int) -> bool:
    """Whether another program has written to the file since cowfs closed the image in it."""
    with suppress(OSError):
        return files.fgetxattr(fd, _CLOSED) != _superblock(fd)
    return False


def _private(layer: UpperLayer) -> Key | None:
    """Return the directory ``cowfs/`` of the store in an image; None if there is none."""
    try:
        return layout.find(layout.as_store(layer), layout.PRIVATE)
    except StoreError:  # opening the store reports it
        return None


def noted(layer: UpperLayer) -> str:
    """Return the identity of the file that the image was in; "" if unknown. Blocks."""
    with suppress(OSError):
        private = _private(layer)
        if private is not None and ATTRIBUTE in layer.listxattr(private):
            return layer.getxattr(private, ATTRIBUTE).decode(errors="replace")
    return ""


def note(layer: UpperLayer, fd: int) -> None:
    """Record that the image is in the file *fd* now. Blocks until that is on disk.

    If the image has no space for it, nothing is recorded.
    """
    here = identify_file(fd)
    if noted(layer) == here:
        return
    with suppress(OSError):
        private = _private(layer)
        if private is None:
            return
        layer.removexattr(private, ATTRIBUTE) if not here else layer.setxattr(
            private, ATTRIBUTE, here.encode()
        )
        layer.sync()


def is_copy(layer: UpperLayer, fd: int) -> bool | None:
    """Whether the image in the file *fd* was in another file when it was last written; None if unknown.
    Blocks.

    Also True for an image that was copied into the file over another one.
    """
    if _is_another(fd):
        return True
    before, here = noted(layer), identify_file(fd)
    return before != here if before and here else None


def enter(lock: int, directory: int) -> None:
    """Record in the lock file of a directory store that it is in use, and which directory it is. Blocks.

    Nothing is written to a lock file with several names: the other name may be a file of another program.
    """
    if os.fstat(lock).st_nlink == 1:
        os.ftruncate(lock, 0)
        os.pwrite(lock, identify_file(directory).encode(), 0)


def leave(lock: int) -> None:
    """Remove the record of :func:`enter`. Blocks."""
    with suppress(OSError):
        if os.fstat(lock).st_nlink == 1:
            os.ftruncate(lock, 0)


def was_copied_in_use(lock: int, directory: int) -> bool:
    """Whether a directory store is a copy that was made while the original was in use. Blocks."""
    said, here = os.pread(lock, 100, 0), identify_file(directory).encode()
    return bool(said and here) and said != here


def torn_copy(path: str) -> StoreError:
    """Return the error for a copy of an image that was in use."""
    return StoreError(
        f"{path}: a copy of a store that was in use; its files may be incomplete",
        f"unmount the store and copy it again, or accept this copy: cowfs check {path}",
    )
