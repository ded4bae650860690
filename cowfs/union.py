"""Make a union: open its layers and its store, and join them."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import cowfs
from cowfs.changes.merge import merge_deleted
from cowfs.errors import CowfsError, StoreError, UsageError
from cowfs.layers.base import Cached, Key, LowerLayer
from cowfs.layers.directory import DirectoryLayer
from cowfs.layers.slow import SlowLayer, unwrapped
from cowfs.linux import filesystems, user_namespace
from cowfs.linux.files import LACK_OF_ROOM, fs_magic
from cowfs.lowers import open_lowers, open_module
from cowfs.overlay import incomplete, modules, uncover
from cowfs.overlay.aufs import written_through
from cowfs.overlay.freeze import give_up_index
from cowfs.overlay.fs import OverlayOptions
from cowfs.overlay.graft import Grafted
from cowfs.overlay.mapped_owners import as_in_store
from cowfs.overlay.node import APART
from cowfs.overlay.original import copy_xattrs
from cowfs.overlay.overlay import Overlay
from cowfs.store.format import layout
from cowfs.store.format.checkpoints import as_layers, listed
from cowfs.store.format.header import last_seen, modules_in
from cowfs.store.format.identity import identify_lowers
from cowfs.store.served import disk_space, fullness, presence
from cowfs.store.served.open import open_aside, open_store
from cowfs.store.served.store import Store
from cowfs.types import Atime, Identity

Progress = Callable[[str], None]
R = TypeVar("R")
_PATIENCE = 60.0
"""Seconds."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class UnionOptions:
    """What a union consists of."""

    lowers: tuple[str, ...]
    """Images or directories, the first on top."""
    store: str = "memory"
    """An image, a directory, or ``memory``."""
    engine: str = "auto"
    """The engine that reads and writes images: ``kernel`` (needs root), or ``process``; ``auto`` is
    ``process``."""
    force_lower: bool = False
    """Use the store even if it was made for another lower."""
    size: int | None = None
    """The size in bytes of a store in memory, or of the memory for volatile directories."""
    memory_subdir: str = ""
    """The directory of a store in memory in the image to which it is persisted."""
    offsets: tuple[int, ...] = ()
    """The offset in bytes of each lower image in its file; 0 for those left out."""
    verify: tuple[str, ...] = ()
    """How each lower image is checked against its hash tree: a root hash, a file with one, or a certificate;
    "" for an image that is not checked, and for those left out."""
    data_only: int = 0
    """How many lowers, counted from the last, are data-only."""
    atime: Atime = Atime(files=True, directories=True)  # noqa: RUF009 (it is a tuple)
    """When reading a file of the store changes its atime."""
    fakeroot: bool = False
    """Let the store hold all owners and devices, though we have no privilege."""
    whiteouts: tuple[str, ...] = ()
    """The format of the whiteouts in each lower (:data:`cowfs.overlay.named_whiteouts.STYLES`); ``auto``,
    which is also for those left out, looks at the lower."""
    volatile: tuple[str, ...] | None = None
    """The volatile directories: absolute paths, none below another; None: those that the store names."""
    remembers: bool = True
    """Whether the store records :attr:`volatile` for later mounts."""
    work: str = ""
    """The work dir, if the store is only the upper, as with overlayfs; "": it is in the store."""
    durable: bool = True
    """Whether writes to such an upper ever wait for the disk."""
    may_crash: bool = False
    """Whether the image keeps only synced changes when the daemon crashes, for tests."""
    read_only: bool = False
    """Whether nothing is written to the store, because it is on read-only media."""
    metacopy: bool = True
    """Whether files may be copied up without their data."""
    redirect_dir: bool = True
    """Whether directories of a lower can be renamed."""
    has_xattrs: bool = True
    """Whether files have extended attributes for users."""
    counts_directories: bool = True
    """Whether a directory's link count says how many directories are in it."""


@dataclass(slots=True)
class Union:
    """An open union; :meth:`close` releases all of it."""

    options: UnionOptions
    identities: list[Identity]
    store: Store
    overlay: Overlay
    whereabouts: presence.Whereabouts
    release: ExitStack
    since: float
    may_be_lost: bool = False
    """Whether the user has said that changes that cannot be written may be lost."""
    aside: Store | None = None
    """The store of the changes that are not kept, if there are volatile directories."""
    modules: dict[int, Identity] = field(default_factory=dict)
    """The modules above the lowers, by the overlay's numbers (:mod:`cowfs.modules`)."""
    release_pipe: int = -1
    """The descriptor that is told how the release ended; -1: there is none."""

    def close(self, *, heeds_signals: bool = False) -> None:
        """Write everything back and release the store and the layers. Blocks.

        If the disk is full, wait a minute for space, unless the user has said that the changes may be lost.
        With *heeds_signals* (they are blocked), another signal ends the wait.
        """
        try:
            if self.store.is_aufs and not self.store.read_only:
                self._link_all()
            if not self.store.read_only and not self.may_be_lost:
                self._save(heeds_signals)
        finally:
            self._release()

    def _link_all(self) -> None:
        """Create all names of the lowers' hard links in a store of aufs, which has no index of them.

        If this cannot be done now, the next unmount does it.
        """
        if any(layer.waits for layer in self.overlay.base):
            return
        try:
            give_up_index(self.overlay)
        except OSError as error:
            log.warning(
                "%s: hard links: some names are not in the store yet: %s", self.store.path, error.strerror
            )

    def _save(self, heeds_signals: bool) -> None:
        try:
            disk_space.wait_for_room(self.store, _PATIENCE, heeds_signals=heeds_signals)
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
            if self.release_pipe >= 0:
                with suppress(OSError):
                    os.write(self.release_pipe, json.dumps(said).encode())
                os.close(self.release_pipe)
                self.release_pipe = -1

    def info(self) -> dict[str, Any]:
        """Return what the union consists of, and how full the store is."""
        lost = disk_space.unsaved(self.store)
        return {
            "version": cowfs.__version__,
            "pid": os.getpid(),
            "since": self.since,
            "lost_lowers": self.whereabouts.of_lowers(),
            "lowers": [asdict(identity) for identity in self.identities],
            "modules": [asdict(self.modules[number]) for number in self.overlay.loaded],
            "store": {
                "kind": self.store.kind,
                "read_only": self.store.read_only,
                "path": self.store.path,
                "xattr_prefix": self.store.xattr_prefix.decode(),
                "uuid": self.store.header.uuid,
                "lowers_seen": last_seen(self.store.header),
                "layers": [one.number for one in self.store.frozen],
                "checkpoints": [one["name"] for one in listed(self.store.layers, self.store.upper)],
                "size": self.store.size,
                "free": self.store.free,
                "hint": fullness.hint(self.store),
                "disk": on_disk._asdict() if (on_disk := disk_space.disk(self.store)) else None,
                "moved": self.whereabouts.of_store(),
                "unsaved": lost._asdict() | {"said": str(lost)} if lost else None,
            },
            "volatile": self._volatile(),
            "partial": dict(zip(("files", "bytes"), incomplete.missing(self.overlay), strict=True)),
            "engine": self.options.engine,
            "caches": self._caches(),
        }

    def _volatile(self) -> dict[str, Any] | None:
        if self.aside is None:
            return None
        return {"paths": list(self.options.volatile or ()), "size": self.aside.size, "free": self.aside.free}

    def _caches(self) -> dict[str, dict[str, int]]:
        """Return the hits and misses of the caches of images, by their names, added up over all images of a
        kind."""
        lowers = map(unwrapped, self.overlay.lowers)
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


def open_union(
    options: UnionOptions, progress: Progress = lambda _: None, tick: Callable[[], None] = lambda: None
) -> Union:
    """Open the layers and the store and join them.

    Blocks; repairing a store can take long, and *progress* is called with messages, and *tick* for each name
    of a deleted checkpoint that is merged. Raises CowfsError with the reason if something cannot be used;
    then nothing stays open.
    """
    try:
        return _open_union(options, progress, tick)
    except OSError as error:
        if error.errno not in LACK_OF_ROOM:
            raise
        raise StoreError(
            f"{options.store}: cannot be written to: {error.strerror}",
            "free space on its disk, or in the store",
        ) from None


def _open_union(options: UnionOptions, progress: Progress, tick: Callable[[], None]) -> Union:
    offsets = _offsets(options)
    identities = identify_lowers(options.lowers, offsets, options.data_only, options.whiteouts)
    with ExitStack() as stack:
        styles = [low.whiteouts for low in identities]
        lowers = open_lowers(options.lowers, options.engine, offsets, options.data_only, styles)
        for layer in lowers:
            stack.callback(layer.close)
            if isinstance(layer, SlowLayer):
                layer.has_notes = layer is not lowers[-1]
        store = _open_store(options, identities, progress)
        stack.callback(store.close)
        above = modules_in(store.header, identities)
        of_modules, identities = identities[:above], identities[above:]
        for number in range(above):
            lowers[number].close()
            lowers[number] = open_module(options.lowers[number], offsets[number])
            stack.callback(lowers[number].close)
        opened, lowers = lowers, lowers[above:]
        lowers = as_in_store(lowers, [low.kind for low in identities], store.header.owners)
        store.layer.note_reads(options.atime)
        anew = not store.header.lowers and not store.header.adopted
        directory = written_through(store.layer)
        if isinstance(directory, DirectoryLayer) and not store.read_only:
            directory.hide_in(store.work)
            if options.fakeroot:
                directory.act_as_root(store.work, anew=anew)
        if store.frozen and not store.header.modules:  # whiteouts that only these need would be lost
            merge_deleted(store, lowers, tick)
        volatile = _volatile(options, store, bool(above))
        overlay = _join(Grafted if volatile else Overlay, store, lowers, options)
        stack.callback(_close_all, overlay.modules)
        if anew and not store.read_only:
            _take_attributes(overlay, lowers[0])
        aside = None
        if isinstance(overlay, Grafted):
            aside = _set_aside(overlay, store, options, volatile, stack)
        store.bind(identities, volatile if options.remembers else None)
        _take_up_work(overlay, store)
        loaded = [
            (modules.add(overlay, layer)[0], known)
            for layer, known in zip(opened[above - 1 :: -1] if above else (), of_modules[::-1], strict=True)
        ]
        whereabouts = presence.Whereabouts(store, opened, options.lowers)
        stack.callback(whereabouts.close)
        store.is_in_place = whereabouts.is_in_place
        return Union(
            replace(options, volatile=tuple(volatile)),
            identities,
            store,
            overlay,
            whereabouts,
            stack.pop_all(),
            time.time(),
            aside=aside,
            modules=dict(loaded),
        )
    raise AssertionError("not reached")


def _volatile(options: UnionOptions, store: Store, has_modules: bool) -> Sequence[str]:
    """Return the directories whose changes are kept in memory. UsageError if modules forbid them."""
    if store.read_only:
        return ()
    volatile = store.header.volatile if options.volatile is None else options.volatile
    if volatile and has_modules:
        raise UsageError(
            f"{options.lowers[0]}: a module cannot be used with volatile directories",
            "leave it out, or mount with -o volatile=none",
        )
    return volatile


def _take_up_work(overlay: Overlay, store: Store) -> None:
    """Tell a union what its store can do, and let it complete what the last mount left unfinished."""
    overlay.notebook = None if store.is_aufs else store.notebook
    directory = written_through(store.layer)
    if isinstance(directory, DirectoryLayer):
        overlay.stand_in = directory.stand_in
    if store.links is not None:
        overlay.index_what_takes_no_notes(store.links)
    # Copying the rest of partial files to a store in memory would only use memory.
    overlay.host.wants_rest = lambda: store.memory is None
    incomplete.resume(overlay)
    if not store.read_only:
        uncover.restore_times(overlay)


def _close_all(layers: list[LowerLayer]) -> None:
    for layer in layers:
        layer.close()


def _open_store(options: UnionOptions, identities: Sequence[Identity], progress: Progress) -> Store:
    return open_store(
        options.store,
        lowers=identities,
        force_lower=options.force_lower,
        engine=options.engine,
        progress=progress,
        memory_subdir=options.memory_subdir,
        memory_size=None if options.volatile and options.store != "memory" else options.size,
        read_only=options.read_only,
        work=options.work,
        durable=options.durable,
        may_crash=options.may_crash,
    )


def _join(kind: type[Overlay], store: Store, lowers: Sequence[LowerLayer], wanted: UnionOptions) -> Overlay:
    """Return the union of a store's layers and *lowers*."""
    options = OverlayOptions(
        xattr_prefix=store.xattr_prefix,
        sync_copy_up=not _orders_data(store),
        has_exact_holes=store.kind == "image" or bool(store.layer.fill_unit),
        metacopy=wanted.metacopy and not store.is_aufs,
        redirect_dir=wanted.redirect_dir and not store.is_aufs,
        has_xattrs=wanted.has_xattrs,
        counts_directories=wanted.counts_directories,
        nobody=user_namespace.nobody() if _may_lack_owners(store) else None,
    )
    overlay = kind(
        store.layer,
        store.upper,
        store.work,
        _index_of(store),
        lowers,
        options,
        as_layers(store.layer, store.frozen),
    )
    overlay.host.make_room = store.make_room
    overlay.host.not_saved = store.not_saved
    overlay.trash = lambda: layout.find(store.layer, layout.PRIVATE, layout.TRASH)
    return overlay


def _may_lack_owners(store: Store) -> bool:
    """Whether files may have owners without a number in the namespace that the owners in the store are of."""
    return store.header.owners is not None or not user_namespace.has_everybody(user_namespace.id_map())


def _index_of(store: Store) -> Key | None:
    """Return the index of hard links; for a read-only store, the one that is there, if any."""
    if not store.read_only or store.layers.is_fresh(store.upper):
        return store.index
    return layout.find(store.layer, layout.WORK, layout.INDEX)


def _set_aside(
    overlay: Grafted, store: Store, options: UnionOptions, volatile: Sequence[str], stack: ExitStack
) -> Store:
    """Send changes below *volatile* to a store in memory, and return that store.

    UsageError for anything but a directory of the union.
    """
    aside = open_aside(options.size)
    stack.callback(aside.close)
    aside.layer.note_reads(options.atime)
    apart = Overlay(
        aside.layer,
        aside.upper,
        aside.work,
        aside.index,
        (store.layer, *overlay.stack.in_order()),
        OverlayOptions(xattr_prefix=store.xattr_prefix, has_exact_holes=True, first_ino=APART),
        beneath=store.upper,
    )
    for path in volatile:
        try:
            overlay.graft(apart, os.fsencode(path))
        except OSError as error:
            given = f"volatile={path}" if options.volatile else f"{store.path}: volatile path {path}"
            raise UsageError(
                f"{given}: {os.strerror(error.errno or 0)}",
                "name existing directories, without symbolic links; volatile=none names none",
            ) from None

    def make_room() -> bool:
        """Enlarge the fuller of the two stores: ENOSPC does not say which one is full."""
        room, other = store.layer.statfs(), aside.layer.statfs()
        return (aside if other.bfree * other.frsize < room.bfree * room.frsize else store).make_room()

    overlay.host.make_room = make_room
    return aside


def _orders_data(store: Store) -> bool:
    """Return whether data reaches the disk before the rename that shows it: ext3 in ordered mode, and
    memory."""
    if store.kind != "directory":
        return True
    fd = os.open(store.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return fs_magic(fd) == filesystems.TMPFS
    finally:
        os.close(fd)


def _take_attributes(overlay: Overlay, lower: LowerLayer) -> None:
    """Copy the attributes of the lower's root to the root of a new store."""
    attr = lower.stat(lower.root)
    key = overlay.root.upper
    copy_xattrs(overlay, lower, lower.root, key)
    overlay.upper.chown(key, attr.st_uid, attr.st_gid)
    overlay.upper.chmod(key, attr.st_mode)
    overlay.upper.utimens(key, attr.st_atime_ns, attr.st_mtime_ns)
    overlay.root.mode = attr.st_mode
