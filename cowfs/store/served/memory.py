"""Open a store in memory, which is lost when it is closed."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from typing import TYPE_CHECKING

from cowfs.errors import CowfsError, StoreError, SystemFailure, UsageError
from cowfs.linux import mounts
from cowfs.store.e2fsprogs import tools
from cowfs.store.e2fsprogs.mke2fs import format_image
from cowfs.store.format import layout
from cowfs.store.format.header import new_header
from cowfs.store.format.sizes import SMALLEST, format_size
from cowfs.store.format.superblock import read_superblock
from cowfs.store.served import directory, image
from cowfs.store.served.store import Store, Wanted, finish

if TYPE_CHECKING:
    from cowfs.layers.ext3 import Ext3Layer

_NAME = "memory"
_JOURNAL = 4 << 20
"""Bytes. The image does not survive this process, but the engine requires a journal."""
_BLOCK = 4096
_FIRST = 128 << 20
"""The first size of the image, in bytes: one block group."""
_BALLAST = b"#ballast"
_BALLAST_BYTES = 256 << 10
"""Bytes that are freed when the image is full, so that unnamed inodes can get names while it grows."""


class Memory:
    """The image of a store in memory: a file without a name, which grows up to a limit."""

    def __init__(self, fd: int, layer: Ext3Layer, limit: int, subdir: str = "") -> None:
        self.fd = fd
        self.subdir = subdir
        """The directory of the store in the image; "": the root."""
        self.top = layer.root
        """The root of the image."""
        self._layer = layer
        self._limit = limit
        self.leaving = ""
        """The path to which persist() is writing the image; "" otherwise."""
        self._tell_spare()

    @property
    def limit(self) -> int:
        """The size limit of the image in bytes."""
        return self._limit

    @limit.setter
    def limit(self, size: int) -> None:
        self._limit = size & ~4095
        self._tell_spare()

    @property
    def size(self) -> int:
        """The current size of the image in bytes, used or not."""
        return os.fstat(self.fd).st_size

    def _tell_spare(self) -> None:
        self._layer.spare_bytes = self._limit - self.size

    def make_room(self, place: int) -> bool:
        """Double the image, up to the limit; False at the limit.

        Blocks, and all users wait. *place* is a directory for files in use without a name.
        """
        before = self.size
        after = min(2 * before, self._limit)
        beyond, self._layer.is_beyond_room = self._layer.is_beyond_room, False
        if after <= before or beyond:
            return False
        self.release_reserve(place)
        self._layer.suspend(place)
        try:
            os.ftruncate(self.fd, after)
            tools.resize(self.fd, _NAME, "-f")  # no check needed: only this process has used it
        finally:
            self._layer.resume(place)
            self._tell_spare()
            self.reserve_space(place)
        return True

    def reserve_space(self, place: int) -> None:
        """Reserve some space, which :meth:`release_reserve` frees; does nothing if there is none left."""
        with suppress(OSError):
            _, file = self._layer.create(place, _BALLAST, 0o600, 0, 0)
            with closing(file):
                file.pwrite(bytes(_BALLAST_BYTES), 0)

    def release_reserve(self, place: int) -> None:
        """Free the reserved space: other programs are about to use the image."""
        with suppress(OSError):
            self._layer.unlink(place, _BALLAST, None)
            self._layer.sync()


def open_memory(want: Wanted, size: int | None = None, subdir: str = "") -> Store:
    """Open an empty store of at most *size* bytes that only this process sees. Blocks.

    It is an ext3 image in a file without a name, or a tmpfs for the engine *kernel*. It uses memory only for
    its contents. The default size is half of the machine's memory. UsageError if *size* is too small.
    """
    with ExitStack() as stack:
        if want.engine != "kernel":
            return _open_image(want, size, subdir, stack)
        try:
            root = mounts.tmpfs(size)
        except PermissionError:
            raise SystemFailure(
                "only root can mount a tmpfs", "--engine process works without root"
            ) from None
        except OSError as error:
            raise SystemFailure(
                f"cannot mount a tmpfs for the store in memory: {error.strerror}",
                "--engine process needs none",
            ) from None
        stack.callback(os.close, root)
        return directory.open_root(root, _NAME, want, stack, kind="memory")


_template: list[tuple[int, bytes]] = []
"""The nonzero blocks of an empty image of the first size, with their offsets."""
_IDENTITIES = (0x468, 0x4EC)
"""The offsets in the file of the filesystem's UUID and of its hash seed."""


def keep_template() -> None:
    """Make an empty image of the first size once, as a template for this process and its forks.

    mke2fs would take a quarter of the time of a mount. Without a template, mke2fs makes each image.
    """
    try:
        fd = os.memfd_create("cowfs-template", os.MFD_CLOEXEC)
    except OSError:
        return
    try:
        os.ftruncate(fd, _FIRST)
        format_image(fd, _NAME, journal=_JOURNAL)
        _template[:] = _contents(fd)
    except (CowfsError, OSError):  # the first mount reports it
        pass
    finally:
        os.close(fd)


def _contents(fd: int) -> Iterator[tuple[int, bytes]]:
    """Yield the blocks of a file that are not all zeros, with their offsets."""
    end, at = os.fstat(fd).st_size, 0
    while at < end:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # only a hole is left
            return
        hole = os.lseek(fd, at, os.SEEK_HOLE)
        for place in range(at, hole, _BLOCK):
            block = os.pread(fd, _BLOCK, place)
            if block.strip(b"\0"):
                yield place, block
        at = hole


def _write_template(fd: int) -> bool:
    """Make an empty image from the template, with its own identity; False if there is no template."""
    if not _template:
        return False
    first = _template[0][1]
    new = {first[place : place + 16]: uuid.uuid4().bytes for place in _IDENTITIES}
    for place, block in _template:
        for old, ours in new.items():
            block = block.replace(old, ours)
        os.pwrite(fd, block, place)
    return True


def _open_image(want: Wanted, size: int | None, subdir: str, stack: ExitStack) -> Store:
    if size is None:
        size = max(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2, SMALLEST)
    if size < SMALLEST:
        raise UsageError(
            f"memory: {format_size(size)} is too small for a store", f"give at least {format_size(SMALLEST)}"
        )
    size &= ~4095
    try:
        fd = os.memfd_create("cowfs-store", os.MFD_CLOEXEC)
        stack.callback(os.close, fd)
        os.ftruncate(fd, min(size, _FIRST))
        is_made = size >= _FIRST and _write_template(fd)
    except OSError as error:
        raise StoreError(
            f"memory: cannot create a {format_size(size)} file: {error.strerror}",
            "give a smaller size, or a store on a disk",
        ) from None
    if not is_made:
        format_image(fd, _NAME, journal=_JOURNAL)
    superblock = read_superblock(fd, _NAME)
    layer = image.open_layer(fd, _NAME, stack)
    memory = Memory(fd, layer, size, subdir)
    if subdir:
        layout.initialise(layer, new_header())
        image.within(layer, subdir, _NAME, stack, read_only=False)
    header = layout.initialise(layer, new_header(identity=superblock.uuid))
    store = finish("memory", _NAME, layer, header, want, stack)
    store.memory = memory
    store.memory.reserve_space(store.work)
    return store
