"""From what the user asked for to a union that is ready to be mounted."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any, TypeVar

import cowfs
from cowfs.errors import CowfsError, LayerError, MountFailure, StoreError, SystemFailure
from cowfs.formats.squashfs.image import open_image
from cowfs.fuse.control import Replies
from cowfs.layers.base import Cached, LowerLayer
from cowfs.layers.directory import DirectoryLayer
from cowfs.layers.shared_directory import SharedDirectoryLayer
from cowfs.layers.slow import SlowLayer
from cowfs.layers.squashfs import SquashfsLayer
from cowfs.linux.files import LACK_OF_ROOM, fs_magic
from cowfs.linux.mounts import attach_loop, detached_mount, mount_of, where_is
from cowfs.linux.remote import may_wait
from cowfs.overlay import rest
from cowfs.overlay.copyup import copy_xattrs
from cowfs.overlay.overlay import Overlay
from cowfs.overlay.state import OverlayOptions
from cowfs.store import room, saving
from cowfs.store.identity import identify_lower
from cowfs.store.open import open_store
from cowfs.store.store import Store
from cowfs.types import Change, Identity

Progress = Callable[[str], None]
R = TypeVar("R")
_PATIENCE = 60.0
"""Seconds."""
log = logging.getLogger(__name__)
_TMPFS = 0x01021994


@dataclass(frozen=True, slots=True)
class UnionOptions:
    """What a union is made of."""

    lowers: tuple[str, ...]
    """Images or directories, the first on top."""
    store: str = "memory"
    """An image, a directory, or ``memory``."""
    engine: str = "auto"
    """Who reads and writes images: ``kernel`` (needs root), or ``process``, which ``auto`` is too."""
    force_lower: bool = False
    """Use the store even if it was made for another lower."""
    size: int | None = None
    """Of a store in memory, in bytes."""
    offsets: tuple[int, ...] = ()
    """Where in its file each lower image begins, in bytes; those that are left out at 0."""
    fakeroot: bool = False
    """Let the store hold all owners and devices, though we have no privilege."""


@dataclass(slots=True)
class Union:
    """An open union; :meth:`close` releases all of it."""

    options: UnionOptions
    identities: list[Identity]
    store: Store
    overlay: Overlay
    release: ExitStack
    since: float
    may_be_lost: bool = False
    """Whether the user has said so of what cannot be written."""
    farewell: int = -1
    """A descriptor of who wants to hear how the release went, if anybody does."""

    def close(self, *, heeds_signals: bool = False) -> None:
        """Write everything back and release the store and the layers. Blocks.

        While the disk has no room for it a minute is waited for some, unless it has been said that it may be
        lost, or a signal asks once more to end, if it *heeds_signals* (which are held back).
        """
        try:
            if not self.store.read_only and not self.may_be_lost:
                self._save(heeds_signals)
        finally:
            self._release()

    def _save(self, heeds_signals: bool) -> None:
        try:
            saving.wait_for_room(self.store, _PATIENCE, heeds_signals=heeds_signals)
        except OSError as error:
            log.error("%s: the last changes could not be written: %s", self.store.path, error.strerror)

    def _release(self) -> None:
        said: dict[str, str] = {"error": f"{self.store.path}: was not released"}
        try:
            self.release.close()
            said = {}
        except CowfsError as error:
            said = {"error": error.message}
            raise
        finally:
            if self.farewell >= 0:
                with suppress(OSError):
                    os.write(self.farewell, json.dumps(said).encode())
                os.close(self.farewell)
                self.farewell = -1

    def info(self) -> dict[str, Any]:
        """Tell what the union is made of and how full the store is."""
        lost = saving.unsaved(self.store)
        return {
            "version": cowfs.__version__,
            "pid": os.getpid(),
            "since": self.since,
            "lowers": [
                {**asdict(identity), "offset": offset}
                for identity, offset in zip(self.identities, _offsets(self.options), strict=True)
            ],
            "store": {
                "kind": self.store.kind,
                "path": self.store.path,
                "uuid": self.store.header.uuid,
                "size": self.store.size,
                "free": self.store.free,
                "hint": room.hint(self.store),
                "disk": on_disk._asdict() if (on_disk := saving.disk(self.store)) else None,
                "unsaved": lost._asdict() | {"said": str(lost)} if lost else None,
            },
            "partial": dict(zip(("files", "bytes"), rest.missing(self.overlay), strict=True)),
            "engine": self.options.engine,
            "caches": self._caches(),
        }

    def _caches(self) -> dict[str, dict[str, int]]:
        """How often what was needed of an image was in memory, and how often not, in all images of a kind."""
        lowers = (layer.inner if isinstance(layer, SlowLayer) else layer for layer in self.overlay.lowers)
        known: dict[str, dict[str, int]] = {}
        for layer in (*lowers, self.store.layer):
            if isinstance(layer, Cached):
                for name, (hits, misses) in layer.caches().items():
                    both = known.setdefault(name, {"hits": 0, "misses": 0})
                    both["hits"] += hits
                    both["misses"] += misses
        return known


def _offsets(options: UnionOptions) -> tuple[int, ...]:
    """Return the offset of each lower."""
    given = options.offsets
    return given + (0,) * (len(options.lowers) - len(given))


def open_lower(spec: str, engine: str = "auto", offset: int = 0) -> LowerLayer:
    """Open one lower layer, a directory or the image that begins *offset* bytes into a file.

    Raises LayerError when it is neither, SystemFailure when the engine cannot be had.
    """
    if os.path.isdir(spec) and not offset:
        fd, waits = _look_at(spec, os.O_DIRECTORY)
        return _directory(fd, spec, waits=waits)
    fd, waits = _look_at(spec)
    os.close(fd)
    if engine != "kernel":
        image = SquashfsLayer(os.path.abspath(spec), offset=offset)
        return SlowLayer(image) if waits else image
    if os.geteuid() != 0:
        raise SystemFailure(
            f"{spec}: only root may ask the kernel to mount an image", "--engine process needs no privilege"
        )
    if not _kernel_reaches(spec, offset):
        raise LayerError(
            f"{spec}: the kernel cannot read the end of the image: too few bytes follow it in the file",
            "--engine process can; mksquashfs without -nopad pads an image",
        )
    try:
        return _kernel_mounted(spec, offset, waits=waits)
    except OSError as error:
        raise LayerError(f"{spec}: cannot be mounted: {error.strerror or error}") from None


def _look_at(spec: str, flags: int = 0) -> tuple[int, bool]:
    """Return a descriptor (O_PATH) of what is there, and whether to read it may be to wait for others."""
    try:
        with ExitStack() as stack:
            fd = os.open(spec, os.O_PATH | flags)
            stack.callback(os.close, fd)
            waits = may_wait(fd)
            stack.pop_all()
            return fd, waits
    except OSError as error:
        raise LayerError(f"{spec}: {error.strerror}") from None
    raise AssertionError("not reached")


def _directory(fd: int, spec: str, *, waits: bool, alone: bool = False) -> LowerLayer:
    """Return a layer that shows the directory *fd*: one that can while a call waits, if any may."""
    name = os.path.abspath(spec)
    if not waits:
        return DirectoryLayer(fd, name, alone=alone)
    return SlowLayer(SharedDirectoryLayer(fd, name, alone=alone))


_SECTOR = 512
_SQUASHFS_DEVBLK_SIZE = 1024
"""The kernel's squashfs reads its device in blocks of this many bytes (fs/squashfs/squashfs_fs.h)."""


def _kernel_reaches(spec: str, offset: int) -> bool:
    """Whether a loop device, which has whole sectors of its file only, has all blocks of the image.

    The *offset* itself needs no alignment (loop_set_status_from_info in drivers/block/loop.c).
    """
    with closing(open_image(os.path.abspath(spec), offset)) as image:
        used = image.superblock.bytes_used
    available = (os.stat(spec).st_size - offset) // _SECTOR * _SECTOR
    return -(-used // _SQUASHFS_DEVBLK_SIZE) * _SQUASHFS_DEVBLK_SIZE <= available


def _kernel_mounted(spec: str, offset: int, *, waits: bool) -> LowerLayer:
    loop_fd, device = attach_loop(spec, readonly=True, offset=offset)
    try:
        fd = detached_mount("squashfs", device, {}, readonly=True, noatime=True)
    finally:
        os.close(loop_fd)
    return _directory(fd, spec, waits=waits, alone=True)


def open_lowers(specs: Sequence[str], engine: str = "auto", offsets: Sequence[int] = ()) -> list[LowerLayer]:
    """Open all lower layers, or none. *offsets* are those of the first of them."""
    layers: list[LowerLayer] = []
    try:
        for spec, offset in zip_longest(specs, offsets, fillvalue=0):
            layers.append(open_lower(str(spec), engine, int(offset)))
    except BaseException:
        for layer in layers:
            layer.close()
        raise
    return layers


def open_union(options: UnionOptions, progress: Progress = lambda _: None) -> Union:
    """Open the layers and the store and join them.

    Blocks, for a store that needs repair as long as that takes; *progress* is told in words.
    Raises CowfsError with the reason when something cannot be used; nothing is left open then.
    """
    try:
        return _open_union(options, progress)
    except OSError as error:
        if error.errno not in LACK_OF_ROOM:
            raise
        raise StoreError(
            f"{options.store}: cannot be written to: {error.strerror}", "make room on its disk, or in it"
        ) from None


def _open_union(options: UnionOptions, progress: Progress) -> Union:
    offsets = _offsets(options)
    identities = [identify_lower(*lower) for lower in zip(options.lowers, offsets, strict=True)]
    with ExitStack() as stack:
        lowers = open_lowers(options.lowers, options.engine, offsets)
        for layer in lowers:
            stack.callback(layer.close)
            if isinstance(layer, SlowLayer):
                layer.has_notes = layer is not lowers[-1]
        store = open_store(
            options.store,
            lowers=identities,
            force_lower=options.force_lower,
            engine=options.engine,
            progress=progress,
            memory_size=options.size,
        )
        stack.callback(store.close)
        anew = not store.header.lowers and not store.header.adopted
        if isinstance(store.layer, DirectoryLayer):
            store.layer.hide_in(store.work)
            if options.fakeroot:
                store.layer.act_as_root(store.work, anew=anew)
        overlay = Overlay(
            store.layer,
            store.upper,
            store.work,
            store.index,
            lowers,
            OverlayOptions(
                xattr_prefix=store.xattr_prefix,
                sync_copy_up=not _orders_data(store),
                has_exact_holes=store.kind == "image" or bool(store.layer.fill_unit),
            ),
        )
        overlay.make_room = store.make_room
        overlay.not_saved = store.not_saved
        if anew:
            _take_attributes(overlay, lowers[0])
        store.bind(identities)
        overlay.notebook = store.notebook
        overlay.wants_rest = lambda: store.memory is None  # what is in memory alone need not be there twice
        rest.resume(overlay)
        return Union(options, identities, store, overlay, stack.pop_all(), time.time())
    raise AssertionError("not reached")


def _orders_data(store: Store) -> bool:
    """Whether data reaches the disk before the rename that shows it: ext3 in ordered mode, and memory."""
    if store.kind != "directory":
        return True
    fd = os.open(store.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return fs_magic(fd) == _TMPFS
    finally:
        os.close(fd)


def _take_attributes(overlay: Overlay, lower: LowerLayer) -> None:
    """Give the root of a new store the attributes of the lower's: it is what everybody sees first."""
    attr = lower.stat(lower.root)
    key = overlay.root.upper
    copy_xattrs(overlay, lower, lower.root, key)
    overlay.upper.chown(key, attr.st_uid, attr.st_gid)
    overlay.upper.chmod(key, attr.st_mode)
    overlay.upper.utimens(key, attr.st_atime_ns, attr.st_mtime_ns)
    overlay.root.mode = attr.st_mode


def check_mountpoint(mountpoint: str) -> str:
    """Return the mountpoint's real path; MountFailure when it cannot be one."""
    if mountpoint.startswith("/dev/fd/"):
        return mountpoint  # mounted by somebody else, who hands us the connection
    try:
        os.statvfs(mountpoint)  # asks its daemon, which stat(2) need not
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise MountFailure(
                f"{mountpoint}: a mount whose daemon is dead is here", f"cowfs umount {mountpoint} removes it"
            ) from None
    if not os.path.exists(mountpoint):
        raise MountFailure(f"{mountpoint}: no such mountpoint", "make the directory first")
    if not os.path.isdir(mountpoint):
        raise MountFailure(f"{mountpoint}: not a directory", "a union is mounted on a directory: make one")
    target = os.path.realpath(mountpoint)
    here = mount_of(target)
    if here is not None and here.fstype == "fuse.cowfs":
        raise MountFailure(f"{mountpoint}: a cowfs is mounted here already", f"cowfs umount {mountpoint}")
    return target


def check_places(mountpoint: str, options: UnionOptions) -> None:
    """Refuse a store directory in a lower, or the other way round, and a mountpoint in it: MountFailure.

    Else a mountpoint may be a layer, in one, or above it: layers are known by descriptors, and what is
    mounted in one does not belong to it.
    """
    if mountpoint.startswith("/dev/fd/") or options.store == "memory" or os.path.isfile(options.store):
        return
    store = _place(options.store)
    for lower in filter(os.path.isdir, options.lowers):
        if _inside(store, _place(lower)):
            raise MountFailure(f"{options.store}: the store is inside the lower {lower}", "put it elsewhere")
        if _inside(_place(lower), store):
            raise MountFailure(
                f"{lower}: the lower is inside the store {options.store}", "choose another store"
            )
    at = _place(mountpoint)
    if at != store and _inside(at, store):
        raise MountFailure(
            f"{mountpoint}: is inside the store {options.store}", "choose a mountpoint elsewhere"
        )


_Place = tuple[str, tuple[bytes, ...]]
"""A filesystem, and the names on the way from its root: the same by whatever mount it is reached."""


def _place(path: str) -> _Place:
    """Return the place of what is at *path*, or will be made there."""
    try:
        fd = os.open(path, os.O_PATH)
    except OSError:
        above, name = os.path.split(path)
        if not name:
            return "", ()
        dev, names = _place(above)
        return dev, (*names, os.fsencode(name))
    try:
        dev, way = where_is(fd)
    finally:
        os.close(fd)
    return dev, tuple(filter(None, way.split(b"/")))


def _inside(place: _Place, directory: _Place) -> bool:
    return place[0] == directory[0] and place[1][: len(directory[1])] == directory[1]


def commands(
    union: Union, more: Callable[[], dict[str, Any]], lose_patience: Callable[[], None] = lambda: None
) -> Mapping[str, Any]:
    """Return what the control socket of this union answers.

    *more* adds to ``info``; *lose_patience* is called when the mount is about to be detached.
    """

    def info(_: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield {**union.info(), **more()}

    def diff(_: dict[str, Any]) -> Replies:
        from cowfs.changes.render import to_json
        from cowfs.live_diff import steps

        lost = saving.unsaved(union.store)
        if lost:
            yield {"said": f"{union.store.path}: {lost}"}
        for step in steps(union.overlay):
            yield {"change": to_json(step)} if isinstance(step, Change) else step

    def grow(request: dict[str, Any]) -> Iterator[dict[str, Any] | Callable[[], None]]:
        from cowfs.store.grow import grow_open_store

        size = yield from _told(grow_open_store(union.store, request["size"]))
        yield {"size": size}

    def persist(request: dict[str, Any]) -> Iterator[dict[str, Any] | Callable[[], None]]:
        from cowfs.store.persist import persist as steps

        given = (request[what] for what in ("fd", "name", "path", "size"))
        size = yield from _told(steps(union.store, *given))
        yield {"size": size}

    def leave(request: dict[str, Any]) -> Replies:
        if request.get("lazy"):
            lose_patience()
        union.may_be_lost = request["force"]
        if not union.may_be_lost:
            yield lambda: _try_to_save(union.store)
            lost = saving.unsaved(union.store)
            if lost:
                yield {"unsaved": f"{union.store.path}: {lost}"}
                return
        if union.farewell >= 0:
            os.close(union.farewell)
        union.farewell = os.dup(request["fd"]) if "fd" in request else -1
        yield {}

    return {"info": info, "diff": diff, "grow": grow, "persist": persist, "leave": leave}


def _try_to_save(store: Store) -> None:
    with suppress(OSError):
        store.save()


def _told(steps: Generator[Callable[[], None] | str, None, R]) -> Generator[Any, None, R]:
    """Make replies of what the steps of a long command say."""
    try:
        while True:
            step = next(steps)
            yield {"said": step} if isinstance(step, str) else step
    except StopIteration as end:
        result: R = end.value
        return result
    finally:
        steps.close()
