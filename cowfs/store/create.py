"""Make a store: an ext3 image with upper/, work/ and the header in it. Needs no privilege."""

from __future__ import annotations

import errno
import os
import secrets
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from cowfs.errors import StoreError, UsageError
from cowfs.linux import files
from cowfs.store import layout, tools
from cowfs.store.allocate import allocate, fill_holes
from cowfs.store.header import new_header
from cowfs.store.image import open_layer
from cowfs.store.signals import cleaned_up
from cowfs.store.sizes import LARGEST, SMALLEST, check_room, format_size
from cowfs.store.tools import Progress, quiet

# What ext3 was when the kernel's ext3 driver knew it, whatever /etc/mke2fs.conf says.
_FEATURES = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,sparse_super,large_file"

_GROUP = 128 << 20
"""Bytes that one block group covers, with blocks of 4 KiB."""


def create_store(path: str, size: int, *, progress: Progress = quiet) -> None:
    """Make a store of *size* bytes at *path*, where nothing may be. All of it is allocated. Blocks.

    It appears whole or not at all: a failure, SIGINT, SIGTERM or SIGHUP leave nothing behind.
    Raises UsageError for the size, StoreError for the place, SystemFailure without e2fsprogs.
    """
    if size < SMALLEST:
        raise UsageError(f"{format_size(size)} is too small for a store", f"at least {format_size(SMALLEST)}")
    if size >= LARGEST:
        raise UsageError(f"{format_size(size)} is too large for ext3", f"less than {format_size(LARGEST)}")
    if os.path.isdir(path):
        raise StoreError(
            f"{path}: exists already, as a directory",
            f"give the path of a file, such as {os.path.join(path, 'sysrcd.bs')}",
        )
    if os.path.lexists(path):
        raise StoreError(f"{path}: exists already", f"cowfs grow {path} makes an existing store larger")
    path = os.path.abspath(path)
    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        raise StoreError(
            f"{path}: there is no directory {directory}", "make it first, or choose another place"
        )
    check_room(path, directory, size)
    tools.program("mke2fs")
    progress(f"making {path}, {format_size(size)}")
    with cleaned_up(), unfinished(path, directory) as fd:
        allocate(fd, path, 0, size)
        _format(fd, path)
        fill_holes(fd, 0, size)
        os.fsync(fd)


@contextmanager
def unfinished(path: str, directory: str, called: str = "") -> Iterator[int]:
    """Open a file that gets its name at the end, if nothing stands there by then, and else is gone.

    Messages call it *called*, if not *path*.
    """
    name = os.path.basename(path)
    path = called or path
    try:
        parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from None
    temporary = ""
    fd = -1
    try:
        try:
            fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=parent)
        except OSError as error:
            if error.errno not in {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT}:
                raise
            temporary = f".cowfs-{secrets.token_hex(8)}"  # FAT: a file has a name, or is none
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(temporary, flags, 0o600, dir_fd=parent)
        yield fd
        _publish(fd, parent, temporary, name)
        temporary = ""
        os.fsync(parent)
    except FileExistsError:
        raise StoreError(f"{path}: exists already", "somebody else made it just now") from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be made: {error.strerror}") from None
    finally:
        if temporary:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=parent)
        if fd >= 0:
            os.close(fd)
        os.close(parent)


def _publish(fd: int, parent: int, temporary: str, name: str) -> None:
    """Give the finished file its name. Raises FileExistsError rather than to replace anything."""
    if not temporary:
        os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=parent, follow_symlinks=True)
        return
    try:
        files.renameat2(parent, os.fsencode(temporary), parent, os.fsencode(name), files.RENAME_NOREPLACE)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOSYS}:
            raise
        with suppress(FileNotFoundError):
            os.stat(name, dir_fd=parent, follow_symlinks=False)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name) from None
        os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)


def format_image(fd: int, path: str, identity: str = "", *, journal: int = 0, keep: bool = False) -> None:
    """Make an empty ext3 filesystem, all of it root's, in the file behind *fd*. Blocks.

    With *keep* the blocks that the file has stay allocated; *journal* is in bytes (0: mke2fs's choice).
    """
    # All block groups have the number of inodes that the first one, however small, was made with. So
    # a small store gets twice as many, or it would run out of them when it is a large one.
    per_inode = "8192" if os.fstat(fd).st_size >= _GROUP else "4096"
    # 256 bytes an inode have room for nanoseconds and the overlay's xattrs; -m 0: nobody needs blocks
    # that only root may use. nodiscard: else mke2fs gives back all the blocks that the file has.
    extended = ["lazy_itable_init=0", "root_owner=0:0", *(["nodiscard"] if keep else [])]
    done = tools.run(
        [
            *("mke2fs", "-q", "-F", "-t", "ext3", "-O", _FEATURES, "-b", "4096", "-I", "256"),
            *("-m", "0", "-i", per_inode, "-L", "cowfs", "-E", ",".join(extended)),
            *(["-U", identity] if identity else []),
            *(["-J", f"size={journal >> 20}"] if journal else []),
            tools.place(fd),
        ],
        pass_fds=[fd],
        merge=True,
    )
    if done.returncode:
        raise StoreError(f"{path}: mke2fs failed: {tools.last_line(done.stdout)}")


def _format(fd: int, path: str) -> None:
    """Make the filesystem, and in it the directories and the header, all of them root's."""
    identity = str(uuid.uuid4())
    format_image(fd, path, identity, keep=True)
    with ExitStack() as stack:
        layer = open_layer(fd, path, stack)
        layout.ensure_directory(layer, layer.root, layout.UPPER, 0o755)  # the first inode, as ever
        layout.initialise(layer, new_header(identity=identity))
