"""Open a store that is an ext3 image.

The kernel mounts it where nobody else sees it, or this process reads and writes it, which needs no privilege.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from cowfs.errors import StoreBusy, StoreError, SystemFailure
from cowfs.layers.base import UpperLayer
from cowfs.layers.directory import DirectoryLayer
from cowfs.linux import files, helper_process, loop_devices, mounts, safe_paths, trust
from cowfs.linux.files import LACK_OF_ROOM, open_ordinary
from cowfs.linux.signals import ctrl_c_postponed
from cowfs.overlay.aufs import AufsStore
from cowfs.store.e2fsprogs import tools
from cowfs.store.format import copy_detection, layout
from cowfs.store.format.header import Header, check_lowers, new_header
from cowfs.store.format.sniff import split_subdir
from cowfs.store.format.superblock import Superblock, read_superblock
from cowfs.store.served import lock
from cowfs.store.served.allocate import take_room
from cowfs.store.served.crash import Scratch
from cowfs.store.served.disk_space import disk_of, lacks_room
from cowfs.store.served.store import Store, Wanted, finish

if TYPE_CHECKING:
    from cowfs.layers.ext3 import Ext3Layer

_DETACH_PATIENCE = 30.0
"""Seconds that the kernel may take to unmount after the last descriptor is closed."""


def open_image(path: str, want: Wanted) -> Store:
    """Lock and recover the image at *path*, and open its store, or one of several: IMAGE/NAME. Blocks.

    SystemFailure if the engine is not available.
    """
    whole, (path, name) = path, split_subdir(path)
    kernel = want.engine == "kernel"
    if kernel and os.geteuid() != 0:
        raise SystemFailure(
            f"{path}: only root can use the kernel engine", "--engine process works without root"
        )
    with ExitStack() as stack:
        fd = open_file(path, read_only=want.read_only)
        stack.callback(os.close, fd)
        lock.lock(fd, path, shared=want.read_only, progress=want.progress)
        stack.callback(fcntl.flock, fd, fcntl.LOCK_UN)
        lock.refuse_mounted_image(fd, path)
        superblock = read_superblock(fd, path)
        copy = None if want.read_only else refuse_torn(fd, path, superblock)
        if not want.read_only:
            copy_detection.opened(fd)
            stack.callback(note_closed, fd, path)
        if want.read_only and superblock.needs_recovery and is_copy(fd, path):
            want.progress(copy_detection.torn_copy(path).message)
        if superblock.state != "clean" and not want.read_only:
            sound = copy is not None and not superblock.has_errors
            tools.recover(fd, path, want.progress, *([] if sound else ["-f"]), sound=sound)
            superblock = read_superblock(fd, path)
        elif superblock.needs_recovery:
            want.progress(f"{path}: was not cleanly unmounted; showing it as it will be after recovery")
            kernel = False  # mounting would write to the image
        if not kernel and not want.read_only:
            _refuse_untouched(fd, whole, want, name)
        scratch = None
        if want.may_crash and not want.read_only:
            scratch = Scratch(fd)
            stack.callback(scratch.close)  # after the layer
            kernel = False
        if not kernel and not want.read_only:
            claim(fd, path, stack)
        mount = _mount if kernel else _read_ourselves
        layer = mount(scratch.fd if scratch else fd, path, superblock, want, stack)
        try:
            store = _open_layer(fd, whole, layer, superblock, want, stack, name)
        except OSError as error:
            hint = f"cowfs grow {path} SIZE makes it larger" if error.errno == errno.ENOSPC else ""
            lacks = lacks_room(disk_of(fd))
            raise StoreError(
                f"{path}: the store in it cannot be opened: {error.strerror}", lacks or hint
            ) from None
        store.fd = store.locked = fd
        store.scratch = scratch
        store.most_bytes = files.size_of(fd)
        return store


def claim(fd: int, path: str, stack: ExitStack) -> None:
    """Prevent others from mounting the block device open as *fd* until *stack* closes; ignore a file.

    e2fsck and the like also claim the device, so run them before. StoreBusy if another process has it.
    """
    if not stat.S_ISBLK(os.fstat(fd).st_mode):
        return
    try:  # open(2): O_EXCL without O_CREAT claims a device
        claimed = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise StoreBusy(f"{path}: in use by the kernel: mounted, swap, or part of another device") from None
    stack.callback(os.close, claimed)


def note_closed(fd: int, path: str) -> None:
    with suppress(StoreError):
        if read_superblock(fd, path).state == "clean":
            copy_detection.closed(fd)


def open_file(path: str, *, read_only: bool = False) -> int:
    """Open a file or a block device as a store.

    StoreError says why it cannot be one. To write, *path* must not lead through another user's link.
    """
    try:
        fd = open_ordinary(path, os.O_RDONLY if read_only else os.O_RDWR)
    except OSError as error:
        raise StoreError(*_why_not(path, error, read_only=read_only)) from None
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise StoreError(
                f"{path}: not a store: neither a file, a block device nor a directory",
                "give the path of a file, a directory or a disk",
            )
        if not read_only and files.is_read_only_device(os.fstat(fd)):
            raise StoreError(*_why_not(path, OSError(errno.EROFS, ""), read_only=False))
        if not read_only and not path.startswith(("/proc/self/fd/", "/dev/fd/")):
            _refuse_substitutes(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _refuse_substitutes(fd: int, path: str) -> None:
    try:
        reason = trust.who_can_substitute(path, fd)
    except OSError as failure:
        reason = f"it no longer exists: {failure.strerror}"
    if reason is not None:
        raise StoreError(f"{path}: {reason}", "give the file itself")


def _why_not(path: str, error: OSError, *, read_only: bool) -> tuple[str, str]:
    if error.errno == errno.ENOENT:
        return f"{path}: no such store", f"cowfs create {path} 256 creates one of 256 MiB"
    if error.errno == errno.EROFS:
        return f"{path}: is on read-only media", "copy it to a writable disk"
    if error.errno in {errno.EACCES, errno.EPERM}:
        with suppress(OSError):  # fs.protected_symlinks of sysctl(8) forbids it to root, too
            reason = trust.who_can_redirect(path)
            if reason is not None:
                return f"{path}: {reason}", "give the file itself"
        if read_only:
            return f"{path}: no permission to read it", "run this as the owner of the store"
        return (
            f"{path}: no permission to write to it",
            "run this as a user who can write to it, or as root",
        )
    return f"{path}: cannot be opened: {error.strerror}", ""


def _mount(fd: int, path: str, superblock: Superblock, want: Wanted, stack: ExitStack) -> UpperLayer:
    if not want.read_only:
        refused = take_room(fd, path)
        if refused:
            raise StoreError(
                f"{refused}; the kernel would lose data that it cannot write",
                "--engine process can use it until the disk is full",
            )
    # The device shares this open file, and so the lock: if this process is killed, the image stays locked
    # until the kernel has unmounted it.
    loop, device = -1, path
    if stat.S_ISREG(os.fstat(fd).st_mode):
        loop, device = _attach(fd, path, want)
        stack.callback(_wait_detached, fd, device, want.progress)
    options: dict[str, str | None] = {"errors": "remount-ro"}
    try:
        root = mounts.detached_mount("ext3", device, options, readonly=want.read_only)
    except OSError as error:
        hint = f"for details see dmesg and cowfs check -n {path}"
        if error.errno == errno.ENODEV:
            hint = "the kernel does not support ext3: modprobe ext4"
        elif superblock.block_size > os.sysconf("SC_PAGE_SIZE"):
            hint = f"it may not support {superblock.block_size >> 10} KiB blocks; use --engine process"
        raise StoreError(f"{path}: the kernel cannot mount it: {error.strerror}", hint) from None
    finally:
        if loop >= 0:
            os.close(loop)
    layer = DirectoryLayer(root, path, privileged=True, alone=True)
    stack.callback(layer.close)
    return layer


def _attach(fd: int, path: str, want: Wanted) -> tuple[int, str]:
    try:
        return loop_devices.attach_loop(fd, readonly=want.read_only)
    except OSError as error:
        raise SystemFailure(
            f"{path}: cannot get a loop device: {error.strerror}",
            "modprobe loop, or use --engine process, which needs no loop device",
        ) from None


def _read_ourselves(fd: int, path: str, _: Superblock, want: Wanted, stack: ExitStack) -> UpperLayer:
    return open_layer(fd, path, stack, read_only=want.read_only)


def _refuse_untouched(fd: int, path: str, want: Wanted, name: str) -> None:
    """Refuse anything that is not a store of these lowers, before opening it for writing changes a byte."""
    with ExitStack() as looking:
        layer = layout.as_store(open_layer(fd, path, looking, read_only=True))
        if name and layout.find(layer, os.fsencode(name)) is None:
            return
        layer = layout.as_store(within(layer, name, path, looking, read_only=True))
        if layout.recognise(layer) == "store" and not want.force_lower:
            check_lowers(layout.load_header(layer), want.lowers, path, with_modules=True)


def within(layer: UpperLayer, name: str, path: str, stack: ExitStack, *, read_only: bool) -> UpperLayer:
    """Return a layer whose root is the directory *name* of *layer*; without a name, *layer* itself.

    A missing directory is created, unless *read_only*. Do not use the other layer any more.
    """
    if not name:
        return layer
    if isinstance(layer, AufsStore):
        raise StoreError(
            f"{path}: the store has the aufs format, so it cannot contain other stores", "leave out subdir"
        )
    key: Any = layout.find(layer, os.fsencode(name))
    if key is None and read_only:
        raise StoreError(f"{path}: no such store in the image", f"a mount with -o subdir={name} creates it")
    if key is None:
        key = layout.ensure_directory(layer, layer.root, os.fsencode(name), 0o755)
    if not stat.S_ISDIR(layer.stat(key).st_mode):
        raise StoreError(f"{path}: not a store: {name} is no directory", "give subdir another name")
    if isinstance(layer, DirectoryLayer):
        layer = DirectoryLayer(layer.descriptor(key), path, privileged=True, alone=True)
        stack.callback(layer.close)
    else:
        layer.root = key
    return layer


def refuse_torn(fd: int, path: str, superblock: Superblock) -> bool | None:
    """Raise StoreError for a copy of an image that was in use; else return the result of :func:`is_copy`.

    If the image was in use only for a while during the copying, the copy claims to be clean. So a copy is
    checked completely, once.
    """
    copy = is_copy(fd, path)
    if copy and superblock.needs_recovery:
        raise copy_detection.torn_copy(path)
    if copy and not superblock.has_errors and tools.fsck(fd, path, "-f", "-n")[0]:
        raise StoreError(
            f"{path}: an incomplete copy: the store was in use when it was copied, or is damaged",
            f"unmount the store and copy it again, or repair this copy: cowfs check {path}",
        )
    return copy


def is_copy(fd: int, path: str) -> bool | None:
    """Whether an image was in another file when it was last written; None if unknown."""
    try:
        with ExitStack() as looking:
            layer = layout.as_store(open_layer(fd, path, looking, read_only=True))
            return copy_detection.is_copy(layer, fd)
    except (OSError, StoreError, SystemFailure):
        return None


def open_layer(fd: int, path: str, stack: ExitStack, *, read_only: bool = False) -> Ext3Layer:
    """Open the ext3 image behind *fd* in this process; *stack* closes it. *path* is for messages."""
    try:
        from cowfs.formats.ext3.image import Image
        from cowfs.layers.ext3 import Ext3Layer
    except ImportError as error:
        raise SystemFailure(
            f"{path}: this cowfs was built without the ext3 engine: {error}",
            "install libext2fs-dev, then cowfs again; root can use --engine kernel instead",
        ) from None
    try:
        with ctrl_c_postponed():  # in between, it would leave the image marked as in use
            layer = Ext3Layer(Image(fd, path, read_only=read_only))
            stack.callback(_close, layer, path)
            return layer
    except OSError as error:
        if error.errno in LACK_OF_ROOM:
            raise StoreError(f"{path}: cannot be written to: {error.strerror}", "free space there") from None
        damaged = error.errno in {errno.EBADMSG, errno.EUCLEAN}
        why = "the filesystem in it is damaged" if damaged else f"cannot be read: {error.strerror}"
        raise StoreError(f"{path}: {why}", f"for details see cowfs check -n {path}") from None


def _close(layer: UpperLayer, path: str) -> None:
    try:
        layer.close()
    except OSError as error:
        raise StoreError(
            f"{path}: the last changes could not be written: {error.strerror}",
            f"cowfs check -n {path} tells whether the rest is sound",
        ) from error


def _wait_detached(fd: int, device: str, progress: tools.Progress) -> None:
    """Return when the kernel has written the image and closed it."""
    deadline = time.monotonic() + _DETACH_PATIENCE
    elsewhere = helper_process.current()

    def users() -> list[str]:
        if elsewhere is not None:
            return list(elsewhere.ask("loops", [fd])["devices"])
        return safe_paths.loop_users(f"/proc/self/fd/{fd}")

    while device in users():
        if time.monotonic() > deadline:
            progress(f"{device} is still in use: another process has it open")
            return
        time.sleep(0.001)


def _open_layer(
    fd: int,
    path: str,
    layer: UpperLayer,
    superblock: Superblock,
    want: Wanted,
    stack: ExitStack,
    name: str,
) -> Store:
    layer = layout.as_store(layer)
    header = _header(path, layer, want, superblock.uuid)
    if not want.read_only:
        copy_detection.note(layer, fd)
    if name:
        layer = layout.as_store(within(layer, name, path, stack, read_only=want.read_only))
        header = _header(path, layer, want, "")
    return finish("image", path, layer, header, want, stack)


def _header(path: str, layer: UpperLayer, want: Wanted, identity: str) -> Header:
    """Return the header of the store in a layer; create the store if there is none."""
    found = layout.recognise(layer)
    if found == "store":
        header = layout.load_header(layer)
        layout.refuse_lossy_copy(layer, header)
        return header if header.mark or want.read_only else layout.renew_mark(layer, header)
    if want.read_only and found == "nothing":
        raise StoreError(
            f"{path}: an ext3 filesystem without a store in it", "mount it once to create the store"
        )
    whiteouts = layout.whiteouts_of(layer)
    header = new_header(adopted=found == "overlayfs", identity=identity, whiteouts=whiteouts)
    return header if want.read_only else layout.initialise(layer, header)
