"""Open a store that is gone when it is closed."""

from __future__ import annotations

import os
from contextlib import ExitStack

from cowfs.errors import StoreError, SystemFailure, UsageError
from cowfs.linux import mounts
from cowfs.store import create, directory, image, layout
from cowfs.store.header import new_header
from cowfs.store.sizes import SMALLEST, format_size
from cowfs.store.store import Store, Wanted, finish
from cowfs.store.superblock import read_superblock

_NAME = "memory"
_JOURNAL = 4 << 20
"""Nothing of it survives us; the journal is there because the engine has no other way to write."""


def open_memory(want: Wanted, size: int | None = None) -> Store:
    """Open an empty store of at most *size* bytes that only we see: on a tmpfs or, where that may not be
    mounted, in an ext3 image that is a file without a name. Blocks.

    Memory is taken as it is filled. By default there is room for what a tmpfs has, half of the memory,
    and a quarter of it in an image. Raises UsageError for a *size* that is too small for one.
    """
    with ExitStack() as stack:
        if os.geteuid() == 0 and want.engine != "process":
            try:
                root = mounts.tmpfs(size)
            except PermissionError:
                pass  # a container's root, who may not mount
            except OSError as error:
                raise SystemFailure(f"no tmpfs for the store in memory: {error.strerror}") from None
            else:
                stack.callback(os.close, root)
                return directory.open_root(root, _NAME, want, stack, kind="memory")
        return _open_image(want, size, stack)


def _open_image(want: Wanted, size: int | None, stack: ExitStack) -> Store:
    if size is None:
        size = max(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4, SMALLEST)
    if size < SMALLEST:
        raise UsageError(
            f"memory: {format_size(size)} is too small for a store", f"at least {format_size(SMALLEST)}"
        )
    try:
        fd = os.memfd_create("cowfs-store", os.MFD_CLOEXEC)
        stack.callback(os.close, fd)
        os.ftruncate(fd, size & ~4095)
    except OSError as error:
        raise StoreError(f"memory: no file of {format_size(size)}: {error.strerror}") from None
    create.format_image(fd, _NAME, journal=_JOURNAL)
    superblock = read_superblock(fd, _NAME)
    layer = image.open_layer(fd, _NAME, stack)
    header = new_header(identity=superblock.uuid)
    layout.initialise(layer, header)
    return finish("memory", _NAME, layer, header, want, stack)
