"""Write lists of changed paths, for programs that copy or back up the files themselves."""

from __future__ import annotations

from collections.abc import Iterator

from cowfs.changes.version import Tree
from cowfs.exports.losses import Losses
from cowfs.exports.plan import Item, Plan


def for_rsync(items: Plan) -> Iterator[bytes]:
    """Yield the input of ``rsync --from0 --files-from``: all paths, the deleted ones last.

    rsync takes lines that begin with # or ; for comments, so such paths begin with ./ here.
    """
    for are_gone in (False, True):
        for path, item in items.items():
            if (item is Item.WHITEOUT) == are_gone:
                yield (b"./" + path if path.startswith((b"#", b";")) else path or b".") + b"\0"


def for_restic(items: Plan, tree: Tree, losses: Losses) -> Iterator[bytes]:
    """Yield the input of ``restic backup --files-from-raw``, which would back up the whole of a directory."""
    parents = {path.rpartition(b"/")[0] for path, item in items.items() if item is not Item.WHITEOUT}
    for path, item in items.items():
        if item is Item.WHITEOUT:
            losses.add("deletions left out", path)
            continue
        if path in parents or not path:
            continue
        node = tree.node(path)
        if node is None:
            losses.add("left out, because they were deleted during the export", path)
        elif node.is_dir and tree.names(path):
            losses.add("directories left out: only their attributes or deletions in them are changes", path)
        else:
            yield path + b"\0"
