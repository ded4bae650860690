"""An open store: the writable layer, the directories that overlayfs knows, and the header."""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cowfs.errors import StoreError
from cowfs.layers import acl, beneath
from cowfs.layers.apart import ApartLayer
from cowfs.layers.base import Key, UpperLayer
from cowfs.linux import user_namespace
from cowfs.linux.files import LACK_OF_ROOM
from cowfs.overlay.aufs import AufsStore
from cowfs.overlay.named_whiteouts import use_format
from cowfs.overlay.xattr_format import XattrFormat
from cowfs.store.e2fsprogs.tools import Progress, quiet
from cowfs.store.format import layout, rebased
from cowfs.store.format.checkpoints import Checkpoint, Layers
from cowfs.store.format.header import USER, Header, bound, check_lowers, made_by, seen
from cowfs.store.served import lock
from cowfs.types import Identity

log = logging.getLogger(__name__)

Kind = Literal["image", "directory", "memory"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request to open a store: the arguments of open_store()."""

    lowers: Sequence[Identity] = ()
    force_lower: bool = False
    engine: str = "auto"
    read_only: bool = False
    progress: Progress = quiet
    durable: bool = True
    """Whether to wait for data to be on disk. False is only possible for two directories."""
    may_crash: bool = False
    """Whether an image keeps only synced changes if the daemon dies (cowfs.store.served.crash)."""


@dataclass(slots=True)
class Store:
    """A store that is open and locked until :meth:`close`."""

    kind: Kind
    path: str
    """The path of the store, or ``memory``."""
    layer: UpperLayer
    header: Header
    upper: Key
    """The directory of the changes, the upperdir of the kernel's overlayfs."""
    work: Key
    """The directory for temporaries, on the same filesystem; empty at open. None if read-only."""
    index: Key
    """The directory of copied-up hard links, named by the file handle of their lower. None if read-only."""
    links: Key = None
    """The index of inodes that cannot have cowfs's attributes; None if all can, or if read-only."""
    frozen: list[Checkpoint] = field(default_factory=list)
    """The layers of checkpoints below the upper, topmost first."""
    read_only: bool = False
    release: ExitStack = field(default_factory=ExitStack, repr=False)
    """The callbacks of close(), called after the last sync, the last one first."""
    memory: Any = field(default=None, repr=False)
    """The growing image of a store in memory (cowfs.store.served.memory.Memory), or None."""
    scratch: Any = field(default=None, repr=False)
    """The copy of the image that is used instead of it (cowfs.store.served.crash.Scratch), or None."""
    fd: int = field(default=-1, repr=False)
    """A descriptor of the image, which cowfs's own mount may hide at *path*; -1 if there is none."""
    is_in_place: Callable[[], bool] = field(default=lambda: True, repr=False)
    """Returns whether *path* still leads to this store."""
    locked: int = field(default=-1, repr=False)
    """The descriptor that has the lock; -1 if there is none."""
    most_bytes: int = field(default=0, repr=False)
    """The largest size in bytes that the image has had."""
    dev: str = ""
    """``major:minor`` of the mount that uses the store; "" if it is not mounted."""
    saved: float = field(default_factory=time.time, repr=False)
    """When everything was last on disk (seconds since the epoch)."""
    failure: OSError | None = field(default=None, repr=False)
    """The error of a failed write whose data is lost; None if there was none."""
    _closed: bool = field(default=False, repr=False)

    @property
    def xattr_prefix(self) -> bytes:
        """The prefix of the overlay's own attributes: ``trusted.overlay.`` or ``user.overlay.``."""
        return self.header.xattrs.encode()

    @property
    def is_apart(self) -> bool:
        """Whether upper and work dir belong to another program, which would not find a new upper."""
        return isinstance(self.layer, ApartLayer)

    @property
    def is_aufs(self) -> bool:
        """Whether it has the format of aufs: no redirects, metacopies, or checkpoints."""
        return isinstance(self.layer, AufsStore)

    @property
    def layers(self) -> Layers:
        """The checkpoints."""
        return Layers(self.layer, self.xattr_prefix)

    @property
    def notebook(self) -> Key:
        """The directory of cowfs in the store; its inode can hold cowfs's xattrs, too."""
        return layout.find(self.layer, layout.PRIVATE)

    @property
    def size(self) -> int:
        """The size of the store's filesystem in bytes, free or not."""
        room = self.layer.statfs()
        return room.blocks * room.frsize

    @property
    def taken(self) -> int:
        """The bytes in use in the store's filesystem."""
        room = self.layer.statfs()
        return (room.blocks - room.bfree) * room.frsize

    @property
    def free(self) -> int:
        """The bytes that can still be written."""
        room = self.layer.statfs()
        return (room.bfree if os.geteuid() == 0 else room.bavail) * room.frsize

    def mounted_as(self, dev: str) -> None:
        """Show others who want the store which mount uses it."""
        self.dev = dev
        if self.locked >= 0 and dev:
            lock.mark_mounted(self.locked, dev)

    def make_room(self) -> bool:
        """Grow a full store in memory; False for any other store, and at the limit. Blocks."""
        return self.memory is not None and bool(self.memory.make_room(self.work))

    def save(self) -> None:
        """Write everything to disk.

        Blocks until it is there; any thread may call it. OSError if writing fails. The engine in this process
        keeps the data and can try again. The kernel discards it: then *failure* is set for good.
        """
        if self.read_only:
            return
        now = time.time()
        try:
            self.layer.sync()
        except OSError as error:
            self.not_saved(error)
            raise
        if self.failure is not None:
            raise self.failure
        self.saved = now

    def not_saved(self, error: OSError) -> None:
        """Note that something could not be written to disk. Any thread may call it."""
        told = error.errno in LACK_OF_ROOM | {errno.EIO, errno.EROFS}
        if told and not hasattr(self.layer, "image") and self.failure is None:
            self.failure = error
            log.error(
                "%s: some changes could not be written to the disk and are lost: %s",
                self.path,
                error.strerror,
            )

    def bind(self, lowers: Sequence[Identity], volatile: Sequence[str] | None = None) -> bool:
        """Record that the store belongs to *lowers*, and, if not None, which paths are *volatile* (not kept).

        Blocks until that is on disk. open_store() checks whether it is allowed. Return True if the store had
        no lowers and no history: then give upper/ the attributes of the topmost lower's root.
        """
        header = bound(self.header, lowers, volatile)
        if self.read_only or header == self.header:
            return False
        first = not self.header.lowers and not self.header.adopted
        if first:
            header = made_by(seen(header, beneath.now()), user_namespace.id_map())
        layout.save_header(self.layer, header)
        self.layer.sync()
        self.header = header
        return first

    def saw_lowers(self, when: int) -> None:
        """Record that, as of *when* (ns), the lowers have not changed any file that the store changes.

        Blocks until it is on disk.
        """
        header = seen(self.header, when)
        layout.save_header(self.layer, header)
        self.layer.sync()
        self.header = header

    def know_modules(self, modules: Sequence[Identity]) -> None:
        """Record which modules may be mounted above the store's lowers. Blocks until it is on disk."""
        header = replace(self.header, modules=tuple(modules))
        layout.save_header(self.layer, header)
        self.layer.sync()
        self.header = header

    def close(self) -> None:
        """Write everything to disk and close the store; release its lock last.

        Blocks. Safe to call twice. StoreError if something could not be written; the store is closed anyway.
        """
        if self._closed:
            return
        self._closed = True
        with self.release:
            if not self.read_only:
                try:
                    self.save()
                except OSError as error:
                    raise StoreError(
                        f"{self.path}: the last changes could not be written: {error.strerror}",
                        f"cowfs check -n {self.path} tells whether the rest is sound",
                    ) from error


def finish(
    kind: Kind,
    path: str,
    layer: UpperLayer,
    header: Header,
    want: Wanted,
    release: ExitStack,
) -> Store:
    """Return the open store of a layer that contains one; close() calls *release*.

    WrongLower; StoreError for leftovers of kernel mounts.
    """
    use_format(layer, XattrFormat(header.xattrs.encode()))
    if not want.force_lower:
        check_lowers(header, want.lowers, path, with_modules=True)
    upper, work = layout.find(layer, layout.UPPER), layout.find(layer, layout.WORK)
    if upper is None or work is None:
        raise StoreError(f"{path}: an incomplete store: upper/ or work/ is missing", layout.MADE_BY)
    if not all(stat.S_ISDIR(layer.stat(key).st_mode) for key in (upper, work)):
        raise StoreError(f"{path}: not a store: upper or work is not a directory", layout.MADE_BY)
    layout.unshut_work(layer, work)
    if layout.find(layer, layout.WORK, b"work", b"incompat") is not None:
        raise StoreError(
            f"{path}: was mounted by overlayfs with the volatile option; after a crash it may be incomplete",
            "copy the store (cp -a) before you do anything; see cowfs-store(5)",
        )
    temporaries = index = None
    if not want.read_only:
        temporaries = layout.ensure_directory(layer, work, b"work", 0o700)
        layout.empty(layer, temporaries)
        index = layout.ensure_directory(layer, work, layout.INDEX, 0o700)
        for ours in (temporaries, index):
            layout.drop_inherited(layer, ours, acl.DEFAULT)
        if isinstance(layer, AufsStore):
            layer.temporaries = temporaries
            layer.clear_leftovers()
    store = Store(
        kind,
        path,
        layer,
        header,
        upper,
        temporaries,
        index,
        read_only=want.read_only,
    )
    if not want.read_only and header.xattrs == USER:
        store.links = layout.ensure_directory(layer, store.notebook, layout.LINKS, 0o700)
    if header.version > 1:
        _settle_layers(store)
    store.release = release.pop_all()
    return store


def _settle_layers(store: Store) -> None:
    """Find the layers below the upper, and complete an operation that a crash interrupted."""
    layers = store.layers
    layers.frozen(store.upper)  # raises if one is missing
    if not store.read_only:
        layers.settle(store.upper, store.index, store.links)
        rebased.exchange_names(store.layer, layers, store.upper, store.xattr_prefix)
        for number in layers.rubbish(store.upper):
            for _ in layers.remove(number):
                pass
        frozen = [one.key for one in layers.all().values()]
        store.header = rebased.settle(store.layer, store.upper, store.header, frozen)
    store.frozen = layers.frozen(store.upper)
