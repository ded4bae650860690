"""Merge a layer whose checkpoint was deleted with the layer above it.

A new layer is made with the merged contents of both: links to their files, and new directories. One rename
then replaces the upper one of the two. Before the rename nothing has changed; after it, both old layers can
be removed.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import closing, suppress

from cowfs.changes.composite import Composite
from cowfs.changes.lowers import Lower, LowerView
from cowfs.layers.acl import ACCESS, DEFAULT
from cowfs.layers.base import Key, LowerLayer
from cowfs.layers.frozen import FrozenLayer
from cowfs.overlay.stack import Stack, is_whiteout
from cowfs.overlay.xattr_format import XattrFormat
from cowfs.store.format.checkpoints import UPPER, Checkpoint, as_layers
from cowfs.store.served.store import Store

log = logging.getLogger(__name__)

_Directory = tuple[Key, Key, Lower | None]
"""A directory: in both layers, in the new layer, and in the layers below."""
_CAPABILITY = b"security.capability"
_AT_A_TIME = 20
"""At most this many layers are merged when a store is opened. The others follow at the next opening."""


class NotMerged(Exception):
    """Two layers cannot be merged, and stay as they are."""


def merge_deleted(
    store: Store, lowers: Sequence[LowerLayer], tick: Callable[[], None] = lambda: None
) -> None:
    """Merge or remove each layer whose checkpoint was deleted and that no other layer needs. Blocks.

    Call it only while nothing uses the store's keys. If it fails, the layers stay as they are. *lowers* are
    the store's lowers. *tick* is called for each name that is merged or removed.
    """
    if store.read_only or any(layer.waits for layer in lowers):
        return
    kept: set[int] = set()
    for _ in range(_AT_A_TIME):
        found = _next(store, kept)
        if found is None:
            break
        one, child = found
        try:
            _merge(store, one, child, lowers, tick)
        except (NotMerged, OSError) as why:
            log.info("a deleted checkpoint keeps its layer %d: %s", one.number, why)
            kept.add(one.number)
        for number in store.layers.rubbish(store.upper):
            for _ in store.layers.remove(number):
                tick()
        store.frozen = store.layers.frozen(store.upper)


def is_pending(store: Store) -> bool:
    """Whether :func:`merge_deleted` has something to merge. Blocks."""
    return _next(store, set()) is not None


def _next(store: Store, kept: set[int]) -> tuple[Checkpoint, int] | None:
    """Return a layer of a deleted checkpoint with exactly one layer directly above it, and that layer."""
    layers = store.layers
    for one in layers.all().values():
        if not one.name and one.number not in kept:
            children = layers.directly_above(one.number, store.upper)
            if len(children) == 1:
                return one, children[0]
    return None


def _merge(
    store: Store, one: Checkpoint, child: int, lowers: Sequence[LowerLayer], tick: Callable[[], None]
) -> None:
    layers, layer = store.layers, store.layer
    root = store.upper if child == UPPER else layers.all()[child].key
    if child == UPPER and any(layer.readdir(key) for key in (store.index, store.links) if key is not None):
        raise NotMerged("the index of hard links is in use until the next checkpoint")
    xattrs = XattrFormat(store.xattr_prefix)
    above = FrozenLayer(layer, root)
    both = Composite([above, FrozenLayer(layer, one.key)], xattrs)
    frozen = as_layers(layer, layers.under(one)[1:])
    new = layers.prepare(root, one.below, fresh=False)
    try:
        _Merge(store, both, Stack([*frozen, *lowers], xattrs)).fill(new.key, tick)
        layer.sync()
    except BaseException:
        for _ in layers.remove(new.number):
            pass
        raise
    if child == UPPER:
        layers.exchange(store.upper, new)
        store.upper = new.key
        with suppress(OSError):  # the kernel's mark of which upper the index belongs to
            layer.removexattr(store.index, xattrs.prefix + b"upper")
    else:
        layers.replace(child, new)
    layer.sync()


class _Merge:
    def __init__(self, store: Store, both: Composite, below: Stack) -> None:
        self._layer = store.layer
        self._both = both
        self._xattrs = below.format
        self._below = LowerView(below)

    def fill(self, made: Key, tick: Callable[[], None]) -> None:
        """Fill the empty directory *made* with the merged contents of both layers; *tick* after each name."""
        waiting: list[_Directory] = [(self._both.root, made, self._below.root())]
        dated: list[tuple[Key, Key]] = []
        while waiting:
            source, target, base = waiting.pop()
            dated.append((source, target))
            for name in sorted(entry.name for entry in self._both.readdir(source)):
                inside = self._entry(source, target, base, name)
                tick()
                if inside is not None:
                    waiting.append(inside)
        for source, target in reversed(dated):
            attr = self._both.stat(source)
            self._layer.utimens(target, attr.st_atime_ns, attr.st_mtime_ns)

    def _entry(self, source: Key, target: Key, base: Lower | None, name: bytes) -> _Directory | None:
        """Make one entry; return it if it is a directory, to be filled."""
        both, layer = self._both, self._layer
        hit = both.lookup(source, name)
        if hit is None:
            return None
        key, attr = hit
        top = key.places[0][1]
        if is_whiteout(both, key, attr, self._xattrs):
            # If it hid nothing, the kernel might show it, or report the directory as corrupt.
            if base is not None and self._below.lookup(base, name) is not None:
                self._whiteout(top, target, name)
            return None
        if stat.S_ISDIR(attr.st_mode):
            return key, self._directory(key, target, name), self._base(key, base, name)
        if len(key.places) > 1:
            self._complete(key)
        elif self._has_other_notes(key):
            if attr.st_nlink > 1:
                raise NotMerged("a file of several names has its data where another name leads to")
            self._metacopy(key, target, name)
            return None
        layer.link(top, target, name)
        return None

    def _whiteout(self, whiteout: Key, directory: Key, name: bytes) -> None:
        try:
            self._layer.link(whiteout, directory, name)
        except OSError as failure:
            if failure.errno != errno.EMLINK:
                raise
            self._layer.mknod(directory, name, stat.S_IFCHR, 0, 0, 0)

    def _base(self, key: Key, base: Lower | None, name: bytes) -> Lower | None:
        """Return the directory that the layers below have for a directory of both layers; None: none."""
        if self._xattrs.opaque in key.notes:
            return None
        redirect = key.notes.get(self._xattrs.redirect)
        if redirect is None:
            found = None if base is None else self._below.lookup(base, name)
        elif redirect.startswith(b"/"):
            found = self._below.resolve(redirect[1:])
        else:
            found = None if base is None else self._below.lookup(base, redirect)
        return found if found is not None and found.is_dir else None

    def _has_other_notes(self, key: Key) -> bool:
        """Whether a metacopy needs other overlay attributes in the merged layer."""
        for name in (self._xattrs.redirect, self._xattrs.partial):
            with suppress(OSError):
                if name in key.notes and self._layer.getxattr(key.places[0][1], name) != key.notes[name]:
                    return True
        if self._xattrs.redirect not in key.notes or self._xattrs.partial in key.notes:
            return False
        try:
            self._layer.getxattr(key.places[0][1], self._xattrs.redirect)
        except OSError:
            return True
        return False

    def _metacopy(self, key: Key, parent: Key, name: bytes) -> None:
        """Make a metacopy that finds its data without the lower of the two layers."""
        both, layer = self._both, self._layer
        attr = both.stat(key)
        made, file = layer.create(parent, name, 0o600, attr.st_uid, attr.st_gid)
        file.close()
        layer.truncate(made, attr.st_size)
        for xattr in both.listxattr(key):
            layer.setxattr(made, xattr, both.getxattr(key, xattr))
        layer.chmod(made, stat.S_IMODE(attr.st_mode))
        layer.utimens(made, attr.st_atime_ns, attr.st_mtime_ns)

    def _directory(self, key: Key, parent: Key, name: bytes) -> Key:
        both, layer, xattrs = self._both, self._layer, self._xattrs
        attr = both.stat(key)
        made = layer.mkdir(parent, name, 0o700, attr.st_uid, attr.st_gid)
        for inherited in (ACCESS, DEFAULT):
            with suppress(OSError):
                layer.removexattr(made, inherited)
        kept = {xattrs.protattr, xattrs.impure, xattrs.origin, *key.notes}
        for xattr in both.listxattr(key):
            if xattr in kept or not xattrs.is_own(xattr):
                layer.setxattr(made, xattr, both.getxattr(key, xattr))
        layer.chmod(made, stat.S_IMODE(attr.st_mode))
        return made

    def _complete(self, key: Key) -> None:
        """Copy the data of a metacopy in the upper of the two layers from the lower one."""
        layer, xattrs, top = self._layer, self._xattrs, key.places[0][1]
        with suppress(OSError):
            layer.getxattr(top, xattrs.partial)
            raise NotMerged("a file is partly copied up")
        attr = layer.stat(top)
        capability = None
        with suppress(OSError):
            capability = layer.getxattr(top, _CAPABILITY)
        with (
            closing(self._both.open(key, os.O_RDONLY)) as source,
            closing(layer.open(top, os.O_RDWR)) as file,
        ):
            source.copy_to(file, attr.st_size)
            file.fsync(False)
        if capability is not None:
            layer.setxattr(top, _CAPABILITY, capability)
        layer.chmod(top, stat.S_IMODE(attr.st_mode))
        layer.utimens(top, attr.st_atime_ns, attr.st_mtime_ns)
        layer.removexattr(top, xattrs.metacopy)
        with suppress(OSError):
            layer.removexattr(top, xattrs.redirect)
