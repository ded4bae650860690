"""Tell about a store without opening it. Needs the permission to read it, nothing more."""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from typing import Any

from cowfs.errors import StoreError, SystemFailure
from cowfs.layers.base import UpperLayer
from cowfs.layers.directory import DirectoryLayer
from cowfs.overlay import partial
from cowfs.store import layout, lock, place, tools
from cowfs.store.directory import sees_all
from cowfs.store.header import VERSION, Header
from cowfs.store.image import open_file, open_layer
from cowfs.store.superblock import read_superblock


def store_info(spec: str) -> dict[str, Any]:
    """Return what a store tells about itself: a dictionary that JSON can hold. Blocks for reading.

    Keys: ``path kind size used free inodes free_inodes state format version created created_by uuid
    lowers in_use_by problem partial``. Sizes are bytes; what is not known is None. A directory's *size*,
    *free* and inodes are those of the filesystem that it is on, so its *used* is not known. *format* is
    ``overlayfs``, ``aufs``, ``none yet`` (an empty filesystem) or ``foreign``; *state* that of the
    filesystem, which is ``in use`` while it is mounted. What the journal of an image holds counts as if it
    had been replayed. *problem* says why what is in it cannot be told. *partial* has how many ``files`` are
    copied up in part, and how many ``bytes`` of them are missing. Raises StoreError if *spec* cannot be read
    or is no store at all.
    """
    path = os.path.abspath(spec)
    with ExitStack() as stack:
        try:
            return _directory(path, stack) if os.path.isdir(path) else _image(path, stack)
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {error.strerror}") from None


def _image(path: str, stack: ExitStack) -> dict[str, Any]:
    fd = open_file(path, read_only=True)
    stack.callback(os.close, fd)
    superblock = read_superblock(fd, path, smallest=0)
    user = lock.holder(tools.place(fd))
    free, free_inodes = superblock.free_blocks, superblock.free_inodes
    inside: dict[str, Any] = {"format": None, **_facts(None), "problem": None, "partial": None}
    try:
        layer = open_layer(fd, path, stack, read_only=True)
        layer.readdir(layer.root)
    except (OSError, StoreError, SystemFailure) as error:
        inside["problem"] = "it is being changed just now" if user else str(error)
    else:
        inside = _inside(layer)
        if superblock.needs_recovery and not user and place.is_copy(layer, fd):
            inside["problem"] = str(place.torn(path))
        facts = layer.image.facts()
        free, free_inodes = facts.free_blocks, facts.free_inodes
    return {
        "path": path,
        "kind": "image",
        "size": superblock.size,
        "used": (superblock.blocks - free) * superblock.block_size,
        "free": free * superblock.block_size,
        "inodes": superblock.inodes,
        "free_inodes": free_inodes,
        "state": "in use" if user else superblock.state,
        **inside,
        "in_use_by": user,
    }


def _was_copied_in_use(layer: DirectoryLayer) -> bool:
    with suppress(OSError):  # only its owner may read the lock file
        fd = layout.open_lock(layer)
        if fd is not None:
            try:
                return place.was_copied_in_use(fd, layer.root.fd)
            finally:
                os.close(fd)
    return False


def _directory(path: str, stack: ExitStack) -> dict[str, Any]:
    layer = DirectoryLayer(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), path)
    stack.callback(layer.close)
    inside = _inside(layer)
    if inside["version"] is None and inside["format"] != "overlayfs":
        raise StoreError(f"{path}: not a store", layout.MADE_BY)
    room = layer.statfs()
    user = None
    locked: Any = layout.find(layer, layout.PRIVATE, layout.LOCK)
    if locked is not None:
        fd = layer.descriptor(locked)
        stack.callback(os.close, fd)
        user = lock.holder(tools.place(fd))
        if user:
            inside["problem"] = None  # its mark is being made anew
        elif _was_copied_in_use(layer):
            inside["problem"] = str(place.torn(path))
    return {
        "path": path,
        "kind": "directory",
        "size": room.blocks * room.frsize,
        "used": None,
        "free": (room.bfree if os.geteuid() == 0 else room.bavail) * room.frsize,  # as Store.free
        "inodes": room.files,
        "free_inodes": room.ffree,
        "state": "in use" if user else "clean",
        **inside,
        "in_use_by": user,
    }


def _inside(layer: UpperLayer) -> dict[str, Any]:
    """Return what is known from the names at the root and from the header."""
    names = {entry.name for entry in layer.readdir(layer.root)}
    header = layout.find_header(layer)
    problem = None
    try:
        if header is not None:
            layout.refuse_lossy_copy(layer, header, sees_all=sees_all(layer, header))
    except StoreError as error:
        problem = str(error)
    missing = None if header is None else _missing(layer, header)
    return {"format": _format(names), **_facts(header), "problem": problem, "partial": missing}


def _missing(layer: UpperLayer, header: Header) -> dict[str, int]:
    """Return how many files are copied up in part, and about how much of them is in the lower alone."""
    files = size = 0
    prefix = header.xattrs.encode()
    name = prefix + b"cowfs.partial"
    for ino in partial.listed(layer, layout.find(layer, layout.PRIVATE), name):
        with suppress(OSError):  # it is whole by now, or another
            key = layer.numbered(ino)
            layer.getxattr(key, prefix + b"metacopy")
            end = partial.decode(layer.getxattr(key, name)).end
            size += max(end - layer.stat(key).st_blocks * 512, 0)
            files += 1
    return {"files": files, "bytes": size}


def _format(names: set[bytes]) -> str:
    if any(name.startswith(b".wh..wh.") for name in names):
        return "aufs"
    if {b"upper", b"work"} <= names:
        return "overlayfs"
    return "foreign" if names - {b"lost+found", b"cowfs"} else "none yet"


def _facts(header: Header | None) -> dict[str, Any]:
    """Return what the header tells; all None where there is none."""
    if header is None:
        return dict.fromkeys(("version", "created", "created_by", "uuid"), None) | {"lowers": []}
    return {
        "version": VERSION,
        "created": header.created,
        "created_by": header.created_by,
        "uuid": header.uuid,
        "lowers": [
            {
                "kind": low.kind,
                "path": low.path,
                "description": low.description,
                "fingerprint": low.fingerprint,
            }
            for low in header.lowers
        ],
    }
