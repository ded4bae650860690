"""A store on its way from one format to the other, in place.

A conversion can be cut short anywhere and continued. Each step may be done again, but for those of an earlier
phase; so the phase is written down, in the name of a file that is there until all is done::

    .wh..wh.cowfs/converting-FORMAT-PHASE
    .wh..wh.cowfs/upper/ work/ cowfs/       the store's parts, as they come from or go to the root

While it is there nobody else takes the filesystem for a store: neither cowfs nor an older version of it.
"""

from __future__ import annotations

import os
import stat

from cowfs.errors import StoreError
from cowfs.layers.base import Key, UpperLayer

STAGE = b".wh..wh.cowfs"
_SIGN = b"converting-"


def begun(layer: UpperLayer) -> tuple[str, int] | None:
    """Return the format and the phase of the conversion that a filesystem is in, if it is in one."""
    found = layer.lookup(layer.root, STAGE)
    if found is None or not stat.S_ISDIR(found[1].st_mode):
        return None
    for entry in layer.readdir(found[0]):
        if entry.name.startswith(_SIGN):
            target, _, phase = entry.name[len(_SIGN) :].partition(b"-")
            return os.fsdecode(target), int(phase) if phase.isdigit() else 0
    return None


def interrupted(layer: UpperLayer) -> StoreError | None:
    """Return the message for a conversion that was interrupted."""
    found = begun(layer)
    if found is None:
        return None
    return StoreError(
        f"{layer.name}: its conversion to the {found[0]} format was interrupted",
        f"cowfs convert {layer.name} --to {found[0]} completes it",
    )


def refuse_begun(layer: UpperLayer) -> None:
    """Raise StoreError if a conversion was cut short."""
    error = interrupted(layer)
    if error is not None:
        raise error


def note(layer: UpperLayer, stage: Key, target: str, phase: int, before: int | None) -> None:
    """Write down that a phase begins; it is on disk at return, and all that was done before."""
    layer.sync()
    name = _name(target, phase)
    if before is None:
        uid, gid = _owner(layer, stage)
        _, file = layer.create(stage, name, 0o600, uid, gid)
        file.close()
    else:
        layer.rename((stage, _name(target, before)), (stage, name))
    layer.sync()


def end(layer: UpperLayer, stage: Key, target: str, phase: int) -> None:
    """Write down that all is done."""
    layer.sync()
    layer.unlink(stage, _name(target, phase), None)


def _name(target: str, phase: int) -> bytes:
    return _SIGN + f"{target}-{phase}".encode()


def _owner(layer: UpperLayer, key: Key) -> tuple[int, int]:
    attr = layer.stat(key)
    return attr.st_uid, attr.st_gid
