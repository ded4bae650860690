"""``-o nofail``: a missing lower or store is no failure, as a missing device in mount(8)."""

from __future__ import annotations

import argparse
import os

from cowfs.cli import encrypted, options
from cowfs.errors import CowfsError, StoreError
from cowfs.store.disks import block_device
from cowfs.store.format.sniff import looks_like_image, may_exist
from cowfs.url.names import is_url


def is_tolerated(args: argparse.Namespace) -> bool:
    """Whether the options of a mount that failed have ``nofail``, and a lower or its store is missing."""
    if not options.is_nofail(args.options):
        return False
    try:
        store = args.store or options.parse(args.options).values.get("store", "memory")
        lowers, _ = options.split_layers(args.lower)
    except CowfsError:
        return False
    missing = (not os.path.lexists(lower) for lower in lowers if not is_url(lower))
    return any(missing) or _is_missing(store)


def _is_missing(store: str) -> bool:
    """Whether a store is missing. The first mount creates a directory, if the directory for it exists."""
    if store == "memory":
        return False
    try:
        store = encrypted.found(store)
        if block_device.split(os.path.abspath(store))[0]:
            return False
    except StoreError:  # no such device
        return True
    if may_exist(store):
        return False
    return looks_like_image(store) or not os.path.isdir(os.path.dirname(os.path.abspath(store)))
