"""Make a union: open its layers and its store, and join them."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from typing import Any, TypeVar

import cowfs
from cowfs.changes.merge import merge_deleted
from cowfs.errors import CowfsError, LayerError, StoreError, SystemFailure, UsageError
from cowfs.formats import archives, erofs
from cowfs.formats.squashfs.image import open_image
from cowfs.formats.squashfs.source import open_bytes
from cowfs.layers.base import Cached, Key, LowerLayer
from cowfs.layers.directory import DirectoryLayer
from cowfs.layers.iso9660 import Iso9660Layer
from cowfs.layers.module import ModuleLayer
from cowfs.layers.shared_directory import SharedDirectoryLayer
from cowfs.layers.slow import SlowLayer, unwrapped
from cowfs.layers.squashfs import SquashfsLayer
from cowfs.layers.tar import TarLayer
from cowfs.layers.zip import ZipLayer
from cowfs.linux import filesystems
from cowfs.linux.files import LACK_OF_ROOM, fs_magic
from cowfs.linux.loop_devices import attach_loop
from cowfs.linux.mounts import detached_mount
from cowfs.linux.remote import may_wait
from cowfs.overlay import incomplete, modules
from cowfs.overlay.aufs import written_through
from cowfs.overlay.freeze import give_up_index
from cowfs.overlay.fs import OverlayOptions
from cowfs.overlay.graft import Grafted
from cowfs.overlay.named_whiteouts import reworded
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
from cowfs.url.names import is_url, place

Progress = Callable[[str], None]
R = TypeVar("R")
_ARCHIVES = {"tar": TarLayer, "zip": ZipLayer, "iso9660": Iso9660Layer}
_PATIENCE = 60.0
"""Seconds."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class UnionOptions:
    """What a union is made of."""

    lowers: tuple[str, ...]
    """Images or directories, the first on top."""
    store: str = "memory"
    """An image, a directory, or ``memory``."""
    engine: str = "auto"
    """What reads and writes images: ``kernel`` (needs root), or ``process``; ``auto`` is ``process``."""
    force_lower: bool = False
    """Use the store even if it was made for another lower."""
    size: int | None = None
    """The size of a store in memory, and of the part of another that is not kept, in bytes."""
    memory_subdir: str = ""
    """The name of a store in memory in the image that it becomes when it is persisted."""
    offsets: tuple[int, ...] = ()
    """Where in its file each lower image begins, in bytes; those that are left out at 0."""
    verify: tuple[str, ...] = ()
    """By what each lower image is compared with its hash tree: root hash, file with one, or certificate; ""
    for one that is not, and so are those left out."""
    data_only: int = 0
    """How many of the lowers, the last, show no names, and only have the data of files of those above."""
    atime: Atime = Atime(files=True, directories=True)  # noqa: RUF009 (it is a tuple)
    """When reading something of the store changes its atime."""
    fakeroot: bool = False
    """Let the store hold all owners and devices, though we have no privilege."""
    whiteouts: tuple[str, ...] = ()
    """How those in each lower are written (:data:`cowfs.overlay.named_whiteouts.STYLES`); ``auto``, and if
    nothing is said: as it looks."""
    volatile: tuple[str, ...] | None = None
    """Directories whose changes are not kept: absolute paths, none below another; None: as the store says."""
    remembers: bool = True
    """Whether the store should record it from now on."""
    work: str = ""
    """The work dir, where the store is only the upper: two directories as overlayfs has them."""
    durable: bool = True
    """Whether writes to these two ever wait for the disk."""
    may_crash: bool = False
    """Whether an image should keep only what was synced."""
    read_only: bool = False
    """Whether nothing of the store is written to: it is on read-only media."""
    metacopy: bool = True
    """Whether files may be copied up without their data."""
    redirect_dir: bool = True
    """Whether directories that are in a lower can be renamed."""


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
    """Whether the user has said so of what cannot be written."""
    aside: Store | None = None
    """What has the changes that are not kept, if any are not."""
    modules: dict[int, Identity] = field(default_factory=dict)
    """What is merged above the lowers, by the overlay's numbers (:mod:`cowfs.modules`)."""
    release_pipe: int = -1
    """The descriptor on which somebody waits to hear how the release went, if there is one."""

    def close(self, *, heeds_signals: bool = False) -> None:
        """Write everything back and release the store and the layers. Blocks.

        While the disk has no room for it a minute is waited for some, unless it has been said that it may be
        lost, or a signal asks once more to end, if it *heeds_signals* (which are held back).
        """
        try:
            if self.store.is_aufs and not self.store.read_only:
                self._link_all()
            if not self.store.read_only and not self.may_be_lost:
                self._save(heeds_signals)
        finally:
            self._release()

    def _link_all(self) -> None:
        """Let hard links of lowers have all their names in a store of aufs, which has no index of them.

        What is not done now, is at the next unmount.
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
        """Tell what the union is made of and how full the store is."""
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
        """How often what was needed of an image was in memory, and how often not, in all images of a kind."""
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


def open_lower(spec: str, engine: str = "auto", offset: int = 0, whiteouts: str = "overlayfs") -> LowerLayer:
    """Open one lower layer: a directory, or the image that begins *offset* bytes into a file or a URL.

    *whiteouts* says how those in it are written.

    Raises LayerError when it is neither, SystemFailure when the engine cannot be had.
    """
    layer = _open_lower(spec, engine, offset)
    if isinstance(layer, SlowLayer):
        layer.inner = reworded(layer.inner, whiteouts)
        return layer
    return reworded(layer, whiteouts)


def _open_lower(spec: str, engine: str, offset: int) -> LowerLayer:
    if is_url(spec):
        if engine == "kernel":
            raise LayerError(f"{spec}: the kernel cannot read by URL", "use --engine process")
        return SlowLayer(SquashfsLayer(spec, offset=offset), knows_at_once=True)
    if os.path.isdir(spec) and not offset:
        fd, waits = _look_at(spec, os.O_DIRECTORY)
        return _directory(fd, spec, waits=waits)
    fd, waits = _look_at(spec)
    os.close(fd)
    with closing(open_bytes(spec)) as data:
        head = data.pread(archives.SAMPLE, offset)
    if not offset and (kind := archives.kind_of(head)):
        archive = _ARCHIVES[kind](os.path.abspath(spec))
        return SlowLayer(archive) if waits else archive
    if engine != "kernel":
        image = SquashfsLayer(os.path.abspath(spec), offset=offset)
        return SlowLayer(image) if waits else image
    if os.geteuid() != 0:
        raise SystemFailure(
            f"{spec}: only root can use the kernel engine", "--engine process works without root"
        )
    is_erofs = erofs.is_erofs(head)
    if not is_erofs and not _kernel_reaches(spec, offset):
        raise LayerError(
            f"{spec}: the kernel cannot read the end of the image: the file is not padded to a whole block",
            "use --engine process, or pack the image without -nopad",
        )
    try:
        return _kernel_mounted(spec, "erofs" if is_erofs else "squashfs", offset, waits=waits)
    except OSError as error:
        missing = "this kernel has no EROFS: modprobe erofs" if error.errno == errno.ENODEV else ""
        raise LayerError(f"{spec}: cannot be mounted: {error.strerror or error}", missing) from None


def _look_at(spec: str, flags: int = 0) -> tuple[int, bool]:
    """Return a descriptor (O_PATH) of the path, and whether reading it may wait for others."""
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
        layer = DirectoryLayer(fd, name, alone=alone)
        layer.separate_names()
        return layer
    shared = SharedDirectoryLayer(fd, name, alone=alone)
    shared.separate_names()
    return SlowLayer(shared)


_SECTOR = 512
_SQUASHFS_DEVBLK_SIZE = 1024
"""The kernel's squashfs reads its device in blocks of this many bytes (fs/squashfs/squashfs_fs.h)."""


def _kernel_reaches(spec: str, offset: int) -> bool:
    """Whether a loop device, which has whole sectors of its file only, has all blocks of the image.

    The *offset* itself needs no alignment (loop_set_status_from_info in drivers/block/loop.c).
    """
    with closing(open_image(os.path.abspath(spec), offset)) as image:
        used = image.superblock.bytes_used
        size = image.source.file_size()
    available = (size - offset) // _SECTOR * _SECTOR
    return -(-used // _SQUASHFS_DEVBLK_SIZE) * _SQUASHFS_DEVBLK_SIZE <= available


def _kernel_mounted(spec: str, kind: str, offset: int, *, waits: bool) -> LowerLayer:
    loop_fd, device = attach_loop(spec, readonly=True, offset=offset)
    try:
        fd = detached_mount(kind, device, {}, readonly=True, noatime=True)
    finally:
        os.close(loop_fd)
    return _directory(fd, spec, waits=waits, alone=True)


def open_lowers(
    specs: Sequence[str],
    engine: str = "auto",
    offsets: Sequence[int] = (),
    data_only: int = 0,
    whiteouts: Sequence[str] = (),
) -> list[LowerLayer]:
    """Open all lower layers, or none. *offsets* are those of the first; the last *data_only* are that.

    *whiteouts* says how those of each are written (:attr:`cowfs.types.Identity.whiteouts`).
    """
    layers: list[LowerLayer] = []
    try:
        for spec, offset, style in zip_longest(specs, offsets, whiteouts):
            layers.append(open_lower(str(spec), engine, offset or 0, style or "overlayfs"))
    except BaseException:
        for layer in layers:
            layer.close()
        raise
    for layer in layers[len(layers) - data_only :]:
        layer.data_only = True
    return layers


def open_union(options: UnionOptions, progress: Progress = lambda _: None) -> Union:
    """Open the layers and the store and join them.

    Blocks; a store that needs repair may take long, and *progress* is called with messages. Raises CowfsError
    with the reason if something cannot be used; nothing stays open then.
    """
    try:
        return _open_union(options, progress)
    except OSError as error:
        if error.errno not in LACK_OF_ROOM:
            raise
        raise StoreError(
            f"{options.store}: cannot be written to: {error.strerror}",
            "free space on its disk, or in the store",
        ) from None


def _open_union(options: UnionOptions, progress: Progress) -> Union:
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
            lowers[number] = _as_module(options.lowers[number], offsets[number])
            stack.callback(lowers[number].close)
        opened, lowers = lowers, lowers[above:]
        store.layer.note_reads(options.atime)
        anew = not store.header.lowers and not store.header.adopted
        directory = written_through(store.layer)
        if isinstance(directory, DirectoryLayer) and not store.read_only:
            directory.hide_in(store.work)
            if options.fakeroot:
                directory.act_as_root(store.work, anew=anew)
        if store.frozen and not store.header.modules:  # whiteouts that only these need would be lost
            merge_deleted(store, lowers)
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
    """Tell a union what its store can do, and let it go on with what the last mount left incomplete."""
    overlay.notebook = None if store.is_aufs else store.notebook
    directory = written_through(store.layer)
    if isinstance(directory, DirectoryLayer):
        overlay.stand_in = directory.stand_in
    if store.links is not None:
        overlay.index_what_takes_no_notes(store.links)
    # What is in memory alone need not be there twice.
    overlay.host.wants_rest = lambda: store.memory is None
    incomplete.resume(overlay)


def _close_all(layers: list[LowerLayer]) -> None:
    for layer in layers:
        layer.close()


def _as_module(spec: str, offset: int) -> LowerLayer:
    """Open an image as a module; LayerError if it is not one."""
    waits = is_url(spec)
    if not waits:
        fd, waits = _look_at(spec)
        os.close(fd)
    layer = ModuleLayer(place(spec), offset=offset)
    if not waits:
        return layer
    slow = SlowLayer(layer, knows_at_once=is_url(spec))
    slow.has_notes = True
    return slow


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


def _index_of(store: Store) -> Key | None:
    """Return the index of hard links: of a store that is not written to, to look in."""
    if not store.read_only or store.layers.is_fresh(store.upper):
        return store.index
    return layout.find(store.layer, layout.WORK, layout.INDEX)


def _set_aside(
    overlay: Grafted, store: Store, options: UnionOptions, volatile: Sequence[str], stack: ExitStack
) -> Store:
    """Send changes below *volatile* to a store in memory, which is returned.

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
                "name directories that are there, by no symbolic links; volatile=none names none",
            ) from None

    def make_room() -> bool:
        """Let the fuller of the two grow: nobody says which one is full."""
        room, other = store.layer.statfs(), aside.layer.statfs()
        return (aside if other.bfree * other.frsize < room.bfree * room.frsize else store).make_room()

    overlay.host.make_room = make_room
    return aside


def _orders_data(store: Store) -> bool:
    """Whether data reaches the disk before the rename that shows it: ext3 in ordered mode, and memory."""
    if store.kind != "directory":
        return True
    fd = os.open(store.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return fs_magic(fd) == filesystems.TMPFS
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
