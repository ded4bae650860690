"""The Python API: what was changed in a store or in a mounted union.

::

    with open_changes("/mnt") as changes:
        for change in changes:
            print(change.kind, os.fsdecode(change.path), change.what)
            before, after = changes.before(change.path), changes.after(change.path)

    with mount("/usr") as tree:
        (tree.path / "bin/new").write_text("x")
        print(tree.diff())

All of it blocks, and raises :class:`cowfs.errors.CowfsError` with what a user should be told, or the
:class:`OSError` of a layer.
"""

from __future__ import annotations

from cowfs.api.changes import Changes, blame, open_changes, report
from cowfs.api.elsewhere import apply, backup, convert, export, rebase, restore, undo_apply
from cowfs.api.mounting import MountedTree, mount
from cowfs.api.taken_back import (
    Checkpoint,
    Done,
    checkpoint,
    checkpoints,
    delete_checkpoint,
    rollback,
    take_back,
)
from cowfs.command import warm as warm
from cowfs.exports.how import How
from cowfs.offline_changes import Lowers, Tell

__all__ = [
    "Changes", "Checkpoint", "Done", "How", "Lowers", "MountedTree", "Tell", "apply", "backup", "blame",
    "checkpoint", "checkpoints", "convert", "delete_checkpoint", "export", "mount", "open_changes", "rebase",
    "report", "restore", "rollback", "take_back", "undo_apply",
]  # fmt: skip
