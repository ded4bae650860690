"""Turn a store of overlayfs into one of aufs, or the reverse, with the data it needs of the lowers."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack

from cowfs.changes.flatten import flatten
from cowfs.changes.names import Expect, count_names, not_asked
from cowfs.client import mount_with_store
from cowfs.errors import StoreError
from cowfs.offline_changes import Lowers, Tell, must_be_there, open_offline_union
from cowfs.store.format.foreign import pair_in
from cowfs.store.offline import convert as offline
from cowfs.store.offline.convert_in_place import Converted


def convert(
    store: str,
    target: str,
    lowers: Lowers | None = None,
    *,
    tell: Tell = lambda _: None,
    tick: Callable[[bytes], None] = lambda _: None,
    expect: Expect | None = None,
) -> Converted:
    """Convert a store in place to ``overlayfs`` or ``aufs``, or complete that; return what was done.

    For aufs, the data that it refers to in its *lowers* is copied into it first. *tick* is called for each
    name. Before each pass *expect* is given a function that returns about how many names there will be.
    Blocks. Raises CowfsError.
    """
    expect = expect or not_asked
    if mount_with_store(store) is not None:
        raise StoreError(f"{store}: is mounted", "unmount it first")
    must_be_there(store)
    if os.path.isdir(store) and pair_in(store) is not None:
        raise StoreError(
            f"{store}: another system uses it with overlayfs, and could not use a converted one",
            "mount it as it is, or make a store (cowfs create) and cowfs apply the changes to it",
        )
    path = os.path.abspath(store)
    copied = 0
    if offline.judge(path, target, tell):
        with ExitStack() as stack:
            overlay = open_offline_union(path, lowers or Lowers(), stack, tell).overlay
            roots = [(overlay.upper, overlay.root.upper), *((low, low.root) for low in overlay.base)]
            expect(lambda: sum(count_names(layer, root) for layer, root in roots))
            copied = flatten(overlay, tick)
    with ExitStack() as stack:
        layer = offline.begin(path, stack, tell)
        expect(lambda: count_names(layer, layer.root))
        done = offline.convert(layer, target, tick)
    done.copied = copied
    return done
