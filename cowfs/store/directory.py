"""Open a store that is a directory. Needs no privilege."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import ExitStack

from cowfs.errors import StoreError
from cowfs.layers.base import UpperLayer
from cowfs.layers.directory import DirectoryLayer
from cowfs.store import layout, lock
from cowfs.store.header import TRUSTED, USER, Header, check_lowers, new_header
from cowfs.store.store import Kind, Store, Wanted, finish


def open_directory(path: str, want: Wanted) -> Store:
    """Lock and open the store in the directory *path*, which is made if it is missing. Blocks."""
    if not want.read_only and not os.path.lexists(path):
        try:
            os.mkdir(path, 0o700)  # whoever reaches what is in upper/ could change it behind our back
        except OSError as error:
            raise StoreError(f"{path}: cannot be made: {error.strerror}") from None
    with ExitStack() as stack:
        try:
            root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise StoreError(f"{path}: cannot be opened: {error.strerror}") from None
        stack.callback(os.close, root)
        lock.refuse_mounted_directory(root, path)
        if not want.read_only:
            _refuse_others(root, path)
        return open_root(root, path, want, stack, kind="directory")


def _refuse_others(root: int, path: str) -> None:
    """StoreError for a directory that belongs to another user, or that others may write to: they could
    change the store under the daemon, which may have more rights than they.
    """
    info = os.fstat(root)
    me = os.geteuid()
    if info.st_uid not in {0, me}:
        raise StoreError(
            f"{path}: the store belongs to another user (uid {info.st_uid})", "mount it as that user"
        )
    shared = stat.S_IWOTH | (stat.S_IWGRP if info.st_gid != os.getegid() else 0)
    if info.st_mode & shared:
        raise StoreError(f"{path}: other users may write to the store", f"chmod go-w {path}")


def open_root(root: int, path: str, want: Wanted, stack: ExitStack, *, kind: Kind) -> Store:
    """Open the store in the directory that *root* is a descriptor of; *stack* is what close() does."""
    alone = kind == "memory"  # a mount that only its descriptor leads to
    first = DirectoryLayer(os.dup(root), path, alone=alone)
    try:
        found = layout.recognise(first)  # before anything is written into what may not be ours
        header = _header(first, found)
        if not want.read_only or found == "store":
            _lock(first, path, want, stack)
        if not want.read_only:
            now = layout.recognise(first)  # somebody may have been faster to make it
            if found != "overlayfs" or now == "store":
                found = now
        header = _header(first, found)
        if found == "store":
            layout.refuse_lossy_copy(first, header)
        if not want.force_lower:
            check_lowers(header, want.lowers, path)  # before anything is tried out in what is for another
        if not want.read_only:
            header = _prepare(first, found, header)
    except OSError as error:
        raise StoreError(*_explain(path, error)) from None
    finally:
        first.close()
    layer = DirectoryLayer(os.dup(root), path, privileged=header.xattrs == TRUSTED, alone=alone)
    stack.callback(layer.close)
    try:
        if not want.read_only:
            layout.probe(layer, layout.find(layer, layout.WORK), header.xattrs.encode())
        return finish(kind, path, layer, header, want, stack)
    except OSError as error:
        raise StoreError(*_explain(path, error)) from None


def _lock(layer: DirectoryLayer, path: str, want: Wanted, stack: ExitStack) -> None:
    fd = layout.open_lock(layer, make=not want.read_only)
    if fd is not None:  # it is missing where somebody has copied the content of an image
        stack.callback(os.close, fd)
        lock.lock(fd, path, shared=want.read_only)


def _prepare(layer: DirectoryLayer, found: str, header: Header) -> Header:
    """Make a store of the directory, or have one ready to be written to; return its header."""
    if found != "store":
        return layout.initialise(layer, header)
    layout.ensure_directory(layer, layer.root, layout.WORK, 0o755)
    return layout.renew_mark(layer, header)


def _header(layer: DirectoryLayer, found: str) -> Header:
    """Return the header that is there, or the one that shall be."""
    if found == "store":
        header = layout.load_header(layer)
        if header.xattrs == TRUSTED and not _is_trusted():
            raise StoreError(
                f"{layer.name}: the store was made by root, only root can read its whiteouts", "use sudo"
            )
        return header
    xattrs = TRUSTED if _is_trusted() else USER
    if found == "overlayfs" and _has_user_xattrs(layer):
        xattrs = USER
    return new_header(xattrs=xattrs, adopted=found == "overlayfs")


def sees_all(layer: UpperLayer, header: Header) -> bool:
    """Say whether we may see the attributes that the overlay has in a store."""
    return header.xattrs != TRUSTED or not isinstance(layer, DirectoryLayer) or _is_trusted()


def _is_trusted() -> bool:
    """Say whether trusted.* attributes are ours to use: whether we have CAP_SYS_ADMIN, and not in a
    user namespace only.
    """
    if os.geteuid() != 0:
        return False
    with open("/proc/self/uid_map") as uid_map, open("/proc/self/status") as status:
        whole = uid_map.read().split() == ["0", "0", "4294967295"]
        capabilities = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    return whole and bool(capabilities >> 21 & 1)


def _has_user_xattrs(layer: DirectoryLayer) -> bool:
    """Say whether the kernel has written this tree with the mount option userxattr."""
    for path in ((layout.UPPER,), (layout.WORK, b"index")):
        key = layout.find(layer, *path)
        if key is not None and any(name.startswith(USER.encode()) for name in layer.listxattr(key)):
            return True
    return False


def _explain(path: str, error: OSError) -> tuple[str, str]:
    if error.errno == errno.EROFS:
        return f"{path}: is on read-only media", "copy it with cp -a to a disk that can be written to"
    if error.errno in {errno.EACCES, errno.EPERM}:
        return f"{path}: no permission to use it as a store", "it must belong to whoever mounts it"
    return f"{path}: cannot be used as a store: {error.strerror}", ""
