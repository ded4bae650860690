"""The layout of a store's root, read and written through a layer.

::

    upper/              the changes; the kernel's overlayfs takes it as upperdir
    work/               its workdir:
        work/           temporaries; empty while the store is not open
        index/          copied-up hard links, named by the file handle of their lower
    cowfs/header.json   see cowfs.store.format.header
    cowfs/layers/       see cowfs.store.format.checkpoints
    cowfs/header.rebased   see cowfs.store.format.rebased
    cowfs/blame         see cowfs.store.format.records
    cowfs/lock          directory stores only: the lock file
    cowfs/mark.*/       see cowfs.store.format.mark
    lost+found/         images only: e2fsck's
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

from cowfs.errors import StoreError
from cowfs.layers import acl
from cowfs.layers.base import Key, LowerLayer, UpperLayer
from cowfs.layers.directory import DirectoryLayer
from cowfs.overlay import aufs
from cowfs.overlay.aufs import AufsStore, written_through
from cowfs.store.format import mark
from cowfs.store.format.conversion import refuse_begun
from cowfs.store.format.foreign import refusal
from cowfs.store.format.header import (
    AUFS,
    OVERLAYFS,
    TRUSTED,
    WITH_LAYERS,
    Header,
    from_json,
    new_header,
    to_json,
)
from cowfs.types import Attr, DirEntry

UPPER, WORK, PRIVATE, INDEX = b"upper", b"work", b"cowfs", b"index"
TRASH = b"trash"
"""In PRIVATE: reverted changes."""
LINKS = b"links"
"""In PRIVATE: the index of inodes that cannot have user.* attributes."""
HEADER, LOCK = b"header.json", b"lock"
_NEW_HEADER = b"header.json.new"
REBASED, IS_REBASED = b"header.rebased", b"cowfs.rebased"
"""See cowfs.store.format.rebased."""
BLAME, NEW_BLAME = b"blame", b"blame.new"
MADE_BY = "cowfs mount --store DIR creates one in an empty directory"
_LOST = b"lost+found"
_LARGEST_HEADER = 1 << 20


def find(layer: UpperLayer, *path: bytes) -> Key | None:
    """Return the key at a path from the root; None if there is none. Blocks."""
    key = layer.root
    for name in path:
        found = layer.lookup(key, name)
        if found is None:
            return None
        key = found[0]
    return key


def as_store(layer: UpperLayer) -> UpperLayer:
    """Return a layer that shows a filesystem as a store: a translating one if the format is that of aufs.
    Blocks."""
    names = {entry.name for entry in layer.readdir(layer.root)}
    if aufs.sign_of(names) is None:
        return layer
    refuse_begun(layer)
    if find_header(layer) is not None:
        return layer
    return AufsStore(layer)


def refuse_mixed(layer: UpperLayer) -> None:
    """StoreError if aufs has written to the root of a store with the format of overlayfs. Blocks."""
    sign = None
    if not isinstance(layer, AufsStore):
        sign = aufs.sign_of(entry.name for entry in layer.readdir(layer.root))
    if sign is not None:
        raise StoreError(
            f"{layer.name}: a store of overlayfs, and aufs has written to it, too ({os.fsdecode(sign)})",
            "copy it first; then move your files into upper/, and remove the rest",
        )


def whiteouts_of(layer: UpperLayer) -> str:
    """Return the format of a store: ``aufs`` or ``overlayfs``."""
    return AUFS if isinstance(layer, AufsStore) else OVERLAYFS


def recognise(layer: UpperLayer) -> str:
    """Return what the root contains: ``store``, ``overlayfs`` or ``nothing``. Blocks.

    ``overlayfs`` means upper/ and work/ alone, or files of aufs. StoreError for everything else.
    """
    names = {entry.name for entry in layer.readdir(layer.root)} - {_LOST}
    refuse_mixed(layer)
    if find(layer, PRIVATE, HEADER) is not None and {UPPER, WORK} <= names:
        return "store"
    # Without a header, it is not cowfs's yet, or its creation was interrupted before the header was written.
    if isinstance(layer, AufsStore):
        return "overlayfs"
    private = find(layer, PRIVATE)
    ours = private is not None and all(_is_of_ours(entry.name) for entry in layer.readdir(private))
    rest = names - {PRIVATE} if ours else names
    if not rest:
        return "nothing"
    if ours and rest <= {UPPER, WORK} and all(_is_empty(layer, name) for name in rest):
        return "nothing"
    if rest == {UPPER, WORK}:
        return "overlayfs"
    foreign = sorted(names - {UPPER, WORK, PRIVATE})
    if not foreign:
        missing = sorted({UPPER, WORK, PRIVATE} - names) or [PRIVATE + b"/" + HEADER]
        raise StoreError(f"{layer.name}: an incomplete store: {os.fsdecode(missing[0])} is missing", MADE_BY)
    refused = refusal(layer, names)
    if refused is not None:
        raise refused
    others = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
    raise StoreError(
        f"{layer.name}: not a store: it contains {os.fsdecode(foreign[0])}{others}",
        "give a store; or, for a new one, an empty or missing directory",
    )


def _is_of_ours(name: bytes) -> bool:
    """Whether a name may be in cowfs/ without the header: it is created before it, or removed after it."""
    return name in {LOCK, _NEW_HEADER, BLAME, NEW_BLAME} or name.startswith(mark.PREFIX)


def _is_empty(layer: UpperLayer, name: bytes) -> bool:
    key = find(layer, name)
    return key is not None and not layer.readdir(key)


def initialise(layer: UpperLayer, header: Header) -> Header:
    """Make upper/, work/ and then the header, which makes it a store. Return the header. Blocks.

    cowfs/ is made first: if this is interrupted, it shows that the empty directories beside it are cowfs's.
    """
    ensure_directory(layer, layer.root, PRIVATE, 0o755)
    ensure_directory(layer, layer.root, UPPER, 0o755)
    ensure_directory(layer, layer.root, WORK, 0o755)
    header = make_mark(layer, header)
    save_header(layer, header)
    layer.sync()
    return header


def make_mark(layer: UpperLayer, header: Header) -> Header:
    """Make a new mark; return the header with it. Blocks."""
    private = ensure_directory(layer, layer.root, PRIVATE, 0o755)
    return replace(header, mark=mark.make(layer, private, header.xattrs, owner(layer)))


def renew_mark(layer: UpperLayer, header: Header) -> Header:
    """Replace the mark of a store, if there is space for one; return the header. Blocks.

    If this is interrupted, header and mark still belong together. The store of another user is left alone.
    """
    with suppress(OSError):
        found = layer.lookup(layer.root, PRIVATE)
        if found is None or found[1].st_uid != owner(layer)[0]:
            return header
        marked = make_mark(layer, header)
        if marked.mark is None or not set(header.mark.keeps if header.mark else ()) <= set(marked.mark.keeps):
            return header
        save_header(layer, marked)
        private = find(layer, PRIVATE)
        for entry in layer.readdir(private):
            old = directory_of(layer, private, entry) if entry.name.startswith(mark.PREFIX) else None
            if old is not None and entry.name != marked.mark.name.encode():
                empty(layer, old)
                layer.rmdir(private, entry.name, None)
        return marked
    return header


def refuse_lossy_copy(layer: UpperLayer, header: Header, *, sees_all: bool = True) -> None:
    """StoreError, with what is lost, if the store is an incomplete copy. Blocks.

    Without *sees_all*, attributes that only root sees are not checked.
    """
    if header.mark is None:
        return
    private = find(layer, PRIVATE)
    there = mark.held(layer, private, header.mark.name, header.xattrs)
    if not sees_all:
        there.add("xattrs")
    lost = [called for what, called in mark.CALLED.items() if what in header.mark.keeps and what not in there]
    if not lost:
        return
    raise StoreError(
        f"{layer.name}: a copy without the {_listed(lost)} of the store; its files would be wrong",
        "use the store itself, or copy it again with " + (_WAYS if header.xattrs == TRUSTED else _USERS_WAYS),
    )


_WAYS = "cp -a, rsync -aHAX --numeric-ids, or tar -p --acls --xattrs --xattrs-include='*', as root"
_USERS_WAYS = "cp -a, or tar -p --acls --xattrs"


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def ensure_directory(layer: UpperLayer, parent: Key, name: bytes, mode: int) -> Key:
    """Return the directory *name*; create it if it is missing. Blocks."""
    found = layer.lookup(parent, name)
    if found is None:
        made = layer.mkdir(parent, name, mode, *owner(layer))
        if drop_inherited(layer, made, acl.DEFAULT) + drop_inherited(layer, made, acl.ACCESS):
            layer.chmod(made, mode)
        return made
    key, attr = found
    if not stat.S_ISDIR(attr.st_mode):
        raise StoreError(f"{layer.name}: not a store: {os.fsdecode(name)} is not a directory", MADE_BY)
    _unshut(layer, key, attr)
    return key


def drop_inherited(layer: UpperLayer, directory: Key, name: bytes) -> bool:
    """Remove an inherited ACL from one of cowfs's directories; return whether it had one. Blocks.

    The kernel's overlayfs does the same: files made in work/ and moved to upper/ would inherit it too.
    """
    try:
        layer.removexattr(directory, name)
    except OSError:  # no ACL, or a filesystem without ACLs
        return False
    return True


def unshut_work(layer: UpperLayer, work: Key) -> None:
    """Make work/work and work/index accessible: the kernel's overlayfs creates them with mode 0. Blocks."""
    for name in (WORK, INDEX):
        found = layer.lookup(work, name)
        if found is not None and stat.S_ISDIR(found[1].st_mode):
            _unshut(layer, *found)


def _unshut(layer: UpperLayer, directory: Key, attr: Attr) -> None:
    if (
        attr.st_mode & 0o700 != 0o700
        and os.geteuid() != 0
        and isinstance(written_through(layer), DirectoryLayer)
    ):
        layer.chmod(directory, attr.st_mode | 0o700)


def owner(layer: UpperLayer) -> tuple[int, int]:
    """Return the owner of cowfs's part of a store; in an image that cowfs reads itself, root."""
    return (os.geteuid(), os.getegid()) if isinstance(written_through(layer), DirectoryLayer) else (0, 0)


def find_header(layer: UpperLayer) -> Header | None:
    """Read the header; None if there is none. Blocks. StoreError if it is damaged or of a newer version."""
    header = _read_header(layer, HEADER)
    upper = None if header is None else find(layer, UPPER)
    if header is None or upper is None:
        return header
    try:
        layer.getxattr(upper, header.xattrs.encode() + IS_REBASED)
    except OSError:
        return header
    pending = pending_header(layer)
    if pending is None:
        return header
    return replace(header, lowers=pending.lowers, version=max(header.version, WITH_LAYERS))


def pending_header(layer: UpperLayer) -> Header | None:
    """Read the header of an upper with other lowers (cowfs.store.format.rebased); None if there is none.
    Blocks."""
    return _read_header(layer, REBASED)


def _read_header(layer: UpperLayer, name: bytes) -> Header | None:
    private = find(layer, PRIVATE)
    found = None if private is None else layer.lookup(private, name)
    if found is None:
        return None
    key, attr = found
    if not stat.S_ISREG(attr.st_mode):  # opening a fifo would block
        raise StoreError(
            f"{layer.name}: cowfs/{os.fsdecode(name)} is not a regular file", "the store is damaged"
        )
    with closing(layer.open(key, os.O_RDONLY)) as file:
        header = from_json(file.pread(_LARGEST_HEADER, 0), layer.name)
    if header.whiteouts != whiteouts_of(layer):
        raise StoreError(
            f"{layer.name}: the header is of a store in the {header.whiteouts} format, and this is one in the"
            f" {whiteouts_of(layer)} format",
            "copy it before you do anything",
        )
    return header


def load_header(layer: UpperLayer) -> Header:
    """Read the header; return a new one if there is none. Blocks. StoreError as find_header()."""
    return find_header(layer) or new_header()


def open_lock(layer: UpperLayer, *, make: bool = False) -> int | None:
    """Open the lock file of a directory store, read-only unless *make*. Blocks.

    With *make*, create a missing one; otherwise return None. StoreError if it is not a regular file.
    """
    private: Any = ensure_directory(layer, layer.root, PRIVATE, 0o755) if make else find(layer, PRIVATE)
    found = None if private is None else layer.lookup(private, LOCK)
    if found is not None and not stat.S_ISREG(found[1].st_mode):
        raise StoreError(f"{layer.name}: cowfs/lock is not a regular file", "the store is damaged")
    if found is None and not make:
        return None
    if found is None:
        try:
            _, file = layer.create(private, LOCK, 0o600, os.geteuid(), os.getegid())
        except FileExistsError:  # another process has just created it
            return open_lock(layer, make=True)
    else:
        file = layer.open(found[0], os.O_RDWR if make else os.O_RDONLY)
    with closing(file):
        return os.dup(file.fileno())


def save_header(layer: UpperLayer, header: Header, root: Key | None = None) -> None:
    """Replace the header atomically, in the store at the root or at *root*. Blocks. layer.sync() puts it on
    disk.
    """
    uid, gid = owner(layer)
    private = ensure_directory(layer, layer.root if root is None else root, PRIVATE, 0o755)
    if layer.lookup(private, _NEW_HEADER) is not None:
        layer.unlink(private, _NEW_HEADER, None)
    key, file = layer.create(private, _NEW_HEADER, 0o644, uid, gid)
    try:
        file.pwrite(to_json(header), 0)
        file.fsync(False)
    finally:
        file.close()
    layer.rename((private, _NEW_HEADER), (private, HEADER), moved=key)


def empty(layer: UpperLayer, directory: Key) -> None:
    """Remove everything below a directory, of any depth and with any modes. Blocks."""
    for _ in emptying(layer, directory):
        pass


def emptying(
    layer: UpperLayer, directory: Key, leaves: Callable[[tuple[Key, bytes]], object] = lambda _: None
) -> Iterator[None]:
    """Remove everything below a directory in steps; yield after each.

    *leaves* is called with each entry that is not a directory before it is removed.
    """
    stack: list[tuple[Key, Key, bytes, list[DirEntry]]] = [(directory, None, b"", layer.readdir(directory))]
    while stack:
        yield
        key, parent, name, entries = stack[-1]
        if entries:
            entry = entries.pop()
            below = directory_of(layer, key, entry)
            if below is None:
                leaves((key, entry.name))
                layer.unlink(key, entry.name, None)
            else:
                layer.chmod(below, 0o700)
                stack.append((below, key, entry.name, layer.readdir(below)))
            continue
        stack.pop()
        if parent is not None:
            layer.rmdir(parent, name, None)
            layer.forget(key)


def directory_of(layer: LowerLayer, parent: Key, entry: DirEntry) -> Key | None:
    """Return the key of an entry if it is a directory, else None. Blocks."""
    if entry.type not in {0, stat.S_IFDIR}:
        return None
    found = layer.lookup(parent, entry.name)
    return found[0] if found is not None and stat.S_ISDIR(found[1].st_mode) else None


def probe(layer: UpperLayer, work: Key, prefix: bytes) -> None:
    """StoreError unless the filesystem supports what an overlay needs: xattrs and whiteouts. Blocks."""
    name = b"#cowfs-probe"
    uid, gid = owner(layer)
    what = f"extended attributes ({prefix.decode()}*)"
    try:
        layer.setxattr(work, prefix + b"cowfs.probe", b"y")
        layer.removexattr(work, prefix + b"cowfs.probe")
        what = "whiteouts (character devices 0:0)"
        with suppress(FileNotFoundError):
            layer.unlink(work, name, None)  # left by a process that was killed here
        layer.mknod(work, name, stat.S_IFCHR | 0o600, 0, uid, gid)
        layer.unlink(work, name, None)
    except OSError as error:
        if error.errno in {errno.EROFS, errno.ENOSPC, errno.EDQUOT}:
            raise StoreError(f"{layer.name}: cannot be written to: {error.strerror}") from None
        raise StoreError(
            f"{layer.name}: the filesystem does not support {what}: {error.strerror}",
            "use an image instead; cowfs create can put one on any filesystem",
        ) from None
