"""The checkpoints of a store or of a mount: list, take, go back to, delete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from cowfs.client import ask, checked_answer, find_mount
from cowfs.errors import CowfsError, MountFailure
from cowfs.mounted_changes import PATIENCE
from cowfs.offline_changes import Lowers, Tell, Tick, must_be_there, open_offline_union

if TYPE_CHECKING:
    from cowfs.take_back import Told


class Checkpoint(NamedTuple):
    """A state of the tree that was kept."""

    name: str
    taken: str
    """ISO 8601, UTC."""
    on: str | None
    """The checkpoint that it was made after; None: the lowers."""
    current: bool
    """Whether the tree as it is now was made from it."""
    last: bool
    """Whether nothing but what was changed since is above it."""


def checkpoints(what: str) -> list[Checkpoint]:
    """Return the checkpoints of a store or of a mount, the oldest first. Raises CowfsError."""
    from cowfs.store.format.checkpoints import listed
    from cowfs.store.served.open import open_store

    found = find_mount(what)
    if found is not None:
        told = list(ask(found.dev, "checkpoints"))
    else:
        must_be_there(what)
        with closing(open_store(what, read_only=True)) as store:
            told = listed(store.layers, store.upper)
    with checked_answer(what):
        return [
            Checkpoint(
                str(one["name"]),
                str(one["taken"]),
                None if one["on"] is None else str(one["on"]),
                bool(one["current"]),
                bool(one["last"]),
            )
            for one in told
        ]


def is_mount_above_deleted(what: str) -> bool:
    """Whether *what* is a mount that still compares with a deleted checkpoint, which is merged later."""
    found = find_mount(what)
    with suppress(CowfsError):  # an older daemon
        return found is not None and any(one.get("above_deleted") for one in ask(found.dev, "above_deleted"))
    return False


def deleted_counts(what: str) -> str:
    """Return the warning that reverting and a vacuum compare with a deleted checkpoint."""
    counts = f"{what}: changes made before the deleted checkpoint still count as part of the lower"
    return counts + (" (until it is unmounted and mounted again)" if find_mount(what) else "")


def checkpoint(what: str, name: str, lowers: Lowers | None = None, tell: Tell = lambda _: None) -> None:
    """Keep the present state of the tree of a store or a mount under a name. It is on disk then.

    UsageError for an invalid name.
    """
    _ask_checkpoints(what, "take", name, lowers, tell)


def rollback(
    what: str,
    name: str,
    lowers: Lowers | None = None,
    tell: Tell = lambda _: None,
    tick: Tick = lambda: None,
) -> None:
    """Make the tree what it was at a checkpoint; later changes that no other checkpoint keeps are lost.

    *tick* is called now and then while changes of a store that is not mounted are removed.

    UsageError if there is no such checkpoint. MountFailure if the tree is mounted and a process uses a file
    in it.
    """
    from cowfs.store.format.checkpoints import no_such

    found = find_mount(what)
    if found is not None:
        if all(one.name != name for one in checkpoints(what)):
            raise no_such(name)
        _must_not_be_used(what, found.dev)
    _ask_checkpoints(what, "go_back", name, lowers, tell, tick)


def delete_checkpoint(
    what: str,
    name: str,
    lowers: Lowers | None = None,
    tell: Tell = lambda _: None,
    tick: Tick = lambda: None,
) -> None:
    """Delete a checkpoint. The tree and the other checkpoints keep their contents.

    *tick* is called for each name that is merged or removed, of a store that is not mounted.
    """
    _ask_checkpoints(what, "delete", name, lowers, tell, tick)
    if find_mount(what) is None:
        with ExitStack() as stack:  # which merges its remaining layer
            open_offline_union(what, lowers or Lowers(), stack, tell, tick=tick)


def _ask_checkpoints(
    what: str,
    asked: str,
    name: str,
    lowers: Lowers | None,
    tell: Tell,
    tick: Tick = lambda: None,
) -> None:
    from cowfs.changes.checkpoint import must_be_possible
    from cowfs.store.served.open import open_store
    from cowfs.take_back import checkpoints as steps
    from cowfs.take_back import done, must_not_be_apart

    found = find_mount(what)
    with ExitStack() as stack:
        if found is not None:
            replies: Iterator[dict[str, Any]] = ask(
                found.dev, "checkpoint", timeout=PATIENCE, what=asked, name=name
            )
        else:
            must_be_there(what)
            with closing(open_store(what, read_only=True)) as store:  # before a byte of it is changed
                must_not_be_apart(store)
                if asked == "take":
                    must_be_possible(store, name)
                elif store.layers.is_at(store.upper, store.layers.named(name)) and asked == "go_back":
                    return
            union = open_offline_union(what, lowers or Lowers(), stack, tell, tick=tick)
            replies = done(_ticking(steps(union, {"what": asked, "name": name}), tick))
        for _ in replies:
            pass


def _ticking(steps: Told, tick: Tick) -> Told:
    """Yield *steps*, and call *tick* after each."""
    for step in steps:
        yield step
        tick()


_TOLD = 3
"""The most uses that a message names."""


def _must_not_be_used(what: str, dev: str) -> None:
    """Raise MountFailure, which says what is open and by whom."""
    from cowfs.changes.render import escape
    from cowfs.linux.users import mounted_within, uses_of

    for mount in mounted_within(dev):
        raise MountFailure(f"{escape(mount.mountpoint)}: is mounted in the tree", "unmount that first")
    uses = list(uses_of(dev))
    if uses:
        said = [
            f"{escape(use.path)} ({use.how}, by {escape(os.fsencode(use.program))}, pid {use.pid})"
            for use in uses[:_TOLD]
        ]
        more = f", and {len(uses) - _TOLD} more" if len(uses) > _TOLD else ""
        raise MountFailure(
            f"{what}: in use: {', '.join(said)}{more}", f"fuser -vm {what} shows all who use it"
        )
