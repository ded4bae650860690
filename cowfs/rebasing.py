"""Carry the changes of a store, which is not mounted, to another version of its lowers: at once, or not."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace

from cowfs.changes.composite import Composite
from cowfs.changes.merged import Merged
from cowfs.changes.rebase import DryRun, Maker, Rebase, Told
from cowfs.changes.upper_maker import UpperMaker
from cowfs.changes.version import Tree
from cowfs.client import mount_with_store
from cowfs.errors import StoreError
from cowfs.exports.entries import feed
from cowfs.exports.losses import Losses
from cowfs.exports.plan import Item, everything
from cowfs.exports.target import new_directory
from cowfs.exports.upper import Upper
from cowfs.linux.files import LACK_OF_ROOM
from cowfs.offline_changes import Lowers, Tell, identities, must_be_there, recorded_lowers, styles_of
from cowfs.overlay.stack import Stack, open_index
from cowfs.overlay.xattr_format import XattrFormat
from cowfs.store.format import checkpoints, layout, rebased
from cowfs.store.format.checkpoints import as_layers
from cowfs.store.format.header import Header, bound, check_lowers
from cowfs.store.format.sniff import is_plain_directory
from cowfs.store.served.open import open_store
from cowfs.store.served.store import Store
from cowfs.types import Identity
from cowfs.union import open_lowers


@dataclass(slots=True)
class Rebased:
    """What a rebase has done, or would do."""

    kept: int = 0
    """How many names of the store stay, without directories."""
    told: list[Told] = field(default_factory=list)
    """What does not stay, and what is in conflict, which does."""
    old: list[Identity] = field(default_factory=list)
    new: list[Identity] = field(default_factory=list)

    @property
    def conflicts(self) -> list[Told]:
        return [one for one in self.told if one.kind == "conflict"]


@dataclass(slots=True)
class _Sides:
    store: Store
    xattrs: XattrFormat
    old: Stack
    new: Stack
    changes: Composite
    after: Merged


def rebase(
    path: str,
    old: Lowers,
    new: Lowers,
    *,
    dry_run: bool = False,
    conflicts: str = "",
    tell: Tell = lambda _: None,
    tick: Callable[[bytes], None] = lambda _: None,
) -> Rebased:
    """Let the store at *path*, made for the lowers *old*, belong to *new*, with the changes it has.

    Whenever it is interrupted the store is the old one or the new one. What both have changed stays as the
    store has it, and is told; with *conflicts* the versions of each are written to that directory, which is
    made. Blocks. Raises CowfsError.
    """
    must_be_there(path)
    mount = mount_with_store(path)
    if mount is not None:
        raise StoreError(f"{path}: is mounted", "unmount it first")
    if is_plain_directory(path):
        raise StoreError(f"{path}: not a store", "give the store that is to have another root")
    assert new.given is not None
    result = Rebased()
    with ExitStack() as stack:
        store = open_store(path, engine=old.engine, read_only=dry_run, progress=tell)
        stack.callback(store.close)
        before = _before(path, store, old)
        result.old = _identities(before, store)
        result.new = _identities(new, store)
        _refuse(store)
        sides = _open(store, before, new, result, stack)
        if dry_run:
            result.kept = _walk(sides, DryRun(), result, tick)
        else:
            try:
                _switch(sides, result, conflicts, tick)
            except OSError as error:
                hint = "make it larger (cowfs grow), or delete files" if error.errno in LACK_OF_ROOM else ""
                name = f": {os.fsdecode(error.filename)}" if error.filename else ""
                raise StoreError(f"{path}: nothing was changed: {error.strerror}{name}", hint) from None
        if conflicts and dry_run and result.conflicts:
            _write_conflicts(sides, result.conflicts, conflicts)
    return result


def _before(path: str, store: Store, old: Lowers) -> Lowers:
    """Return the lowers that the store belongs to, which may be given."""
    if old.given is None:
        given, offsets, data_only = recorded_lowers(path, store.header.lowers, old.offsets)
        return Lowers(given, offsets, old.engine, old.force, data_only)
    if not old.force:
        check_lowers(store.header, _identities(old, store), path)
    return old


def _identities(lowers: Lowers, store: Store) -> list[Identity]:
    styles = styles_of(store.header.lowers, lowers.given)
    return identities(lowers.given or (), lowers.offsets, lowers.data_only, styles)


def _refuse(store: Store) -> None:
    """StoreError for what a store holds besides its changes that the old lowers are needed for."""
    if store.is_aufs:
        raise StoreError(
            f"{store.path}: the store has the aufs format, which cannot be rebased",
            f"cowfs convert {store.path} --to overlayfs",
        )
    if store.is_apart:
        raise StoreError(
            f"{store.path}: is the upperdir of another program, which would not find another again",
            "make a new store on the new root, and cowfs apply",
        )
    names = [one.name for one in store.layers.all().values() if one.name]
    if names:
        raise StoreError(
            f"{store.path}: has checkpoints, which show the old root: {', '.join(sorted(names)[:5])}",
            f"copy the store if you need them, then: cowfs checkpoint {store.path} NAME --delete",
        )
    trash = layout.find(store.layer, layout.PRIVATE, b"trash")
    if trash is not None and store.layer.readdir(trash):
        raise StoreError(
            f"{store.path}: keeps what `cowfs revert` has taken back, which is of the old root",
            f"cowfs vacuum {store.path} --trash throws it away",
        )


def _open(store: Store, old: Lowers, new: Lowers, result: Rebased, stack: ExitStack) -> _Sides:
    xattrs = XattrFormat(store.xattr_prefix)
    layers = []
    for lowers, known in ((old, result.old), (new, result.new)):
        styles = [low.whiteouts for low in known]
        layers.append(
            open_lowers(lowers.given or (), lowers.engine, lowers.offsets, lowers.data_only, styles)
        )
        for layer in layers[-1]:
            stack.callback(layer.close)
    frozen = as_layers(store.layer, store.frozen)
    fresh = store.layers.is_fresh(store.upper)
    index = None if fresh else layout.find(store.layer, layout.WORK, layout.INDEX)
    shown = None if index is None else open_index(store.layer, index, xattrs)
    return _Sides(
        store,
        xattrs,
        Stack(layers[0], xattrs),
        Stack(layers[1], xattrs),
        Composite([store.layer, *frozen], xattrs, store.upper, index),
        Merged(Stack([store.layer, *frozen, *layers[0]], xattrs, store.upper), shown),
    )


def _walk(sides: _Sides, maker: Maker, result: Rebased, tick: Callable[[bytes], None]) -> int:
    walk = Rebase(sides.changes, sides.old, sides.new, maker, result.told.append, tick)
    walk.run()
    return walk.kept


def _switch(sides: _Sides, result: Rebased, conflicts: str, tick: Callable[[bytes], None]) -> None:
    store, layers = sides.store, sides.store.layers
    header = store.header
    wanted = bound(header, result.new)
    store.header = checkpoints.with_layers(store.layer, header)  # until the old upper is gone
    new = layers.prepare(store.upper, ())
    try:
        result.kept = _walk(sides, UpperMaker(store.layer, new.key, sides.xattrs), result, tick)
        if conflicts and result.conflicts:
            _write_conflicts(sides, result.conflicts, conflicts)
        rebased.announce(store.layer, new.key, wanted)
        store.layer.sync()
    except BaseException:
        with suppress(OSError):
            rebased.retract(store.layer)
            for _ in layers.remove(new.number):
                pass
            layout.save_header(store.layer, header)
        raise
    layers.exchange(store.upper, new)
    store.upper, store.frozen = new.key, []
    try:
        _complete(store, wanted)
    except OSError as error:
        raise StoreError(
            f"{store.path}: belongs to the new root now, but was not cleaned up: {error.strerror}",
            "the next mount completes it",
        ) from None


def _complete(store: Store, wanted: Header) -> None:
    """Do what is left to do once the new upper has its place; the next opening does the same."""
    layers = store.layers
    store.layer.sync()
    layers.settle(store.upper, store.index, store.links)
    for number in layers.rubbish(store.upper):
        for _ in layers.remove(number):
            pass
    store.header = rebased.settle(store.layer, store.upper, replace(store.header, lowers=wanted.lowers))


# --- what is in conflict, to look at


def _write_conflicts(sides: _Sides, found: Sequence[Told], target: str) -> None:
    """Make a directory with three trees: what each of the old, the new and the changed has of it."""
    trees: list[tuple[bytes, Tree, bool]] = [
        (b"old", Merged(sides.old), True),
        (b"new", Merged(sides.new), True),
        (b"changed", sides.after, False),
    ]
    losses = Losses()
    with new_directory(target, force=True) as top:
        for name, tree, is_below in trees:
            os.mkdir(name, 0o700, dir_fd=top)
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
            try:
                paths = sorted({one.base if is_below else one.path for one in found})
                upper = Upper(fd, losses, lambda *_: None, whole=True)
                try:
                    feed(_chosen(tree, paths), tree, upper, losses, lambda *_: None, None)
                finally:
                    upper.close()
            finally:
                os.close(fd)


def _chosen(tree: Tree, paths: Sequence[bytes]) -> list[tuple[bytes, Item]]:
    """Return these paths, as far as a tree has them, with what is above and below each."""
    chosen: set[bytes] = set()
    for path in paths:
        if tree.node(path) is None:
            continue
        above = path
        while above:
            above = above.rpartition(b"/")[0]
            chosen.add(above)
        chosen.add(path)
        if path:
            chosen.update(below for below, _ in everything(tree, path))
    return [(path, Item.NODE) for path in sorted(chosen, key=lambda path: path.replace(b"/", b"\0"))]
