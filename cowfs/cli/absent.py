"""``-o nofail``: it is no failure that a lower, or the store, is not there, as with devices in mount(8)."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress

from cowfs.cli import options
from cowfs.errors import CowfsError
from cowfs.store.format.sniff import looks_like_image, may_exist
from cowfs.url.names import is_url


def is_tolerated(args: argparse.Namespace) -> bool:
    """Whether a mount that has failed was asked for with ``nofail``, and has a layer that is not there."""
    if not any("nofail" in options.split(text) for text in args.options):
        return False
    with suppress(CowfsError):  # what is wrong is said by the failure
        store = args.store or options.parse(args.options).values.get("store", "memory")
        lowers, _ = options.split_layers(args.lower)
        places = [lower for lower in lowers if not is_url(lower)]
        return not all(map(os.path.lexists, places)) or _is_missing(store)
    return False


def _is_missing(store: str) -> bool:
    """Whether a store is not there. A directory is made by its first mount, if it has a place."""
    if store == "memory" or may_exist(store):
        return False
    return looks_like_image(store) or not os.path.isdir(os.path.dirname(os.path.abspath(store)))
