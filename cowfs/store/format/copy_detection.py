"""Which file an image was last written in: how a copy is known that was made while it was in use.

An image that is open says so in its superblock. A copy of it says the same, and its parts are of different
moments: it was read from a file that was written to meanwhile. So does an image whose user was killed, and
that is sound. They differ in where they are: the directory ``cowfs/`` of an image has an attribute that tells
which file (:func:`~cowfs.store.format.identity.identify_file`) it was in when it was last opened for writing.

A copy may be put back into that very file (``cp COPY STORE``, ``dd``, ``rsync --inplace``), which leaves the
file's own attributes as they are. So it has one while the image in it is not in use, which tells what the
superblock was when that was closed.

A directory store that is in use has in its lock file which directory it is: a copy has the same there, and
is another one.
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
"""Of ``cowfs/``. In an image everybody may have it."""

_CLOSED = "user.cowfs.closed"
"""Of the file that holds the image: what its superblock was when it was closed."""


def _superblock(fd: int) -> bytes:
    block = os.pread(fd, features.SUPERBLOCK_SIZE, features.SUPERBLOCK)
    return hashlib.sha256(block).hexdigest().encode()


def closed(fd: int) -> None:
    """Note that the image in the file *fd* is not in use, and clean; where a file may have attributes."""
    with suppress(OSError):
        files.fsetxattr(fd, _CLOSED, _superblock(fd))


def opened(fd: int) -> None:
    """Forget what :func:`closed` has noted, before anything else is written; on disk at return. Blocks."""
    with suppress(OSError):
        files.fremovexattr(fd, _CLOSED)
        os.fsync(fd)


def _is_another(fd: int) -> bool:
    """Say whether somebody has written to the file since we have closed the image in it."""
    with suppress(OSError):
        return files.fgetxattr(fd, _CLOSED) != _superblock(fd)
    return False


def _private(layer: UpperLayer) -> Key | None:
    """Return the directory that is ours of the store in an image, if it has one."""
    try:
        return layout.find(layout.as_store(layer), layout.PRIVATE)
    except StoreError:  # which who opens it says
        return None


def noted(layer: UpperLayer) -> str:
    """Return the file that the image was in; "" if that is not known."""
    with suppress(OSError):
        private = _private(layer)
        if private is not None and ATTRIBUTE in layer.listxattr(private):
            return layer.getxattr(private, ATTRIBUTE).decode(errors="replace")
    return ""


def note(layer: UpperLayer, fd: int) -> None:
    """Write down that the image is in the file *fd* now; it is on disk when this returns. Blocks.

    Without room for it nothing is written, and nothing known at the next time.
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
    """Say whether the image in the file *fd* was in another one when it was written to; None: not known.

    True too for one that has taken the place of another in the same file.
    """
    if _is_another(fd):
        return True
    before, here = noted(layer), identify_file(fd)
    return before != here if before and here else None


def enter(lock: int, directory: int) -> None:
    """Note in the lock file of a directory store that it is in use, and which directory it is. Not in one
    that has other names: what they stand for is not ours to write to."""
    if os.fstat(lock).st_nlink == 1:
        os.ftruncate(lock, 0)
        os.pwrite(lock, identify_file(directory).encode(), 0)


def leave(lock: int) -> None:
    """Note that it is not in use any more."""
    with suppress(OSError):
        if os.fstat(lock).st_nlink == 1:
            os.ftruncate(lock, 0)


def was_copied_in_use(lock: int, directory: int) -> bool:
    """Say whether a directory store is a copy that was made while the original was in use."""
    said, here = os.pread(lock, 100, 0), identify_file(directory).encode()
    return bool(said and here) and said != here


def torn_copy(path: str) -> StoreError:
    """Return the message for an image that needs recovery and is a copy."""
    return StoreError(
        f"{path}: a copy of a store that was in use; its files may be incomplete",
        f"unmount the store and copy it again, or accept this copy: cowfs check {path}",
    )
