"""Open a store that is an ext3 image: mounted by the kernel where nobody else sees it, or read and
written in this process, which needs no privilege.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from cowfs.errors import StoreError, SystemFailure
from cowfs.layers.base import UpperLayer
from cowfs.layers.directory import DirectoryLayer
from cowfs.linux import mounts, outside
from cowfs.linux.files import LACK_OF_ROOM
from cowfs.store import layout, lock, place, tools
from cowfs.store.allocate import take_room
from cowfs.store.header import check_lowers, new_header
from cowfs.store.saving import disk_of, lacks_room
from cowfs.store.store import Store, Wanted, finish
from cowfs.store.superblock import Superblock, read_superblock

if TYPE_CHECKING:
    from cowfs.layers.ext3 import Ext3Layer

_DETACH_PATIENCE = 30.0
"""Seconds that the kernel may take to unmount after the last descriptor is closed."""


def open_image(path: str, want: Wanted) -> Store:
    """Lock and recover the image at *path*, and open the store in it. Blocks.

    Raises SystemFailure for an engine that cannot be had.
    """
    kernel = want.engine == "kernel"
    if kernel and os.geteuid() != 0:
        raise SystemFailure(
            f"{path}: only root may ask the kernel to mount an image", "--engine process needs no privilege"
        )
    with ExitStack() as stack:
        fd = open_file(path, read_only=want.read_only)
        stack.callback(os.close, fd)
        lock.lock(fd, path, shared=want.read_only)
        stack.callback(fcntl.flock, fd, fcntl.LOCK_UN)
        lock.refuse_mounted_image(fd, path)
        superblock = read_superblock(fd, path)
        copy = None if want.read_only else refuse_torn(fd, path, superblock)
        if not want.read_only:
            place.opened(fd)
            stack.callback(_note_closed, fd, path)
        if want.read_only and superblock.needs_recovery and is_copy(fd, path):
            want.progress(place.torn(path).message)
        if superblock.state != "clean" and not want.read_only:
            sound = copy is not None and not superblock.has_errors
            tools.recover(fd, path, want.progress, *([] if sound else ["-f"]), sound=sound)
            superblock = read_superblock(fd, path)
        elif superblock.needs_recovery:
            want.progress(f"{path}: was not cleanly unmounted; shown as it will be when it is recovered")
            kernel = False  # which would have to write to it
        if not kernel and not want.read_only:
            _refuse_untouched(fd, path, want)
        mount = _mount if kernel else _read_ourselves
        layer = mount(fd, path, superblock, want, stack)
        try:
            store = _open_layer(fd, path, layer, superblock, want, stack)
        except OSError as error:
            hint = f"cowfs grow {path} SIZE makes it larger" if error.errno == errno.ENOSPC else ""
            lacks = lacks_room(disk_of(fd))
            raise StoreError(
                f"{path}: the store in it cannot be opened: {error.strerror}", lacks or hint
            ) from None
        store.fd = fd
        directory, name = os.path.split(os.path.realpath(path))
        above = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        store.release.callback(os.close, above)
        store.place = (above, name)
        elsewhere = outside.current()
        if elsewhere is not None:
            elsewhere.ask("place", [above], name=name)
        return store


def _note_closed(fd: int, path: str) -> None:
    with suppress(StoreError):
        if read_superblock(fd, path).state == "clean":
            place.closed(fd)


def open_file(path: str, *, read_only: bool = False) -> int:
    """Open a regular file that shall be a store. Raises StoreError, saying why it cannot be one."""
    try:
        fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise StoreError(*_why_not(path, error)) from None
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise StoreError(f"{path}: neither a regular file nor a directory, so not a store")


def _why_not(path: str, error: OSError) -> tuple[str, str]:
    if error.errno == errno.ENOENT:
        return f"{path}: no such store", f"cowfs create {path} 256 makes one of 256 MB"
    if error.errno == errno.EROFS:
        return f"{path}: is on read-only media", "copy it to a disk that can be written to"
    if error.errno in {errno.EACCES, errno.EPERM}:
        return f"{path}: no permission to write to it", "a store is written to by whoever mounts it"
    return f"{path}: cannot be opened: {error.strerror}", ""


def _mount(fd: int, path: str, superblock: Superblock, want: Wanted, stack: ExitStack) -> UpperLayer:
    if not want.read_only:
        refused = take_room(fd, path)
        if refused:
            raise StoreError(
                f"{refused}; the kernel would lose what it could not write",
                "--engine process uses it as far as the room goes",
            )
    # The device shares our open file and so the lock: if we are killed, the image stays locked until
    # the kernel has unmounted it.
    try:
        loop, device = mounts.attach_loop(fd, readonly=want.read_only)
    except OSError as error:
        raise SystemFailure(
            f"{path}: no loop device could be had: {error.strerror}",
            "modprobe loop, or use --engine process, which needs none",
        ) from None
    stack.callback(_wait_detached, fd, device, want.progress)
    options: dict[str, str | None] = {"errors": "remount-ro"}
    try:
        root = mounts.detached_mount("ext3", device, options, readonly=want.read_only)
    except OSError as error:
        hint = f"dmesg and cowfs check -n {path} tell more"
        if error.errno == errno.ENODEV:
            hint = "the kernel has no ext3: modprobe ext4"
        elif superblock.block_size > os.sysconf("SC_PAGE_SIZE"):
            hint = f"it may be unable to have blocks of {superblock.block_size >> 10} KB: --engine process"
        raise StoreError(f"{path}: the kernel cannot mount it: {error.strerror}", hint) from None
    finally:
        os.close(loop)
    layer = DirectoryLayer(root, path, privileged=True, alone=True)
    stack.callback(layer.close)
    return layer


def _read_ourselves(fd: int, path: str, _: Superblock, want: Wanted, stack: ExitStack) -> UpperLayer:
    return open_layer(fd, path, stack, read_only=want.read_only)


def _refuse_untouched(fd: int, path: str, want: Wanted) -> None:
    """Refuse what is no store, or another lower's, before a byte of it is changed by opening it to write."""
    with ExitStack() as looking:
        layer = open_layer(fd, path, looking, read_only=True)
        if layout.recognise(layer) == "store" and not want.force_lower:
            check_lowers(layout.load_header(layer), want.lowers, path)


def refuse_torn(fd: int, path: str, superblock: Superblock) -> bool | None:
    """Raise StoreError for a copy of an image that was in use. Return what is_copy says of the others.

    A copy of one that was in use for a while only, in the middle of the copying, says that it is clean: so
    a copy is checked, once, in whole.
    """
    copy = is_copy(fd, path)
    if copy and superblock.needs_recovery:
        raise place.torn(path)
    if copy and not superblock.has_errors and tools.fsck(fd, path, "-f", "-n")[0]:
        raise StoreError(
            f"{path}: a copy that is not whole: the store was in use while it was made, or is damaged",
            f"unmount the store and copy it again; or cowfs check {path} repairs this one",
        )
    return copy


def is_copy(fd: int, path: str) -> bool | None:
    """Say whether an image was in another file when it was last written to; None: not known."""
    try:
        with ExitStack() as looking:
            return place.is_copy(open_layer(fd, path, looking, read_only=True), fd)
    except (StoreError, SystemFailure):
        return None


def open_layer(fd: int, path: str, stack: ExitStack, *, read_only: bool = False) -> Ext3Layer:
    """Open the ext3 image behind *fd* in this process; *stack* closes it. *path* is for messages."""
    try:
        from cowfs.formats.ext3.image import Image
        from cowfs.layers.ext3 import Ext3Layer
    except ImportError as error:
        raise SystemFailure(
            f"{path}: this cowfs was built without the engine for images: {error}",
            "install libext2fs-dev and cowfs again; as root, --engine kernel needs none",
        ) from None
    try:
        layer = Ext3Layer(Image(fd, path, read_only=read_only))
    except OSError as error:
        if error.errno in LACK_OF_ROOM:
            raise StoreError(f"{path}: cannot be written to: {error.strerror}", "make room there") from None
        raise StoreError(
            f"{path}: cannot be read: {error.strerror}", f"cowfs check -n {path} tells more"
        ) from None
    stack.callback(_close, layer, path)
    return layer


def _close(layer: UpperLayer, path: str) -> None:
    try:
        layer.close()
    except OSError as error:
        raise StoreError(f"{path}: the last changes could not be written: {error.strerror}") from error


def _wait_detached(fd: int, device: str, progress: tools.Progress) -> None:
    """Return when the kernel has written the image and let go of it."""
    deadline = time.monotonic() + _DETACH_PATIENCE
    elsewhere = outside.current()

    def users() -> list[str]:
        if elsewhere is not None:
            return list(elsewhere.ask("loops", [fd])["devices"])
        return mounts.loop_users(f"/proc/self/fd/{fd}")

    while device in users():
        if time.monotonic() > deadline:
            progress(f"{device} is still in use: somebody else has opened it")
            return
        time.sleep(0.001)


def _open_layer(
    fd: int, path: str, layer: UpperLayer, superblock: Superblock, want: Wanted, stack: ExitStack
) -> Store:
    found = layout.recognise(layer)
    if found == "store":
        header = layout.load_header(layer)
        layout.refuse_lossy_copy(layer, header)
        if not want.read_only:
            place.note(layer, fd)
            header = header if header.mark else layout.renew_mark(layer, header)
        return finish("image", path, layer, header, want, stack)
    if want.read_only and found == "nothing":
        raise StoreError(f"{path}: an ext3 filesystem without a store in it", "mount it once to make one")
    header = new_header(adopted=found == "overlayfs", identity=superblock.uuid)
    if not want.read_only:
        header = layout.initialise(layer, header)
        place.note(layer, fd)
    return finish("image", path, layer, header, want, stack)
