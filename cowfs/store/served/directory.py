"""Open a store that is a directory. Needs no privilege."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

from cowfs.errors import StoreError
from cowfs.layers import acl
from cowfs.layers.apart import ApartLayer
from cowfs.layers.base import Key, UpperLayer
from cowfs.layers.directory import DirectoryLayer
from cowfs.linux import trust
from cowfs.overlay.aufs import written_through
from cowfs.overlay.mapped_owners import into
from cowfs.store.format import copy_detection, layout
from cowfs.store.format.checkpoints import LAYERS
from cowfs.store.format.foreign import pair_in
from cowfs.store.format.header import TRUSTED, USER, Header, check_lowers, new_header
from cowfs.store.served import lock
from cowfs.store.served.store import Kind, Store, Wanted, finish
from cowfs.types import Attr

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def open_directory(path: str, want: Wanted) -> Store:
    """Lock and open the store in the directory *path*; create a missing directory. Blocks."""
    made = not want.read_only and not os.path.lexists(path)
    if not want.read_only:
        refuse_unsafe_path(path, os.path.dirname(path) if made else path)
    if made:
        try:
            os.mkdir(path, 0o700)  # users who can reach upper/ could change it unnoticed
        except OSError as error:
            hint = "choose a directory in which you can create it"
            raise StoreError(f"{path}: cannot be created: {error.strerror}", hint) from None
    with ExitStack() as stack:
        try:
            root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise StoreError(
                f"{path}: cannot be opened: {error.strerror}", "run this as its owner, or check its disk"
            ) from None
        stack.callback(os.close, root)
        lock.refuse_mounted_directory(root, path)
        if made:
            _drop_inherited(root)
        return open_root(root, path, want, stack, kind="directory")


def open_apart(upper: str, work: str, want: Wanted) -> Store:
    """Lock and open the store whose upper and work dir are these two directories. Blocks.

    Both must exist on one mount, and neither may be inside the other. cowfs keeps its own files in the work
    dir. As in the kernel's overlayfs, a new upper does not get the attributes of the lower's root.
    """
    for path in (upper, work):
        if not os.path.isdir(path):
            raise StoreError(f"{path}: not a directory", "make upperdir and workdir first")
        refuse_unsafe_path(path, path)
    upper, work = os.path.realpath(upper), os.path.realpath(work)
    above, parts = parts_of(upper, work)
    if above in {upper, work}:
        raise StoreError(f"{upper}: upperdir and workdir are the same, or one is in the other", _TWO)
    with ExitStack() as stack:
        root, top, beside = (os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (above, upper, work))
        for fd in (root, top, beside):
            stack.callback(os.close, fd)
        lock.refuse_mounted_upper(top, upper)

        def layer(*, privileged: bool = True) -> DirectoryLayer:
            given = os.dup(root)
            try:
                made = ApartLayer(given, upper, parts, privileged=privileged, durable=want.durable)
            except OSError as error:
                raise StoreError(*_explain(upper, error)) from None
            for part, fd in ((layout.UPPER, top), (layout.WORK, beside)):
                found = made.lookup(made.root, part)
                if found is None or _identity(found[1]) != _identity(os.fstat(fd)):
                    made.close()
                    raise StoreError(f"{upper}: upperdir and workdir are on different mounts", _TWO)
            return made

        return _open(layer, beside, upper, want, stack, kind="directory", privileged=os.geteuid() == 0)
    raise AssertionError("not reached")


def parts_of(upper: str, work: str) -> tuple[str, dict[bytes, list[bytes]]]:
    """Return the directory above both, and where in it the parts of such a store are (ApartLayer)."""
    above = os.path.commonpath((upper, work))
    up, aside = (os.fsencode(os.path.relpath(path, above)).split(b"/") for path in (upper, work))
    return above, {layout.UPPER: up, layout.WORK: aside, layout.PRIVATE: [*aside, layout.PRIVATE]}


def open_to_look(path: str, stack: ExitStack) -> tuple[DirectoryLayer, int, int | None]:
    """Return the layer of a directory store, or of another system's pair, until *stack* is closed. Blocks.

    With it come descriptors: the one that identifies the store, and the upper, if there is one. OSError;
    StoreError for a persistence of Debian that does not contain the changes of the whole root.
    """
    pair = pair_in(path)
    upper, work = (path, path) if pair is None else map(os.path.realpath, pair)
    root = os.open(work, _DIRECTORY)
    stack.callback(os.close, root)
    if pair is None:
        layer = DirectoryLayer(os.dup(root), path)
    else:
        above, parts = parts_of(upper, work)
        layer = ApartLayer(os.open(above, _DIRECTORY), path, parts)
    stack.callback(layer.close)
    try:
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        top = os.open("upper", flags, dir_fd=root) if pair is None else os.open(upper, flags)
    except FileNotFoundError:
        return layer, root, None
    stack.callback(os.close, top)
    return layer, root, top


def _identity(attr: Attr) -> tuple[int, int]:
    return attr.st_dev, attr.st_ino


_TWO = "give two directories of one filesystem, next to each other"


def _drop_inherited(root: int) -> None:
    """Remove the ACLs that a new directory inherited, because everything created in it would inherit them."""
    for name in (acl.DEFAULT, acl.ACCESS):
        with suppress(OSError):
            os.removexattr(root, name)
    os.fchmod(root, 0o700)


def refuse_unsafe_path(path: str, there: str) -> None:
    """StoreError if another user can make *path* lead to any directory, to create or write a store there."""
    try:
        reason = trust.who_can_redirect(there)
    except OSError:  # it leads nowhere: opening it reports that
        reason = None
    if reason is not None:
        raise StoreError(
            f"{path}: {reason}", "give the directory itself, on a filesystem that no other user serves"
        )


def refuse_others(layer: UpperLayer, path: str) -> None:
    """StoreError if the store's directory, or a part of it, belongs to another user or is writable by others.

    They could change the store under the daemon, which may have more rights than they have. Files in upper/
    have the owners that they have in the union, and are accessed like those of any layer.
    """
    for part, key in _own_parts(layer):
        attr = layer.stat(key)
        whose = f"{part} belongs" if part else "the store belongs"
        if attr.st_uid not in {0, os.geteuid()}:
            raise StoreError(f"{path}: {whose} to another user (uid {attr.st_uid})", "mount as that user")
        if stat.S_ISLNK(attr.st_mode):  # reading it reports that
            continue
        try:
            rights = acl.parse(layer.getxattr(key, acl.ACCESS))
        except OSError:  # no ACL, or none on this filesystem
            rights = acl.of_mode(attr.st_mode)
        if any(_is_strange(attr, kind, who) for kind, who in acl.writers(rights)):
            where = os.path.join(path, part)
            lists = ", and remove its ACL: setfacl -b" if len(rights) > _PLAIN else ""
            raise StoreError(
                f"{path}: other users can write to {part or 'the store'}", f"chmod go-w {where}{lists}"
            )


_PLAIN = 3
"""The entries of an ACL that says no more than the mode."""


def _own_parts(layer: UpperLayer) -> Iterator[tuple[str, Key]]:
    """Yield the existing parts of a store by name, without their contents."""
    root: Any = layer.root
    if not isinstance(layer, ApartLayer):
        yield "", root
    own = [(layout.WORK,), (layout.WORK, layout.WORK), (layout.WORK, layout.INDEX), (layout.PRIVATE,)]
    for names in [
        *own,
        (layout.PRIVATE, layout.LINKS),
        (layout.PRIVATE, LAYERS),
        (layout.PRIVATE, layout.HEADER),
        (layout.PRIVATE, layout.LOCK),
        (layout.PRIVATE, layout.BLAME),
    ]:
        with suppress(NotADirectoryError):
            key: Any = layout.find(layer, *names)
            if key is not None:
                yield os.fsdecode(b"/".join(names)), key


def _is_strange(attr: Attr, kind: str, who: int) -> bool:
    """Whether an ACL entry gives permissions to another user."""
    if kind == "user":
        return who not in {0, os.geteuid()}
    return kind == "others" or (attr.st_gid if who < 0 else who) != os.getegid()


def open_root(root: int, path: str, want: Wanted, stack: ExitStack, *, kind: Kind) -> Store:
    """Open the store in the directory with the descriptor *root*; close() closes *stack*."""
    alone = kind == "memory"  # a mount that only its descriptor reaches

    def layer(*, privileged: bool = True) -> UpperLayer:
        return layout.as_store(DirectoryLayer(os.dup(root), path, privileged=privileged, alone=alone))

    return _open(layer, root, path, want, stack, kind=kind)


def _open(
    make_layer: Callable[..., UpperLayer],
    root: int,
    path: str,
    want: Wanted,
    stack: ExitStack,
    *,
    kind: Kind,
    privileged: bool = False,
) -> Store:
    """Open the store for which *make_layer* makes a layer. *root* identifies it: the same at each use.

    *privileged*: change real owners, even if only user.* attributes are available.
    """
    try:
        first = make_layer()
    except OSError as error:
        raise StoreError(*_explain(path, error)) from None
    locked = -1
    try:
        if kind == "directory" and not want.read_only:
            refuse_others(first, path)
        found = layout.recognise(first)  # before writing into what may not be a store
        header = _header(first, found)
        if not want.read_only or found == "store":
            locked = _lock(first, root, path, want, stack)
        if not want.read_only:
            now = layout.recognise(first)  # somebody may have created it meanwhile
            if found != "overlayfs" or now == "store":
                found = now
        header = _header(first, found)
        if found == "store":
            layout.refuse_lossy_copy(first, header)
        if not want.force_lower:
            check_lowers(
                header, want.lowers, path, with_modules=True
            )  # before trying out anything in another's store
        if not want.read_only:
            if locked >= 0:
                copy_detection.enter(locked, root)
                stack.callback(copy_detection.leave, locked)
            header = _prepare(first, found, header)
    except OSError as error:
        raise StoreError(*_explain(path, error)) from None
    finally:
        first.close()
    layer = make_layer(privileged=privileged or header.xattrs == TRUSTED)
    stack.callback(layer.close)
    owners = into(header.owners)
    if owners is not None and isinstance(directory := written_through(layer), DirectoryLayer):
        directory.show_owners(owners.owner)
    try:
        if not want.read_only:
            layout.probe(layer, layout.find(layer, layout.WORK), header.xattrs.encode())
        store = finish(kind, path, layer, header, want, stack)
    except OSError as error:
        raise StoreError(*_explain(path, error)) from None
    store.locked = locked
    return store


def _lock(layer: UpperLayer, root: int, path: str, want: Wanted, stack: ExitStack) -> int:
    """Lock the store, and refuse a copy of one that was in use; return the locked descriptor, or -1."""
    fd = layout.open_lock(layer, make=not want.read_only)
    if fd is None:  # the content of an image was copied
        return -1
    stack.callback(os.close, fd)
    lock.lock(fd, path, shared=want.read_only, progress=want.progress)
    if copy_detection.was_copied_in_use(fd, root):
        if not want.read_only:
            raise copy_detection.torn_copy(path)
        want.progress(copy_detection.torn_copy(path).message)
    return fd


def _prepare(layer: UpperLayer, found: str, header: Header) -> Header:
    """Make the directory a store, or prepare an existing one for writing; return its header."""
    if found != "store":
        return layout.initialise(layer, header)
    layout.ensure_directory(layer, layer.root, layout.WORK, 0o755)
    return layout.renew_mark(layer, header)


def _header(layer: UpperLayer, found: str) -> Header:
    """Return the existing header, or a new one."""
    if found == "store":
        header = layout.load_header(layer)
        if header.xattrs == TRUSTED and not is_trusted():
            raise StoreError(
                f"{layer.name}: the store was created by root, and only root can read its whiteouts",
                "run this as root",
            )
        return header
    xattrs = TRUSTED if is_trusted() else USER
    if found == "overlayfs" and _has_user_xattrs(layer):
        xattrs = USER
    return new_header(xattrs=xattrs, adopted=found == "overlayfs", whiteouts=layout.whiteouts_of(layer))


def sees_all(layer: UpperLayer, header: Header) -> bool:
    """Whether this process may see the overlay's attributes in a store."""
    return header.xattrs != TRUSTED or not isinstance(written_through(layer), DirectoryLayer) or is_trusted()


def is_trusted() -> bool:
    """Whether this process may use trusted.* attributes.

    That requires CAP_SYS_ADMIN outside of a user namespace.
    """
    if os.geteuid() != 0:
        return False
    with open("/proc/self/uid_map") as uid_map, open("/proc/self/status") as status:
        whole = uid_map.read().split() == ["0", "0", "4294967295"]
        capabilities = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    return whole and bool(capabilities >> 21 & 1)


def _has_user_xattrs(layer: UpperLayer) -> bool:
    """Whether the kernel wrote this tree with the mount option userxattr."""
    for path in ((layout.UPPER,), (layout.WORK, b"index")):
        key = layout.find(layer, *path)
        if key is not None and any(name.startswith(USER.encode()) for name in layer.listxattr(key)):
            return True
    return False


def _explain(path: str, error: OSError) -> tuple[str, str]:
    if error.errno == errno.EROFS:
        return f"{path}: is on read-only media", "copy it with cp -a to a writable disk"
    if error.errno in {errno.EACCES, errno.EPERM}:
        return f"{path}: no permission to use it as a store", "a store must belong to the user who mounts it"
    return f"{path}: cannot be used as a store: {error.strerror}", ""
