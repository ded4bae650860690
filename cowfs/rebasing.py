"""Carry the changes of a store, which is not mounted, to another version of its lowers: at once, or not."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace

from cowfs.changes.composite import Composite
from cowfs.changes.imagined import ImaginedUpper
from cowfs.changes.layers_rebased import Step, steps
from cowfs.changes.merged import Merged
from cowfs.changes.names import Expect, count_names, not_asked
from cowfs.changes.rebase import Maker, Outcome, Rebase
from cowfs.changes.upper_maker import UpperMaker
from cowfs.changes.version import Tree
from cowfs.client import mount_with_store
from cowfs.errors import StoreError, UsageError
from cowfs.exports.entries import Withheld, feed
from cowfs.exports.losses import Losses
from cowfs.exports.plan import Item, everything
from cowfs.exports.target import must_be_elsewhere, must_be_possible, new_directory
from cowfs.exports.upper import Upper
from cowfs.layers.base import LowerLayer
from cowfs.layers.beneath import check_name
from cowfs.layers.frozen import FrozenLayer
from cowfs.linux.files import LACK_OF_ROOM
from cowfs.lowers import open_lowers
from cowfs.mountpoint import check_apart
from cowfs.offline_changes import Lowers, Tell, identities, must_be_there, recorded_lowers, styles_of
from cowfs.overlay.index import open_index
from cowfs.overlay.mapped_owners import as_in_store
from cowfs.overlay.stack import Stack
from cowfs.overlay.xattr_format import XattrFormat
from cowfs.store.format import checkpoints, layout, rebased
from cowfs.store.format.checkpoints import Prepared, as_layers
from cowfs.store.format.header import Header, bound, check_lowers
from cowfs.store.served.open import open_store
from cowfs.store.served.store import Store
from cowfs.types import Identity
from cowfs.url.names import place
from cowfs.url.trust import forbidden


@dataclass(slots=True)
class Rebased:
    """What a rebase has done, or would do."""

    kept: int = 0
    """How many names of the store stay, without directories."""
    told: list[Outcome] = field(default_factory=list)
    """The changes that are dropped, and the conflicts, which are kept."""
    old: list[Identity] = field(default_factory=list)
    new: list[Identity] = field(default_factory=list)

    @property
    def conflicts(self) -> list[Outcome]:
        return [one for one in self.told if one.kind == "conflict"]


@dataclass(slots=True)
class _Sides:
    """What one upper is made of."""

    changes: Composite
    old: Stack
    new: Stack
    after: Merged
    checkpoint: str
    number: int
    told: list[Outcome] = field(default_factory=list)

    @property
    def place(self) -> str:
        """The name of a directory for it: the store may call it anything."""
        try:
            return checkpoints.check_name(self.checkpoint)
        except UsageError:
            return "-" if self.checkpoint == "-" else f"-{self.number}"


@dataclass(slots=True)
class _Work:
    store: Store
    xattrs: XattrFormat
    old: list[LowerLayer]
    new: list[LowerLayer]
    result: Rebased
    tick: Callable[[bytes], None]
    sources: list[str]
    """The store and all lowers, as the user gave them or as the store records them."""
    warn: Tell = lambda _: None
    sides: list[_Sides] = field(default_factory=list)
    made: dict[int, LowerLayer] = field(default_factory=dict)
    """By the number of the layer that it stands for."""
    chains: dict[int | None, tuple[int, ...]] = field(default_factory=lambda: {None: ()})
    """By the same: that, and what is below it."""


def rebase(
    store: str,
    new: Lowers,
    old: Lowers | None = None,
    *,
    dry_run: bool = False,
    conflicts: str = "",
    tell: Tell = lambda _: None,
    tick: Callable[[bytes], None] = lambda _: None,
    expect: Expect | None = None,
) -> Rebased:
    """Move a store, with its changes and checkpoints, to *new*, another version of its lowers.

    *old* are its lowers; the default is where the store last had them. What both sides have changed stays as
    in the store, and is in the result; with *conflicts* all versions of it are written to that directory,
    which is created. With *dry_run* nothing changes. If it is interrupted, the store is the old one or the
    new one. *tick* and *expect* are as in :func:`convert`. Blocks. Raises CowfsError.
    """
    old, expect = old or Lowers(), expect or not_asked
    if mount_with_store(store) is not None:
        raise StoreError(f"{store}: is mounted", "unmount it first")
    must_be_there(store)
    assert new.given is not None
    result = Rebased()
    if not dry_run:
        _judge(store, old, new, conflicts)
    with ExitStack() as stack:
        opened = open_store(store, engine=old.engine, read_only=dry_run, progress=tell)
        stack.callback(opened.close)
        before = _before(store, opened, old)
        result.old = _identities(before, opened)
        result.new = _identities(new, opened)
        _refuse(opened, new)
        work = _open(opened, (before, new), result, tick, stack)
        work.warn = tell
        expect(functools.partial(count_names, opened.layer, opened.upper))
        if dry_run:
            for step in steps(opened.layers, opened.upper):
                root = opened.upper if step.top is None else step.top.key
                imagined = ImaginedUpper(opened.layer, root, work.xattrs)
                _walk(work, step, imagined, imagined)
            if conflicts and result.conflicts:
                _write_conflicts(work, conflicts)
        else:
            try:
                _switch(work, conflicts)
            except OSError as error:
                hint = "make it larger (cowfs grow), or delete files" if error.errno in LACK_OF_ROOM else ""
                name = f": {os.fsdecode(error.filename)}" if error.filename else ""
                raise StoreError(f"{store}: nothing was changed: {error.strerror}{name}", hint) from None
    return result


def _judge(path: str, old: Lowers, new: Lowers, conflicts: str) -> None:
    """Raise CowfsError for what is refused, before a byte of the store is changed."""
    with ExitStack() as stack:
        store = open_store(path, engine=old.engine, read_only=True)
        stack.callback(store.close)
        before = _before(path, store, old)
        seen = Rebased(old=_identities(before, store), new=_identities(new, store))
        _refuse(store, new)
        _open(store, (before, new), seen, lambda _: None, stack)
        checkpoints.must_have_room_for(len(steps(store.layers, store.upper)), len(store.layers.all()))
    if conflicts:
        must_be_elsewhere(conflicts, [path])
        must_be_possible(conflicts)


def _before(path: str, store: Store, old: Lowers) -> Lowers:
    """Return the lowers that the store belongs to, which may be given."""
    if old.given is None:
        given, offsets, data_only = recorded_lowers(path, store.header.lowers, old.offsets, "--from")
        return Lowers(given, offsets, old.engine, old.force, data_only)
    if not old.force:
        check_lowers(store.header, _identities(old, store), path)
    return old


def _identities(lowers: Lowers, store: Store) -> list[Identity]:
    styles = styles_of(store.header.lowers, lowers.given)
    return identities(lowers.given or (), lowers.offsets, lowers.data_only, styles)


def _refuse(store: Store, new: Lowers) -> None:
    """CowfsError for a store that cannot stand on the *new* lowers, or holds what needs the old ones."""
    check_apart(store.path, new.given or ())
    if store.is_aufs:
        raise StoreError(
            f"{store.path}: the store has the aufs format, which cannot be rebased",
            f"cowfs convert {store.path} --to overlayfs",
        )
    if store.is_apart:
        raise StoreError(
            f"{store.path}: is the upperdir of another program, which would not find the new one",
            "make a new store on the new root, and cowfs apply",
        )
    trash = layout.find(store.layer, layout.PRIVATE, b"trash")
    if trash is not None and store.layer.readdir(trash):
        raise StoreError(
            f"{store.path}: its trash holds files that `cowfs revert` removed, of the old root",
            f"cowfs vacuum {store.path} --trash empties it",
        )


def _open(
    store: Store,
    lowers: tuple[Lowers, Lowers],
    result: Rebased,
    tick: Callable[[bytes], None],
    stack: ExitStack,
) -> _Work:
    opened = []
    for one, known in zip(lowers, (result.old, result.new), strict=True):
        styles = [low.whiteouts for low in known]
        opened.append(open_lowers(one.given or (), one.engine, one.offsets, one.data_only, styles))
        for layer in opened[-1]:
            stack.callback(layer.close)
        opened[-1] = as_in_store(opened[-1], [low.kind for low in known], store.header.owners)
    sources = [place(path) for path in (store.path, *(lowers[0].given or ()), *(lowers[1].given or ()))]
    return _Work(store, XattrFormat(store.xattr_prefix), opened[0], opened[1], result, tick, sources)


def _sides(work: _Work, step: Step) -> _Sides:
    store, xattrs = work.store, work.xattrs
    below = as_layers(store.layer, list(step.below))
    merged = as_layers(store.layer, list(step.merged))
    old = Stack([*below, *work.old], xattrs)
    new = Stack([*(work.made[number] for number in work.chains[step.base]), *work.new], xattrs)
    if step.top is not None:
        top = FrozenLayer(store.layer, step.top.key)
        after = Merged(Stack([top, *merged, *old.layers], xattrs))
        return _Sides(Composite([top, *merged], xattrs), old, new, after, step.top.name or "-", step.number)
    index = None
    if not store.layers.is_fresh(store.upper):
        index = layout.find(store.layer, layout.WORK, layout.INDEX)
    shown = None if index is None else open_index(store.layer, index, xattrs)
    return _Sides(
        Composite([store.layer, *merged], xattrs, store.upper, index),
        old,
        new,
        Merged(Stack([store.layer, *merged, *old.layers], xattrs, store.upper), shown),
        "",
        step.number,
    )


def _walk(work: _Work, step: Step, maker: Maker, made: LowerLayer) -> None:
    """Let *maker* make one upper, which *made* shows then."""
    sides = _sides(work, step)

    def tell(told: Outcome) -> None:
        sides.told.append(told._replace(checkpoint=sides.checkpoint))

    walk = Rebase(sides.changes, sides.old, sides.new, maker, tell, work.tick)
    walk.run()
    work.sides.append(sides)
    work.made[step.number] = made
    work.chains[step.number] = (step.number, *work.chains[step.base])
    work.result.told += sides.told
    work.result.kept += walk.kept


def _switch(work: _Work, conflicts: str) -> None:
    store, layers = work.store, work.store.layers
    header = store.header
    wanted = bound(header, work.result.new)
    plan = steps(layers, store.upper)
    checkpoints.must_have_room_for(len(plan), len(layers.all()))
    store.header = checkpoints.with_layers(store.layer, header)  # until the old upper is gone
    first = layers.next_number()
    try:
        new = _make(work, plan)
        if conflicts and work.result.conflicts:
            _write_conflicts(work, conflicts)
        rebased.announce(store.layer, new.key, wanted, first)
        store.layer.sync()
    except BaseException:
        with suppress(OSError):
            rebased.retract(store.layer)
            for number in range(layers.next_number() - 1, first - 1, -1):
                for _ in layers.remove(number):
                    pass
            layout.save_header(store.layer, header)
        raise
    layers.exchange(store.upper, new)
    store.upper = new.key
    try:
        _complete(store, wanted)
    except OSError as error:
        raise StoreError(
            f"{store.path}: belongs to the new root now, but was not cleaned up: {error.strerror}",
            "the next mount completes it",
        ) from None


def _make(work: _Work, plan: Sequence[Step]) -> Prepared:
    """Make all layers; return the upper, which is the last."""
    store, layers = work.store, work.store.layers
    numbers: dict[int, int] = {}
    for step in plan[:-1]:
        assert step.top is not None
        new = layers.prepare(step.top.key, _on(step, numbers), fresh=False)
        numbers[step.number] = new.number
        _fill(work, step, new)
        rebased.set_future_name(store.layer, layers, new.key, new.number, step.top, store.xattr_prefix)
    new = layers.prepare(store.upper, _on(plan[-1], numbers))
    _fill(work, plan[-1], new)
    return new


def _on(step: Step, numbers: dict[int, int]) -> tuple[int, ...]:
    return () if step.base is None else (numbers[step.base],)


def _fill(work: _Work, step: Step, new: Prepared) -> None:
    layer = work.store.layer
    _walk(work, step, UpperMaker(layer, new.key, work.xattrs), FrozenLayer(layer, new.key))


def _complete(store: Store, wanted: Header) -> None:
    """Complete the work after the new upper has its place; the next opening does the same."""
    layers = store.layers
    store.layer.sync()
    layers.settle(store.upper, store.index, store.links)
    rebased.exchange_names(store.layer, layers, store.upper, store.xattr_prefix)
    for number in layers.rubbish(store.upper):
        for _ in layers.remove(number):
            pass
    store.frozen = layers.frozen(store.upper)
    frozen = [one.key for one in layers.all().values()]
    header = replace(store.header, lowers=wanted.lowers)
    store.header = rebased.settle(store.layer, store.upper, header, frozen)


# --- what is in conflict, to look at


def _write_conflicts(work: _Work, target: str) -> None:
    """Make a directory with three trees: what each of the old, the new and the changed has of it.

    Of the changes of a checkpoint it is one below ``checkpoints``. If other users can change the store or a
    root, it has no set-ID bits and no devices: these would be this user's.
    """
    withheld = forbidden(work.sources, (0, os.geteuid()))
    losses = Losses()
    with new_directory(target, force=True) as top:
        for sides in work.sides:
            conflicts = [one for one in sides.told if one.kind == "conflict"]
            if not conflicts:
                continue
            with _below(top, *(("checkpoints", sides.place) if sides.checkpoint else ())) as fd:
                _write_versions(sides, conflicts, fd, losses, withheld)
    for text in losses:
        work.warn(f"{target}: {text}")


@contextmanager
def _below(top: int, *path: str) -> Iterator[int]:
    """Make the missing directories of a path, and open it."""
    with ExitStack() as stack:
        fd = top
        for name in path:
            check_name(os.fsencode(name))
            with suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=fd)
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            stack.callback(os.close, fd)
        yield fd


def _write_versions(
    sides: _Sides, found: Sequence[Outcome], place: int, losses: Losses, withheld: Withheld
) -> None:
    trees: list[tuple[str, Tree, bool]] = [
        ("old", Merged(sides.old), True),
        ("new", Merged(sides.new), True),
        ("changed", sides.after, False),
    ]
    for name, tree, is_below in trees:
        with _below(place, name) as fd:
            paths = sorted({one.base if is_below else one.path for one in found})
            upper = Upper(fd, losses, lambda *_: None, whole=True)
            try:
                feed(_chosen(tree, paths), tree, upper, losses, lambda *_: None, None, withheld)
            finally:
                upper.close()


def _chosen(tree: Tree, paths: Sequence[bytes]) -> list[tuple[bytes, Item]]:
    """Return these paths, as far as a tree has them, with everything above and below each."""
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
