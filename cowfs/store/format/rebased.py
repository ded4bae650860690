"""A store that changes its lowers along with its upper, by one rename (ADR 0058).

::

    cowfs/header.rebased   the header that comes with the new upper: its lowers count, and its version
    upper/                 P cowfs.rebased = N: they are those of this upper, and not what header.json says
    cowfs/layers/M         P cowfs.becomes = JSON: name and time of a checkpoint, where M is N or more

The attribute is on the new upper before that takes its place. So the rename that exchanges the uppers
exchanges the lowers, too, and the checkpoints: those of a number below N have no name any more, the others
are what they are to become. What is left to do after it is begun again at the next opening if it was cut
short.
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
    """Write down that an upper which is not in its place yet belongs to the lowers of this header.

    So do the layers whose number is *first* or more.
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


def call(layer: UpperLayer, layers: Layers, made: Key, number: int, one: Checkpoint, prefix: bytes) -> None:
    """Let a layer be complete; it gets the name of another with the upper that is announced."""
    layers.name(made, number, "", one.taken)
    content = json.dumps({"name": one.name, "taken": one.taken})
    layer.setxattr(made, prefix + _BECOMES, content.encode())


def exchange_names(layer: UpperLayer, layers: Layers, upper: Key, prefix: bytes) -> None:
    """After an upper with other lowers has its place: replace the checkpoints by those that came with it.

    Call it before any layer is removed: layers without a name yet would be lost.
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
            continue  # it has its name
        layers.name(one.key, one.number, name, taken)
        layer.removexattr(one.key, prefix + _BECOMES)


def settle(layer: UpperLayer, upper: Key, header: Header, frozen: Iterable[Key]) -> Header:
    """Complete the work after an upper with other lowers has its place; return the header.

    The origins of inodes are no longer true and are removed, in the checkpoints, too: *frozen* are their
    roots. *header* is the one that was read (:func:`cowfs.store.format.layout.find_header`).
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
    """Remove what :func:`announce` wrote, of an upper that is not in its place."""
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
