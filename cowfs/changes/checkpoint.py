"""Take, restore and delete checkpoints of a tree in use. They are layers below later changes (ADR 0045).

The functions that return :data:`Steps` are generators; the mount serves requests between two steps. A step
yields None, or a call that blocks, for a thread. The step that makes a change take effect is atomic: nothing
else runs meanwhile, and on disk it is one rename.
"""

from __future__ import annotations

import errno
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress

from cowfs.changes.lowers import must_not_wait
from cowfs.changes.render import escape
from cowfs.errors import MountFailure, StoreError
from cowfs.layers.frozen import FrozenLayer
from cowfs.overlay import freeze, incomplete
from cowfs.overlay.fs import done_at_once
from cowfs.overlay.node import Node, path_of
from cowfs.overlay.overlay import Overlay
from cowfs.overlay.uncover import Stale
from cowfs.store.format import checkpoints
from cowfs.store.format.checkpoints import Checkpoint, check_name
from cowfs.store.served.store import Store

log = logging.getLogger(__name__)

Steps = Generator[Callable[[], None] | None, None, None]
_PATIENCE = 20.0
"""How many seconds to wait for a moment at which no file is being copied up."""
_PAUSE = 0.002
"""Seconds."""
_SOON = 0.5
"""How many seconds to wait until the kernel has sent all requests that release files."""


def take(store: Store, fs: Overlay, name: str) -> Steps:
    """Make a checkpoint of the tree as it is now.

    UsageError if the name is invalid or taken. StoreError if the store cannot have another one. MountFailure
    if the kernel writes to a file itself (passthrough), or if copying up does not pause.
    """
    must_be_possible(store, name)
    layers = store.layers
    must_be_one(fs)
    yield from _unlent(fs)
    if freeze.are_hidden(fs):
        must_not_wait(fs.base)
    yield from _complete(fs)
    yield from freeze.link_all(fs)
    yield store.save  # everything to be frozen is now on disk, except what changes meanwhile
    yield from stillness(fs)
    _must_not_be_lent(fs)
    done_at_once(freeze.link_all(fs))  # files that changed meanwhile
    store.header = checkpoints.with_layers(store.layer, store.header)
    number = layers.next_number()
    below = layers.below(store.upper)
    new = layers.prepare(store.upper, (number, *below))
    freeze.unindex(fs)
    upper = store.upper
    layers.exchange(upper, new, name)
    freeze.freeze(fs, new.key, FrozenLayer(store.layer, upper))
    _use_upper(store, new.key, [layers.all()[number], *store.frozen])
    yield store.save


def must_be_possible(store: Store, name: str) -> None:
    """Raise the UsageError or StoreError with which :func:`take` refuses. The store is only read."""
    check_name(name)
    if store.is_aufs:
        raise StoreError(
            f"{store.path}: the store has the aufs format, which has no checkpoints",
            f"unmount it, then: cowfs convert {store.path} --to overlayfs",
        )
    known = store.layers.all()
    if any(one.name == name for one in known.values()):
        raise checkpoints.is_taken(name)
    checkpoints.must_have_room(len(store.frozen), len(known))


def go_back(store: Store, fs: Overlay, name: str, forget: Callable[[Stale], None]) -> Steps:
    """Restore the tree of a checkpoint. Later changes are lost; without any, nothing is done.

    *forget* is called, in a thread, with the kernel's stale cache entries. UsageError if there is no such
    checkpoint, MountFailure if a file of the tree is open.
    """
    layers = store.layers
    target = layers.named(name)
    frozen = layers.under(target)
    must_be_one(fs)
    must_not_wait(fs.base)
    if layers.is_at(store.upper, target):
        return
    yield from _released(fs)
    yield from stillness(fs, with_pending=True)
    must_not_be_in_use(fs)
    new = layers.prepare(target.key, (target.number, *target.below))
    layers.exchange(store.upper, new)
    stale = freeze.go_back(fs, new.key, checkpoints.as_layers(store.layer, frozen))
    _use_upper(store, new.key, frozen)
    yield store.save
    yield lambda: forget(stale)
    yield from tidy(store)


def delete(store: Store, fs: Overlay, name: str) -> Steps:
    """Delete a checkpoint. The tree and the other checkpoints keep their contents.

    A layer that others need stays until the store is opened next (:mod:`cowfs.changes.merge`). UsageError if
    there is no such checkpoint.
    """
    layers = store.layers
    target = layers.named(name)
    layers.name(target.key, target.number, "", target.taken)
    yield store.save
    yield from tidy(store)


def stand_still(store: Store, fs: Overlay) -> Generator[Callable[[], None] | None, None, str]:
    """Wait for a moment when the store contains everything that the tree shows.

    This holds until the next step or request. Return the first file that the kernel writes to itself
    (passthrough), for a message; "" if there is none. MountFailure if copying up does not pause.
    """
    if fs.host.lent():
        yield fs.host.prune
    yield store.save
    yield from stillness(fs, with_pending=True)
    return _first_of(fs.host.lent())


def _use_upper(store: Store, upper: object, frozen: list[Checkpoint]) -> None:
    """Use the new upper after the exchange on disk, which is final."""
    store.upper, store.frozen = upper, frozen
    try:
        store.layers.settle(store.upper, store.index, store.links)
    except OSError as error:
        log.warning("the index of hard links is emptied at the next mount: %s", error.strerror)


def tidy(store: Store) -> Iterator[None]:
    """Remove the layers that nobody can go back to."""
    layers = store.layers
    for number in layers.rubbish(store.upper):
        with suppress(OSError):  # the next mount continues
            yield from layers.remove(number)


def must_be_one(fs: Overlay) -> None:
    """MountFailure if the mount has volatile directories."""
    if len(fs.unions()) > 1:
        raise MountFailure(
            "the mount has volatile directories, so its layers must stay as they are",
            "unmount, and name the store instead",
        )


def must_not_be_in_use(fs: Overlay) -> None:
    """MountFailure if a file or directory of the tree is open, as far as the daemon knows."""
    opened = _first_of(fs.host.opened())
    if opened:
        raise MountFailure(
            f"{opened}: open, so the tree cannot be rolled back",
            "close it, or unmount and name the store instead",
        )


def _released(fs: Overlay) -> Steps:
    """Wait until closed files are released: close(2) returns before the kernel sends FUSE_RELEASE."""
    end = time.monotonic() + _SOON
    while _first_of(fs.host.opened()) and time.monotonic() < end:
        yield lambda: time.sleep(_PAUSE)


def _unlent(fs: Overlay) -> Steps:
    """Wait until the kernel writes to no file of the upper itself (passthrough). MountFailure if it still
    does."""
    if fs.host.lent():
        yield fs.host.prune
    end = time.monotonic() + _SOON
    while fs.host.lent() and time.monotonic() < end:
        yield lambda: time.sleep(_PAUSE)
    _must_not_be_lent(fs)


def _must_not_be_lent(fs: Overlay) -> None:
    lent = _first_of(fs.host.lent())
    if lent:
        raise MountFailure(
            f"{lent}: open or mapped, and written by the kernel itself (passthrough)",
            "close it, or mount with -o passthrough=off",
        )


def _first_of(nodes: Iterable[Node]) -> str:
    """Return the first path and how many more there are, for a message; "" if there are none."""
    paths = sorted({b"/" + path_of(node) for node in nodes})
    if not paths:
        return ""
    return escape(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def _complete(fs: Overlay) -> Steps:
    """Copy up the missing data of partial files: once they are in a lower layer, nobody does."""
    for pending in list(fs.pending.values()):
        file = incomplete.open_rest(fs, pending)
        try:
            yield lambda file=file: deque(file.copy_steps(), 0) and None  # type: ignore[misc]
            if pending in fs.pending.values():
                incomplete.complete(fs, pending)
        finally:
            file.close()


def stillness(fs: Overlay, *, with_pending: bool = False) -> Steps:
    """Wait for a moment when no thread changes a file. MountFailure if there is none within 20 seconds."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            freeze.must_be_still(fs, with_pending=with_pending)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            if time.monotonic() > deadline:
                raise MountFailure("files are being copied up all the time", "try again later") from None
        else:
            return
        yield lambda: time.sleep(_PAUSE)
