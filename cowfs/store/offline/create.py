"""Create a store: an ext3 image with upper/, work/ and the header. Needs no privilege."""

from __future__ import annotations

import errno
import os
import secrets
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from cowfs.errors import StoreError, UsageError
from cowfs.linux import files
from cowfs.store.e2fsprogs import tools
from cowfs.store.e2fsprogs.mke2fs import format_image
from cowfs.store.e2fsprogs.signals import cleaned_up
from cowfs.store.e2fsprogs.tools import Share
from cowfs.store.format import layout
from cowfs.store.format.header import new_header
from cowfs.store.format.sizes import LARGEST, SMALLEST, check_room, format_size
from cowfs.store.format.sniff import what_is
from cowfs.store.served import lock, luks
from cowfs.store.served.allocate import allocate, fill_holes
from cowfs.store.served.directory import refuse_unsafe_path
from cowfs.store.served.image import claim, open_file, open_layer


def create_store(
    path: str,
    size: int,
    *,
    key: bytes | None = None,
    share: Share | None = None,
    tick: Callable[[int], object] = lambda _: None,
) -> None:
    """Create a store of *size* bytes at *path*, which must not exist, and allocate all its blocks. Blocks.

    With a *key* it is encrypted; *size* includes the header of LUKS. The store appears completely or not at
    all: after a failure, SIGINT, SIGTERM or SIGHUP nothing is left. *tick* gets the number of bytes written
    to allocate it, *share* is told how far mke2fs is. UsageError for an invalid size, StoreError for an
    unsuitable place, SystemFailure without e2fsprogs.
    """
    _check_size(size, key)
    if os.path.isdir(path):
        raise StoreError(
            f"{path}: already exists and is a directory",
            f"give the path of a new file, such as {os.path.join(path, 'sysrcd.bs')}",
        )
    if os.path.lexists(path):
        larger = f"cowfs grow {path} makes an existing store larger"
        hint = larger if os.path.isfile(path) else "give the path of a new file"
        raise StoreError(f"{path}: already exists", hint)
    path = os.path.abspath(path)
    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        raise StoreError(
            f"{path}: the directory {directory} does not exist", "create it first, or choose another path"
        )
    refuse_unsafe_path(path, directory)
    check_room(path, directory, size)
    tools.program("mke2fs")
    with cleaned_up(), unfinished(path, directory) as fd:
        allocate(fd, path, 0, size, tick=tick)
        _fill(fd, path, key, share)
        fill_holes(fd, 0, size)
        os.fsync(fd)


def create_on_device(path: str, *, key: bytes | None = None, share: Share | None = None) -> int:
    """Create a store on the whole block device at *path*, which must be empty; return its size in bytes.

    With a *key* it is encrypted. *share* is told how far mke2fs is. Blocks. UsageError, StoreError,
    StoreBusy, SystemFailure.
    """
    path = os.path.abspath(path)
    tools.program("mke2fs")
    with cleaned_up(), ExitStack() as stack:
        fd = open_file(path)
        stack.callback(os.close, fd)
        lock.lock(fd, path)
        lock.refuse_mounted_image(fd, path)
        with ExitStack() as looking:
            claim(fd, path, looking)
        size = files.size_of(fd)
        _check_size(size, key)
        _refuse_content(fd, path)
        _fill(fd, path, key, share)
        os.fsync(fd)
        return size


def _check_size(size: int, key: bytes | None) -> None:
    least = SMALLEST + (luks.HEADER if key is not None else 0)
    if size < least:
        raise UsageError(
            f"{format_size(size)} is too small for a store", f"give at least {format_size(least)}"
        )
    if size >= LARGEST:
        raise UsageError(
            f"{format_size(size)} is too large for ext3", f"give less than {format_size(LARGEST)}"
        )


def _refuse_content(fd: int, path: str) -> None:
    """StoreError if a disk contains something that cowfs recognises."""
    found = what_is(fd)
    if found.startswith("a file"):
        if os.pread(fd, 2, 510) != b"\x55\xaa":
            return
        found = "a partition table or a boot sector"
    raise StoreError(f"{path}: holds {found}", f"if it may be erased: wipefs -a {path}")


def _fill(fd: int, path: str, key: bytes | None, share: Share | None) -> None:
    """Make the store in a file or device; with a *key*, in a new LUKS volume there."""
    if key is None:
        _format(fd, path, share)
        return
    with luks.formatted(fd, path, key) as inside:
        _format(inside, path, share)


@contextmanager
def unfinished(path: str, directory: str, called: str = "") -> Iterator[int]:
    """Open a new file that gets the name *path* after the block. If the block fails, the file is removed.

    Blocks. StoreError if the name is taken by then; messages call the file *called*, or *path*.
    """
    name = os.path.basename(path)
    path = called or path
    try:
        parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}", "choose another directory") from None
    temporary = ""
    fd = -1
    try:
        try:
            fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=parent)
        except OSError as error:
            if error.errno not in {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT}:
                raise
            temporary = f".cowfs-{secrets.token_hex(8)}"  # FAT has no files without names
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(temporary, flags, 0o600, dir_fd=parent)
        yield fd
        _publish(fd, parent, temporary, name)
        temporary = ""
        os.fsync(parent)
    except FileExistsError:
        raise StoreError(f"{path}: already exists", "another process has just created it") from None
    except OSError as error:
        hint = "choose a directory in which you can create it"
        raise StoreError(f"{path}: cannot be created: {error.strerror}", hint) from None
    finally:
        if temporary:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=parent)
        if fd >= 0:
            os.close(fd)
        os.close(parent)


def _publish(fd: int, parent: int, temporary: str, name: str) -> None:
    """Give the finished file its name. EEXIST if the name is taken."""
    if not temporary:
        os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=parent, follow_symlinks=True)
        return
    files.rename_new(parent, temporary, name)


def _format(fd: int, path: str, share: Share | None) -> None:
    """Make the filesystem, and in it the directories and the header. Root owns them."""
    identity = str(uuid.uuid4())
    format_image(fd, path, identity, keep=True, share=share)
    with ExitStack() as stack:
        layer = open_layer(fd, path, stack)
        layout.ensure_directory(layer, layer.root, layout.UPPER, 0o755)  # the first inode, as before
        layout.initialise(layer, new_header(identity=identity))
