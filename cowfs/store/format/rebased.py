"""Exchange the lowers of a store together with its upper, by one rename (ADR 0058).

::

    cowfs/header.rebased   the header for the new upper; only its lowers and its version are used
    upper/                 P cowfs.rebased = N: header.rebased has this upper's lowers, not header.json
    cowfs/layers/M         P cowfs.becomes = JSON: future name and time of a checkpoint; M is N or more

P is the prefix of the overlay's attributes. The new upper has its attribute before the rename. So the rename
of the uppers also exchanges the lowers and the checkpoints: layers below N lose their names, and the others
get theirs. The rest of the work follows. If it is interrupted, the next opening of the store does it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import replace

from cowfs.layers.base import Key, UpperLayer
from cowfs.layers.walk import inodes_below
from cowfs.overlay.xattr_format import XattrFormat
from cowfs.store.format import layout
from cowfs.store.format.checkpoints import Checkpoint, Layers
from cowfs.store.format.header import Header, to_json

_BECOMES = b"cowfs.becomes"


def announce(layer: UpperLayer, upper: Key, header: Header, first: int) -> None:
    """Record that a new upper, and the layers from number *first* on, belong to this header's lowers. Blocks.

    Call it before the exchange.
    """
    uid, gid = layout.owner(layer)
    private = layout.find(layer, layout.PRIVATE)
    if layer.lookup(private, layout.REBASED) is not None:
        layer.unlink(private, layout.REBASED, None)
    _, file = layer.create(private, layout.REBASED, 0o644, uid, gid)
    with closing(file):
        file.pwrite(to_json(header), 0)
        file.fsync(False)
    layer.setxattr(upper, header.xattrs.encode() + layout.IS_REBASED, b"%d" % first)


def set_future_name(
    layer: UpperLayer, layers: Layers, made: Key, number: int, one: Checkpoint, prefix: bytes
) -> None:
    """Complete a layer, which the exchange will give the name of the checkpoint *one*. Blocks."""
    layers.name(made, number, "", one.taken)
    content = json.dumps({"name": one.name, "taken": one.taken})
    layer.setxattr(made, prefix + _BECOMES, content.encode())


def exchange_names(layer: UpperLayer, layers: Layers, upper: Key, prefix: bytes) -> None:
    """After the exchange, replace the checkpoints by those of the new upper. Blocks.

    Call it before any layer is removed: layers without a name would be lost.
    """
    try:
        first = int(layer.getxattr(upper, prefix + layout.IS_REBASED))
    except (OSError, ValueError):
        return
    for one in layers.all().values():
        if one.number < first:
            if one.name:
                layers.name(one.key, one.number, "", one.taken)
            continue
        try:
            facts = json.loads(layer.getxattr(one.key, prefix + _BECOMES))
            name, taken = str(facts["name"]), str(facts["taken"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            continue  # it has its name already
        layers.name(one.key, one.number, name, taken)
        layer.removexattr(one.key, prefix + _BECOMES)


def settle(layer: UpperLayer, upper: Key, header: Header, frozen: Iterable[Key]) -> Header:
    """Complete the work after the exchange; return the header. Blocks.

    The origins of inodes are no longer valid and are removed, also in the checkpoints, whose roots are
    *frozen*. *header* is that of :func:`cowfs.store.format.layout.find_header`.
    """
    mark = header.xattrs.encode() + layout.IS_REBASED
    try:
        layer.getxattr(upper, mark)
    except OSError:
        return header
    for root in (upper, *frozen):
        for key, _ in inodes_below(layer, root):
            _forget_origin(layer, key, XattrFormat(header.xattrs.encode()))
    pending = layout.pending_header(layer)
    if pending is not None:
        header = replace(header, version=pending.version)
    layout.save_header(layer, header)
    layer.sync()
    layer.removexattr(upper, mark)
    layer.sync()
    retract(layer)
    return header


def retract(layer: UpperLayer) -> None:
    """Undo :func:`announce` for an upper that was not exchanged. Blocks."""
    private = layout.find(layer, layout.PRIVATE)
    with suppress(OSError):
        layer.unlink(private, layout.REBASED, None)


def _forget_origin(layer: UpperLayer, key: Key, xattrs: XattrFormat) -> None:
    stale = {xattrs.origin, xattrs.nlink, xattrs.links, xattrs.place, xattrs.layer, xattrs.first}
    try:
        names = stale.intersection(layer.listxattr(key))
    except OSError:
        return
    for name in names:
        layer.removexattr(key, name)
