"""Tell about a store without opening it. Needs the permission to read it, nothing more."""

from __future__ import annotations

import os
from typing import Any

from cowfs.errors import StoreError
from cowfs.store import debugfs, lock
from cowfs.store.header import VERSION, Header, from_json
from cowfs.store.image import open_file
from cowfs.store.superblock import read_superblock


def store_info(spec: str) -> dict[str, Any]:
    """Return what a store tells about itself: a dictionary that JSON can hold. Blocks for reading.

    Keys: ``path kind size used free inodes free_inodes state format version created created_by uuid
    lowers in_use_by``. Sizes are bytes; what is not known is None. A directory's *size*, *free* and inodes
    are those of the filesystem that it is on, so its *used* is not known. *format* is ``overlayfs``,
    ``aufs``, ``none yet`` (an empty filesystem) or ``foreign``; *state* that of the filesystem, which is
    ``in use`` while it is mounted. Raises StoreError if *spec* cannot be read or is no store at all.
    """
    path = os.path.abspath(spec)
    return _directory(path) if os.path.isdir(path) else _image(path)


def _image(path: str) -> dict[str, Any]:
    fd = open_file(path, read_only=True)
    try:
        superblock = read_superblock(fd, path, smallest=0)
        names = debugfs.names(fd)
        content = debugfs.read_file(fd, "cowfs/header.json") if b"cowfs" in names else b""
    finally:
        os.close(fd)
    user = lock.holder(path)
    return {
        "path": path,
        "kind": "image",
        "size": superblock.size,
        "used": (superblock.blocks - superblock.free_blocks) * superblock.block_size,
        "free": superblock.free_blocks * superblock.block_size,
        "inodes": superblock.inodes,
        "free_inodes": superblock.free_inodes,
        "state": "in use" if user else superblock.state,
        "format": _format(names),
        **_facts(from_json(content, path) if content else None),
        "in_use_by": user,
    }


def _directory(path: str) -> dict[str, Any]:
    header_path, lock_path = (os.path.join(path, "cowfs", name) for name in ("header.json", "lock"))
    try:
        names = {os.fsencode(name) for name in os.listdir(path)}
        room = os.statvfs(path)
        content = b""
        if os.path.exists(header_path):
            with open(header_path, "rb") as file:
                content = file.read()
        user = lock.holder(lock_path) if os.path.exists(lock_path) else None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from None
    if not content and not {b"upper", b"work"} <= names:
        raise StoreError(f"{path}: not a store", "cowfs mount --store DIR makes one in an empty directory")
    return {
        "path": path,
        "kind": "directory",
        "size": room.f_blocks * room.f_frsize,
        "used": None,
        "free": (room.f_bfree if os.geteuid() == 0 else room.f_bavail) * room.f_frsize,  # as Store.free
        "inodes": room.f_files,
        "free_inodes": room.f_ffree,
        "state": "in use" if user else "clean",
        "format": _format(names),
        **_facts(from_json(content, path) if content else None),
        "in_use_by": user,
    }


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
