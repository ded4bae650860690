"""Describe a store without opening it for use. Needs only permission to read it."""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack, suppress
from typing import Any

from cowfs.errors import StoreError, SystemFailure
from cowfs.layers.base import UpperLayer
from cowfs.overlay import aufs, partial
from cowfs.overlay.xattr_format import XattrFormat, parse_partial
from cowfs.store.e2fsprogs import tools
from cowfs.store.format import conversion, copy_detection, layout
from cowfs.store.format.checkpoints import Layers, listed
from cowfs.store.format.header import WITH_LAYERS, Header
from cowfs.store.format.sniff import is_subdir_name, not_a_store, split_subdir
from cowfs.store.format.superblock import read_superblock
from cowfs.store.served import lock
from cowfs.store.served.directory import open_to_look, sees_all
from cowfs.store.served.image import open_file, open_layer, within


def store_info(spec: str) -> dict[str, Any]:
    """Return the facts about a store as an object for JSON. Blocks.

    Keys: ``path kind size used free inodes free_inodes state format version created created_by uuid lowers
    in_use_by problem partial xattr_prefix layers checkpoints fresh stores``. Sizes are in bytes; unknown
    values are None. *used* is what ``df`` says of a mount: without the filesystem's own tables. A
    directory's *size*, *free* and inodes are those of its filesystem, so its *used* is unknown. *format*
    is ``overlayfs``, ``aufs``, ``mixed`` (both, which cannot be used), ``converting``
    (cowfs.store.format.conversion), ``none yet`` (an empty filesystem) or ``foreign``. *state* is that of
    the filesystem; it is ``in use`` while mounted. An image is described as if its journal had been
    replayed. *problem* says why the contents are unknown. *partial* has the number of partial ``files``,
    and the number of ``bytes`` missing in them. *layers* are the numbers of the checkpoints' layers below
    the upper, *checkpoints* their names, and *fresh* says whether a crash interrupted the making of one.
    *stores* are the names of the stores in the image (``-o subdir=``). StoreError if *spec* cannot be
    read or is not a store.
    """
    path = os.path.abspath(spec)
    with ExitStack() as stack:
        try:
            return _directory(path, stack) if os.path.isdir(path) else _image(path, stack)
        except OSError as error:
            raise StoreError(
                f"{path}: cannot be read: {error.strerror}", "run this as its owner, or check its disk"
            ) from None


def _image(path: str, stack: ExitStack) -> dict[str, Any]:
    image, name = split_subdir(path)
    fd = open_file(image, read_only=True)
    stack.callback(os.close, fd)
    superblock = read_superblock(fd, path, smallest=0)
    user = lock.holder(tools.place(fd))
    free, free_inodes, overhead = superblock.free_blocks, superblock.free_inodes, 0
    inside: dict[str, Any] = {"format": None, **_facts(None), "problem": None, "partial": None}
    inside |= _layers(None, None)
    try:
        layer = open_layer(fd, path, stack, read_only=True)
        layer.readdir(layer.root)
    except (OSError, StoreError, SystemFailure) as error:
        inside["problem"] = "it is being changed right now" if user else str(error)
    else:
        whole = _as_store(layer)
        copied = superblock.needs_recovery and not user and copy_detection.is_copy(whole, fd)
        inside = _inside(_as_store(within(whole, name, path, stack, read_only=True)))
        if copied:
            inside["problem"] = str(copy_detection.torn_copy(path))
        facts = layer.image.facts()
        free, free_inodes, overhead = facts.free_blocks, facts.free_inodes, facts.overhead
    return {
        "path": path,
        "kind": "image",
        "size": superblock.size,
        "used": (superblock.blocks - overhead - free) * superblock.block_size,
        "free": free * superblock.block_size,
        "inodes": superblock.inodes,
        "free_inodes": free_inodes,
        "state": "in use" if user else superblock.state,
        **inside,
        "in_use_by": user,
    }


def _was_copied_in_use(layer: UpperLayer, directory: int) -> bool:
    with suppress(OSError):  # only the owner can read the lock file
        fd = layout.open_lock(layer)
        if fd is not None:
            try:
                return copy_detection.was_copied_in_use(fd, directory)
            finally:
                os.close(fd)
    return False


def _directory(path: str, stack: ExitStack) -> dict[str, Any]:
    directory, root, _ = open_to_look(path, stack)
    layer = _as_store(directory)
    inside = _inside(layer)
    if inside["version"] is None and inside["format"] not in {"overlayfs", "aufs", "converting"}:
        raise not_a_store(path)
    room = layer.statfs()
    user = None
    locked: Any = layout.find(layer, layout.PRIVATE, layout.LOCK)
    if locked is not None:
        fd = directory.descriptor(locked)
        stack.callback(os.close, fd)
        user = lock.holder(tools.place(fd))
        if user:
            inside["problem"] = None  # its mark is being renewed
        elif _was_copied_in_use(layer, root):
            inside["problem"] = str(copy_detection.torn_copy(path))
    return {
        "path": path,
        "kind": "directory",
        "size": room.blocks * room.frsize,
        "used": None,
        "free": (room.bfree if os.geteuid() == 0 else room.bavail) * room.frsize,  # as in Store.free
        "inodes": room.files,
        "free_inodes": room.ffree,
        "state": "in use" if user else "clean",
        **inside,
        "in_use_by": user,
    }


def _as_store(layer: UpperLayer) -> UpperLayer:
    return layer if conversion.begun(layer) else layout.as_store(layer)


def _inside(layer: UpperLayer) -> dict[str, Any]:
    """Return the facts shown by the names in the root and by the header."""
    begun = conversion.interrupted(layer)
    if begun is not None:
        said = {"format": "converting", **_facts(None), "problem": str(begun), "partial": None}
        return said | _layers(None, None)
    names = {entry.name for entry in layer.readdir(layer.root)}
    header = layout.find_header(layer)
    problem = None
    try:
        layout.refuse_mixed(layer)
        if header is not None:
            layout.refuse_lossy_copy(layer, header, sees_all=sees_all(layer, header))
    except StoreError as error:
        problem = str(error)
    missing = None if header is None else _missing(layer, header)
    return {
        "format": _format(layer, names),
        **_facts(header),
        "problem": problem,
        "partial": missing,
    } | _layers(layer, header)


def _layers(layer: UpperLayer | None, header: Header | None) -> dict[str, Any]:
    """Return the facts about checkpoints."""
    told: dict[str, Any] = {"xattr_prefix": None, "layers": [], "checkpoints": [], "fresh": False}
    told["stores"] = [] if layer is None or isinstance(layer, aufs.AufsStore) else _stores(layer)
    upper = None if layer is None else layout.find(layer, layout.UPPER)
    if layer is None or header is None or upper is None:
        return told
    told["xattr_prefix"] = header.xattrs
    if header.version >= WITH_LAYERS:
        layers = Layers(layer, header.xattrs.encode())
        told["layers"] = list(layers.below(upper))
        told["checkpoints"] = [one["name"] for one in listed(layers, upper)]
        told["fresh"] = layers.is_fresh(upper)
    return told


def _stores(layer: UpperLayer) -> list[str]:
    """Return the names of the stores in an image."""
    names = []
    for entry in layer.readdir(layer.root):
        name = os.fsdecode(entry.name)
        found = layer.lookup(layer.root, entry.name) if is_subdir_name(name) else None
        if found is None or not stat.S_ISDIR(found[1].st_mode):
            continue
        private = layer.lookup(found[0], layout.PRIVATE)
        if private is not None and stat.S_ISDIR(private[1].st_mode):
            names += [name] if layer.lookup(private[0], layout.HEADER) is not None else []
    return sorted(names)


def _missing(layer: UpperLayer, header: Header) -> dict[str, int]:
    """Return the number of partial files, and about how many bytes of them are only in the lower."""
    files = size = 0
    xattrs = XattrFormat(header.xattrs.encode())
    for ino in partial.listed(layer, layout.find(layer, layout.PRIVATE), xattrs.partial):
        with suppress(OSError):  # completed or replaced meanwhile
            key = layer.numbered(ino)
            layer.getxattr(key, xattrs.metacopy)
            end = parse_partial(layer.getxattr(key, xattrs.partial)).end
            size += max(end - layer.stat(key).st_blocks * 512, 0)
            files += 1
    return {"files": files, "bytes": size}


def _format(layer: UpperLayer, names: set[bytes]) -> str:
    if layout.whiteouts_of(layer) == "aufs":
        return "aufs"
    if aufs.sign_of(names) is not None:
        return "mixed"
    if {b"upper", b"work"} <= names:
        return "overlayfs"
    return "foreign" if names - {b"lost+found", b"cowfs"} else "none yet"


def _facts(header: Header | None) -> dict[str, Any]:
    """Return the facts in the header; all None if there is none."""
    if header is None:
        return dict.fromkeys(("version", "created", "created_by", "uuid"), None) | {
            "lowers": [],
            "volatile": [],
        }
    return {
        "version": header.version,
        "created": header.created,
        "created_by": header.created_by,
        "uuid": header.uuid,
        "volatile": list(header.volatile),
        "lowers": [
            {
                "kind": low.kind,
                "path": low.path,
                "description": low.description,
                "fingerprint": low.fingerprint,
                "offset": low.offset,
            }
            for low in header.lowers
        ],
    }
