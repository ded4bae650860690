"""Open a store that is an ext3 image, mounted by the kernel where nobody else sees it."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from contextlib import ExitStack

from cowfs.errors import StoreError, SystemFailure
from cowfs.layers.directory import DirectoryLayer
from cowfs.linux import mounts
from cowfs.store import layout, lock, tools
from cowfs.store.header import new_header
from cowfs.store.store import Store, Wanted, finish
from cowfs.store.superblock import Superblock, read_superblock

_DETACH_PATIENCE = 30.0
"""Seconds that the kernel may take to unmount after the last descriptor is closed."""


def open_image(path: str, want: Wanted) -> Store:
    """Lock, recover and mount the image at *path*, and open the store in it. Blocks; needs root."""
    if want.engine == "process":
        raise StoreError(
            f"{path}: the engine process (images without the kernel's help) is not built in yet",
            "use --engine kernel, as root",
        )
    if os.geteuid() != 0:
        raise StoreError(
            f"{path}: opening a store image needs root for now",
            "without root, use a directory as the store: --store DIR",
        )
    with ExitStack() as stack:
        fd = open_file(path, read_only=want.read_only)
        stack.callback(os.close, fd)
        lock.lock(fd, path, shared=want.read_only)
        stack.callback(fcntl.flock, fd, fcntl.LOCK_UN)
        lock.refuse_mounted_image(fd, path)
        superblock = read_superblock(fd, path)
        if superblock.state != "clean" and not want.read_only:
            tools.recover(path, want.progress)
            superblock = read_superblock(fd, path)
        layer = _mount(fd, path, superblock, want, stack)
        return _open_layer(path, layer, superblock, want, stack)


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


def _mount(fd: int, path: str, superblock: Superblock, want: Wanted, stack: ExitStack) -> DirectoryLayer:
    # The device shares our open file and so the lock: if we are killed, the image stays locked until
    # the kernel has unmounted it.
    try:
        loop, device = mounts.attach_loop(fd, readonly=want.read_only)
    except OSError as error:
        raise SystemFailure(
            f"{path}: no loop device could be had: {error.strerror}", "modprobe loop; cowfs needs Linux 5.8"
        ) from None
    stack.callback(_wait_detached, fd, device, want.progress)
    options: dict[str, str | None] = {"errors": "remount-ro"}
    if want.read_only and superblock.needs_recovery:
        want.progress(f"{path}: was not cleanly unmounted; shown as it was before its last seconds")
        options["noload"] = None
    try:
        root = mounts.detached_mount("ext3", device, options, readonly=want.read_only)
    except OSError as error:
        hint = f"dmesg and cowfs check {path} tell more"
        if error.errno == errno.ENODEV:
            hint = "the kernel has no ext3: modprobe ext4"
        raise StoreError(f"{path}: the kernel cannot mount it: {error.strerror}", hint) from None
    finally:
        os.close(loop)
    layer = DirectoryLayer(root, path, privileged=True)
    stack.callback(layer.close)
    return layer


def _wait_detached(fd: int, device: str, progress: tools.Progress) -> None:
    """Return when the kernel has written the image and let go of it."""
    deadline = time.monotonic() + _DETACH_PATIENCE
    while device in mounts.loop_users(f"/proc/self/fd/{fd}"):
        if time.monotonic() > deadline:
            progress(f"{device} is still in use: somebody else has opened it")
            return
        time.sleep(0.001)


def _open_layer(
    path: str, layer: DirectoryLayer, superblock: Superblock, want: Wanted, stack: ExitStack
) -> Store:
    found = layout.recognise(layer)
    if found == "store":
        return finish("image", path, layer, layout.load_header(layer), want, stack)
    if want.read_only and found == "nothing":
        raise StoreError(f"{path}: an ext3 filesystem without a store in it", "mount it once to make one")
    header = new_header(adopted=found == "overlayfs", identity=superblock.uuid)
    if not want.read_only:
        layout.initialise(layer, header)
    return finish("image", path, layer, header, want, stack)
