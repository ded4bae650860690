"""The changes of a store that is not mounted, and a union of it to be changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any, NamedTuple

from cowfs.changes.merged import Merged
from cowfs.changes.real_owners import RealOwners
from cowfs.changes.version import Tree, Version
from cowfs.errors import LayerError, StoreError, UsageError
from cowfs.layers.frozen import FrozenLayer
from cowfs.linux.fuse import LISTED
from cowfs.overlay.index import open_index
from cowfs.overlay.mapped_owners import as_in_store, out_of
from cowfs.overlay.stack import Stack
from cowfs.overlay.xattr_format import XattrFormat
from cowfs.store.format.header import said_of, volatile_above
from cowfs.store.format.sniff import is_plain_directory, may_exist, not_a_store
from cowfs.types import Change, Identity
from cowfs.url.names import is_url, place
from cowfs.url.trust import forbidden, shows_too_much, who_can_change

if TYPE_CHECKING:
    from cowfs.changes.blame import Record
    from cowfs.changes.du import Used
    from cowfs.union import Union

Tell = Callable[[str], None]
Tick = Callable[[], None]
_NAMED = 5
"""The most stores in a store that a message names."""


class Lowers(NamedTuple):
    """Which lowers to compare with, and how to open them."""

    given: Sequence[str] | None = None
    """The layers, topmost first; None: those that the store belongs to."""
    offsets: Sequence[int] = ()
    engine: str = "auto"
    force: bool = False
    """Whether they may be others than those that the store belongs to."""
    data_only: int = 0
    """How many of *given*, the last, only have the data of files of those above."""


def must_be_there(path: str) -> None:
    """Raise StoreError unless there is something at *path* that may be a store."""
    if path == "memory" or not may_exist(path):
        raise StoreError(f"{path}: no such store or mountpoint", LISTED)
    if is_plain_directory(path):
        raise not_a_store(path)


def open_offline_union(
    path: str,
    lowers: Lowers,
    stack: ExitStack,
    tell: Tell,
    *,
    read_only: bool = False,
    tick: Tick = lambda: None,
) -> Union:
    """Open a store that is not mounted, with its lowers, to be changed unless *read_only*.

    *tick* is called for each name of a deleted checkpoint that is merged.
    """
    from cowfs.store.format.header import check_lowers
    from cowfs.store.served.open import open_store
    from cowfs.union import UnionOptions, open_union

    must_be_there(path)
    with closing(open_store(path, engine=lowers.engine, read_only=True, progress=tell)) as store:
        header = store.header
    given, offsets, data_only = lowers.given, list(lowers.offsets), lowers.data_only
    styles = styles_of(header.lowers, given)
    if given is None:
        given, offsets, data_only = recorded_lowers(path, header.lowers, offsets)
    elif not lowers.force:
        check_lowers(header, identities(given, offsets, data_only, styles), path)
    options = UnionOptions(
        tuple(map(place, given)),
        os.path.abspath(path),
        lowers.engine,
        offsets=tuple(offsets),
        data_only=data_only,
        whiteouts=styles,
        volatile=(),  # what was changed before it was so can be taken back
        remembers=False,
        read_only=read_only,
    )
    union = open_union(options, tell, tick)
    stack.callback(union.close)
    return union


class OfflineChanges:
    """The changes of a store that is not mounted."""

    def __init__(
        self, path: str, lowers: Lowers, stack: ExitStack, tell: Tell, when: tuple[str | None, str | None]
    ) -> None:
        from cowfs.lowers import open_lowers
        from cowfs.store.format import layout
        from cowfs.store.format.checkpoints import as_layers, between
        from cowfs.store.format.header import check_lowers
        from cowfs.store.served.open import open_store

        self._tell = tell
        self._stack = stack
        self._store = store = open_store(path, engine=lowers.engine, read_only=True, progress=tell)
        stack.callback(store.close)
        given, offsets, data_only = lowers.given, lowers.offsets, lowers.data_only
        styles = styles_of(store.header.lowers, given)
        self.has_own_numbers = bool(store.header.owners)
        """Whether its owners are those of a user namespace."""
        found: Sequence[Identity] = store.header.lowers
        if given is None:
            given, offsets, data_only = recorded_lowers(path, found, offsets)
        else:
            found = identities(given, offsets, data_only, styles)
            styles = tuple(low.whiteouts for low in found)
            if not lowers.force:
                check_lowers(store.header, found, path)
        self._paths = [path, *given]
        self._sources = [place(each) for each in self._paths]
        self._lowers = open_lowers(given, lowers.engine, offsets, data_only, styles)
        for lower in self._lowers:
            stack.callback(lower.close)
        kinds = [low.kind for low in found]
        real, self._lowers = self._lowers, as_in_store(self._lowers, kinds, store.header.owners)
        self._between = wanted = between(store.layers, store.upper, *when)
        fresh = store.layers.is_fresh(store.upper)
        self._index = None if fresh else layout.find(store.layer, layout.WORK, b"index")
        xattrs = XattrFormat(store.xattr_prefix)
        self._newer = as_layers(store.layer, wanted.newer)
        self._older = as_layers(store.layer, wanted.older)
        self._before = Merged(Stack([*self._older, *self._lowers], xattrs))
        below = [*self._newer, *self._older, *self._lowers]
        if wanted.has_upper:
            index = None if self._index is None else open_index(store.layer, self._index, xattrs)
            self._after = Merged(Stack([store.layer, *below], xattrs, store.upper), index)
        else:
            self._after = Merged(Stack(below, xattrs))
        out = out_of(store.header.owners) if set(kinds) == {"directory"} else None
        self._trees: tuple[Tree, Tree] = self._before, self._after
        if out is not None:
            before = Merged(Stack([*self._older, *real], xattrs))
            self._trees = before, RealOwners(self._after, (self._before, before), out, self._renames)

    def _renames(self) -> dict[bytes, bytes]:
        return {change.path: change.source for change in self if change.source is not None}

    def __iter__(self) -> Iterator[Change]:
        return self._diff(directory_times=False)

    def within(self, paths: Sequence[bytes]) -> Iterator[Change]:
        return self._diff(directory_times=False, within=paths)

    def exactly(self) -> Iterator[Change]:
        return self._diff(directory_times=True)

    def _diff(self, *, directory_times: bool, within: Sequence[bytes] = ()) -> Iterator[Change]:
        from cowfs.changes.composite import above
        from cowfs.changes.diff import diff

        if self._between.is_empty:
            return iter(())
        store = self._store
        if store.header.volatile:
            self._tell(said_of(store.header.volatile))
        upper = (store.layer, store.upper) if self._between.has_upper else None
        new = above(upper, self._newer, XattrFormat(store.xattr_prefix), self._index)
        below = [*self._older, *self._lowers]
        how: Any = {"directory_times": directory_times, "within": within}
        return diff(new.layer, new.root, below, store.xattr_prefix, new.links, **how)

    def tree(self) -> Tree:
        return self._trees[1]

    def tree_before(self) -> Tree:
        return self._trees[0]

    def before(self, path: bytes) -> Version | None:
        return self._before.version(path)

    def after(self, path: bytes) -> Version | None:
        return self._after.version(path)

    def files_before(self, path: bytes) -> Iterator[bytes]:
        return self._before.files(path)

    def explain(self, path: bytes) -> dict[str, Any]:
        from cowfs.changes.explain import explain
        from cowfs.overlay.fs import done_at_once

        store = self._store
        frozen = [(one.name, FrozenLayer(store.layer, one.key)) for one in store.frozen]
        lowers, prefix = self._lowers, store.xattr_prefix
        steps = explain(store.layer, store.upper, lowers, prefix, self._index, path, frozen)
        answer = done_at_once(steps)
        return {**answer, "volatile": volatile_above(store.header.volatile, path)}

    def usage(self) -> Iterator[Used]:
        from cowfs.changes.du import Used, usage

        store = self._store
        total = 0
        if store.header.volatile:
            self._tell(said_of(store.header.volatile))
        frozen = [FrozenLayer(store.layer, one.key) for one in store.frozen]
        how: dict[str, Any] = {"frozen": frozen, "others": store.layers.beside(store.upper)}
        for used in usage(store.layer, store.upper, store.notebook, self._lowers, store.xattr_prefix, **how):
            if used is not None:
                total += used.size
                yield used
        if store.kind == "image":
            yield Used(b"", "overhead", max(store.taken - total, 0))

    def about(self) -> list[tuple[str, str]]:
        store = self._store
        return [
            ("store", f"{store.kind}, made {store.header.created}, by {store.header.created_by}"),
            *(("lower", f"{one.path} ({one.description})") for one in store.header.lowers),
        ]

    def paths(self) -> list[str]:
        return self._paths

    def count_names(self, *, merged: bool = False) -> int:
        from cowfs.changes.names import count_names

        below = sum(count_names(layer, layer.root) for layer in self._lowers) if merged else 0
        return below + count_names(self._store.layer, self._store.upper)

    def withheld(self) -> dict[str, str]:
        mine = 0, os.geteuid()
        why = shows_too_much(self._sources, lambda layer: who_can_change(layer, mine))
        return forbidden(self._sources, mine) | ({} if why is None else {"shown": why})

    def records(self) -> Iterator[Record] | None:
        from cowfs.changes.blame import records
        from cowfs.store.format.records import read

        try:
            found = read(self._store.layer)
        except StoreError:
            return None
        self._stack.callback(found.close)
        return records(found.contents(), self._store.layer.name)


def styles_of(known: Sequence[Identity], given: Sequence[str] | None) -> tuple[str, ...]:
    """Return how the whiteouts of the *given* lowers are written: as those of the *known* ones, each as its
    own, or all as all of these. Without any given, return those of the known ones."""
    styles = tuple(low.whiteouts for low in known)
    if given is None or len(given) == len(known):
        return styles
    return styles[:1] * len(given) if len(set(styles)) == 1 else ()


def identities(
    lowers: Sequence[str], offsets: Sequence[int], data_only: int = 0, whiteouts: Sequence[str] = ()
) -> list[Identity]:
    from cowfs.store.format.identity import identify_lowers

    if len(offsets) > len(lowers):
        raise UsageError(
            f"--offset: {len(offsets)} offsets for {len(lowers)} lower layers",
            "give one for each lower",
        )
    return identify_lowers(lowers, offsets, data_only, whiteouts)


def no_lower(path: str, stores: Sequence[str], hint: str) -> UsageError:
    """Return what to raise for a store without lowers, which may contain *stores* that have some."""
    if not stores:
        return UsageError(f"{path}: does not record which lower it belongs to", hint)
    named = ", ".join(os.path.join(path, name) for name in stores[:_NAMED])
    more = f", or one of {len(stores) - _NAMED} more" if len(stores) > _NAMED else ""
    return UsageError(f"{path}: has no changes of its own, only stores in it", f"name one: {named}{more}")


def recorded_lowers(
    path: str, lowers: Sequence[Identity], given: Sequence[int], option: str = "--lower"
) -> tuple[list[str], list[int], int]:
    """Return where the lowers of a store are, and where they begin there, which *given* may correct; and how
    many of them are data-only.

    UsageError if they are not there any more, or are at a URL that another user may have written there:
    nobody has us call servers of their choice.
    """
    from cowfs.store.offline.info import store_info

    url = next((lower.path for lower in lowers if is_url(lower.path)), None)
    if url is not None:
        why = who_can_change(os.path.abspath(path), (0, os.geteuid()))
        if why is not None:
            raise UsageError(f"{path}: belongs to {url}; {why}", f"give the lower with {option}")
    if not lowers:
        raise no_lower(path, store_info(path)["stores"], f"give it with {option}")
    offsets = [*given, *(lower.offset for lower in lowers[len(given) :])]
    if len(given) > len(lowers):
        identities([lower.path for lower in lowers], given)
    for lower, offset in zip(lowers, offsets, strict=True):
        belongs, hint = (
            f"{path}: belongs to {lower.description}",
            f"give its path with {option}, and --offset",
        )
        try:
            (now,) = identities([lower.path], [offset], int(lower.data_only), [lower.whiteouts])
        except LayerError as error:
            raise UsageError(f"{belongs}; {error.message}", hint) from None
        if now.fingerprint != lower.fingerprint:
            raise UsageError(f"{belongs}; {lower.path} is now a different one: {now.description}", hint)
    return [lower.path for lower in lowers], offsets, sum(lower.data_only for lower in lowers)
