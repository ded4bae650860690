"""Open a store, whatever it is."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from cowfs.errors import StoreError, UsageError
from cowfs.store.directory import open_directory
from cowfs.store.image import open_image
from cowfs.store.memory import open_memory
from cowfs.store.store import Store, Wanted
from cowfs.store.tools import Progress, quiet
from cowfs.types import Identity

_OF_THE_SYSTEM = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN}
"""Nothing is wrong with the store then."""


def open_store(
    spec: str,
    *,
    lowers: Sequence[Identity] = (),
    force_lower: bool = False,
    engine: str = "auto",
    read_only: bool = False,
    memory_size: int | None = None,
    progress: Progress = quiet,
) -> Store:
    """Open and lock the store *spec*: an ext3 image, a directory, or the word ``memory``. Blocks.

    A directory that is missing or empty becomes a store (a missing name with an extension is not taken
    for a directory), and so does an ext3 image with nothing in it;
    upper/ and work/ of the kernel's overlayfs are adopted. The store is not bound to *lowers* yet:
    that is Store.bind(). *memory_size* is in bytes; UsageError where it would not be kept.

    Raises StoreBusy when somebody else has it, WrongLower when it belongs to others than *lowers*
    (without *lowers* nobody asks), StoreError for everything else that is wrong with it.
    """
    want = Wanted(lowers, force_lower, engine, read_only, progress)
    if spec == "memory":
        return open_memory(want, memory_size)
    if memory_size is not None:
        raise UsageError(
            f"{spec}: size= is for a store in memory",
            "an image has a size of its own, which cowfs grow changes",
        )
    path = os.path.abspath(spec)
    try:
        if os.path.isdir(path) or (not os.path.lexists(path) and not _looks_like_image(spec)):
            return open_directory(path, want)
        return open_image(path, want)
    except OSError as error:
        if error.errno in _OF_THE_SYSTEM:
            raise
        hint = f"cowfs check -n {path} tells more"
        raise StoreError(f"{path}: cannot be opened as a store: {error.strerror}", hint) from None


def _looks_like_image(spec: str) -> bool:
    """Say whether somebody who wrote this name of nothing meant a file: ``sysrcd.bs``, ``store.img``."""
    return bool(os.path.splitext(os.path.basename(spec))[1])
