"""Open a store of any kind."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from cowfs.errors import StoreError, UsageError
from cowfs.store.e2fsprogs.tools import Progress, quiet
from cowfs.store.format.foreign import pair_in, refuse_other_forms
from cowfs.store.format.sniff import looks_like_image, split_subdir
from cowfs.store.served.directory import open_apart, open_directory
from cowfs.store.served.image import open_image
from cowfs.store.served.memory import open_memory
from cowfs.store.served.store import Store, Wanted
from cowfs.types import Identity

_OF_THE_SYSTEM = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN}
"""Errors that say nothing about the store."""


def open_aside(size: int | None, progress: Progress = quiet) -> Store:
    """Open a store in memory of at most *size* bytes, for changes that are not kept in the mount's store.
    Blocks.
    """
    return open_memory(Wanted(engine="process", progress=progress), size)


def open_store(
    spec: str,
    *,
    lowers: Sequence[Identity] = (),
    force_lower: bool = False,
    engine: str = "auto",
    read_only: bool = False,
    memory_size: int | None = None,
    memory_subdir: str = "",
    work: str = "",
    durable: bool = True,
    may_crash: bool = False,
    progress: Progress = quiet,
) -> Store:
    """Open and lock the store *spec*: an ext3 image, a directory, or the word ``memory``. Blocks.

    With *work*, *spec* is the upper and *work* the work dir, two directories. Only these can be not
    *durable*.

    A missing or empty directory becomes a store (but a missing name with an extension is not taken for a
    directory), and so does an empty ext3 image; upper/ and work/ of the kernel's overlayfs are adopted.
    Store.bind() then binds the store to *lowers*. *memory_size* is in bytes; UsageError if it would have no
    effect. *memory_subdir* names the directory of the image in memory that holds the store, for a later
    persist.

    StoreBusy if another process has it; WrongLower if it belongs to other lowers than *lowers* (not checked
    without *lowers*); StoreError for anything else that is wrong with it.
    """
    want = Wanted(lowers, force_lower, engine, read_only, progress, durable, may_crash)
    if spec == "memory":
        return open_memory(want, memory_size, memory_subdir)
    if memory_size is not None:
        raise UsageError(
            f"{spec}: size= applies only to a store in memory",
            "an image has its own size; cowfs grow changes it",
        )
    path = os.path.abspath(spec)
    try:
        if work:
            return open_apart(path, os.path.abspath(work), want)
        if split_subdir(path)[1]:
            return open_image(path, want)
        pair = pair_in(path)
        if pair is not None:
            refuse_other_forms(pair)
            return open_apart(pair.upper, pair.work, want)
        if os.path.isdir(path) or (not os.path.lexists(path) and not looks_like_image(spec)):
            return open_directory(path, want)
        return open_image(path, want)
    except OSError as error:
        if error.errno in _OF_THE_SYSTEM:
            raise
        hint = f"for details see cowfs check -n {path}"
        raise StoreError(f"{path}: cannot be opened as a store: {error.strerror}", hint) from None
