"""Record how far the conversion of a store from one format to another, in place, has come.

A conversion can be interrupted anywhere and continued. Each step can be repeated, except those of an earlier
phase. So the phase is recorded, in the name of a file that exists until the end::

    .wh..wh.cowfs/converting-FORMAT-PHASE
    .wh..wh.cowfs/upper/ work/ cowfs/       the store's parts, on their way from or to the root

While this file exists, no version of cowfs recognises the filesystem as a store.
"""

from __future__ import annotations

import os
import stat

from cowfs.errors import StoreError
from cowfs.layers.base import Key, UpperLayer

STAGE = b".wh..wh.cowfs"
_SIGN = b"converting-"


def begun(layer: UpperLayer) -> tuple[str, int] | None:
    """Return the target format and the phase of an unfinished conversion; None if there is none. Blocks."""
    found = layer.lookup(layer.root, STAGE)
    if found is None or not stat.S_ISDIR(found[1].st_mode):
        return None
    for entry in layer.readdir(found[0]):
        if entry.name.startswith(_SIGN):
            target, _, phase = entry.name[len(_SIGN) :].partition(b"-")
            return os.fsdecode(target), int(phase) if phase.isdigit() else 0
    return None


def interrupted(layer: UpperLayer) -> StoreError | None:
    """Return the error for an interrupted conversion; None if there is none. Blocks."""
    found = begun(layer)
    if found is None:
        return None
    return StoreError(
        f"{layer.name}: its conversion to the {found[0]} format was interrupted",
        f"cowfs convert {layer.name} --to {found[0]} completes it",
    )


def refuse_begun(layer: UpperLayer) -> None:
    """StoreError if a conversion was interrupted. Blocks."""
    error = interrupted(layer)
    if error is not None:
        raise error


def note(layer: UpperLayer, stage: Key, target: str, phase: int, before: int | None) -> None:
    """Record that a phase begins. Blocks until that, and everything done before, is on disk; OSError."""
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
    """Record that the conversion is complete. Blocks; OSError."""
    layer.sync()
    layer.unlink(stage, _name(target, phase), None)


def _name(target: str, phase: int) -> bytes:
    return _SIGN + f"{target}-{phase}".encode()


def _owner(layer: UpperLayer, key: Key) -> tuple[int, int]:
    attr = layer.stat(key)
    return attr.st_uid, attr.st_gid
