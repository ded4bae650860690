"""Add modules to a mounted union, and remove them: for the control socket (ADR 0061)."""

from __future__ import annotations

import base64
import os
import stat
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any

from cowfs.changes.checkpoint import must_be_one, stillness
from cowfs.changes.lowers import must_not_wait
from cowfs.changes.render import escape
from cowfs.errors import LayerError, MountFailure, StoreError, UsageError
from cowfs.formats.squashfs.source import FileBytes
from cowfs.layers.module import ModuleLayer
from cowfs.linux import filesystems
from cowfs.linux.files import LACK_OF_ROOM, fs_magic
from cowfs.overlay import freeze, modules
from cowfs.overlay.uncover import Stale
from cowfs.overlay.xattr_format import TRUSTED, USER
from cowfs.store.format.identity import identify_image
from cowfs.types import Identity
from cowfs.union import Union

Told = Generator[dict[str, Any] | Callable[[], None] | None, None, None]
_SOON = 2.0
"""Seconds in which the kernel has said what it has forgotten."""
_PAUSE = 0.01


def told(union: Union, asked: dict[str, Any], ask_again: Callable[[Stale], None]) -> Told:
    """Do what is *asked*: ``add`` the image ``fd`` with the name ``path``, or ``remove`` it.

    *ask_again* is called, in a thread, with the kernel's stale cache entries. ``mounts`` are the paths of
    mounts in the tree.
    """
    path, mounts = str(asked.get("path")), [base64.b64decode(mount) for mount in asked.get("mounts", ())]
    must_be_one(union.overlay)
    must_not_wait(union.overlay.lowers)
    if union.store.read_only:
        raise UsageError(f"{union.store.path}: is read-only", "mount it without ro")
    try:
        match asked.get("what"):
            case "add":
                yield from _add(union, path, asked.get("fd", -1), mounts, ask_again)
            case "remove":
                yield from _remove(union, path, asked.get("fd", -1), mounts, ask_again)
            case what:
                raise UsageError(f"{what!r}: cannot be done")
    except OSError as error:
        hint = "delete files, or make it larger with cowfs grow" if error.errno in LACK_OF_ROOM else ""
        raise StoreError(f"{union.store.path}: {error.strerror}", hint) from None


def _add(union: Union, path: str, fd: int, mounts: list[bytes], ask_again: Callable[[Stale], None]) -> Told:
    fs, store = union.overlay, union.store
    _must_be_apart(fd, path)
    found = identify_image(fd, path)
    _must_be_new(union, found, path)
    layer = ModuleLayer(path, data=FileBytes(os.dup(fd)))
    is_merged = False
    try:
        yield lambda: _must_only_add(layer, path)
        if freeze.are_hidden(fs):
            yield from freeze.link_all(fs)
        known = [one for one in store.header.modules if one.fingerprint != found.fingerprint]
        store.know_modules([*known, found])
        yield from stillness(fs, with_pending=True)
        _must_be_new(union, found, path)
        for mount in mounts:
            if modules.would_cover(fs, layer, mount):
                raise MountFailure(
                    f"{path}: hides /{escape(mount)}, which is a mountpoint", "unmount that first"
                )
        try:
            number, stale = modules.add(fs, layer)
        except OSError:
            raise MountFailure(
                f"{path}: there are {modules.MOST} modules already", "remove one with cowfs lower remove"
            ) from None
        is_merged = True
    finally:
        if not is_merged:
            layer.close()
    union.modules[number] = found
    yield lambda: ask_again(stale)
    yield {"added": found.path}


def _remove(
    union: Union, path: str, fd: int, mounts: list[bytes], ask_again: Callable[[Stale], None]
) -> Told:
    fs, store = union.overlay, union.store
    number = _number_of(union, path, fd)
    yield from stillness(fs, with_pending=True)
    if number not in fs.loaded:
        raise _is_none(path)
    for mount in mounts:
        if modules.would_lose(fs, number, mount):
            raise MountFailure(f"{path}: has /{escape(mount)}, which is a mountpoint", "unmount that first")
    stale = modules.remove(fs, number)
    gone = union.modules.pop(number)
    yield lambda: ask_again(stale)
    store.know_modules([one for one in store.header.modules if one.fingerprint != gone.fingerprint])
    end = time.monotonic() + _SOON
    while number in fs.left and time.monotonic() < end:
        yield lambda: time.sleep(_PAUSE)
    left = fs.left.get(number, set())
    yield {"removed": gone.path, "in_use": len(left - {node.parent for node in left})}


def _must_be_apart(fd: int, path: str) -> None:
    """LayerError unless it is a file outside FUSE: a read from this mount would wait for the daemon
    itself."""
    if fd < 0 or not stat.S_ISREG(os.fstat(fd).st_mode):
        raise LayerError(f"{path}: is not a squashfs image in a file", "mksquashfs creates one")
    if fs_magic(fd) == filesystems.FUSE:
        raise LayerError(f"{path}: is on a FUSE filesystem, maybe in this mount", "copy it to /run or a disk")


def _must_only_add(layer: ModuleLayer, path: str) -> None:
    """LayerError if an image hides or redirects something below it. Blocks: call it in a thread."""
    waiting = [(layer.root, b"")]
    while waiting:
        directory, above = waiting.pop()
        for entry in layer.readdir(directory):
            found = layer.lookup(directory, entry.name)
            if found is None:
                continue
            key, attr = found
            place = above + b"/" + entry.name
            is_device = stat.S_ISCHR(attr.st_mode) and not attr.st_rdev
            if is_device or entry.name.startswith(b".wh.") or not _MARKS.isdisjoint(layer.listxattr(key)):
                raise LayerError(
                    f"{path}: {escape(place)} changes what is below it, but a module can only add files",
                    "name it above the lower at the mount of a new store",
                )
            if stat.S_ISDIR(attr.st_mode):
                waiting.append((key, place))


_MARKS = frozenset(
    prefix + mark
    for prefix in (TRUSTED, USER)
    for mark in (b"opaque", b"redirect", b"metacopy", b"whiteout", b"whiteouts")
)


def _must_be_new(union: Union, found: Identity, path: str) -> None:
    there = [*union.identities, *union.modules.values()]
    if any(one.fingerprint == found.fingerprint for one in there):
        raise UsageError(f"{path}: is a lower of this mount already")


def _number_of(union: Union, path: str, fd: int) -> int:
    """Return the number of the module that is this image, or else was at this path.

    The file at the path may have been replaced or damaged since then.
    """
    known = union.modules.items()
    with suppress(LayerError):
        found = identify_image(fd, path) if fd >= 0 else None
        for number, one in known:
            if found is not None and one.fingerprint == found.fingerprint:
                return number
    for number, one in known:
        if one.path == path:
            return number
    if any(one.path == path for one in union.identities):
        raise UsageError(
            f"{path}: is a lower that the store belongs to", "only what cowfs lower add added can be removed"
        )
    raise _is_none(path)


def _is_none(path: str) -> UsageError:
    return UsageError(f"{path}: is not a module of this mount", "cowfs info MOUNTPOINT lists them")
