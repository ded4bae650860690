"""Undo the last revert (:mod:`cowfs.changes.revert`): its steps in reverse order."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Generator
from contextlib import closing
from itertools import islice

from cowfs.changes.moves import Moves
from cowfs.changes.steps import OFTEN, Done, Forget, Found, Progress, Seen, find, why
from cowfs.changes.trash import ASIDE, Batch, Log, Step, attributes_from_json, batches, given_up
from cowfs.errors import StoreError
from cowfs.layers.base import File, Key
from cowfs.overlay import away, uncover
from cowfs.overlay.node import Node
from cowfs.overlay.overlay import Overlay

_NOTED = 1000
"""How many steps that needed no undoing are recorded at once."""
_SET_ASIDE = re.compile(rb"(?:^|(?<=/))[^/]*" + re.escape(ASIDE) + rb"[^/]*(?=/)")
_DEEPEST = 64
"""How deep files that were set aside can be nested in each other."""
_PIECE = 1 << 20


def undo(fs: Overlay, forget: Forget) -> Progress:
    """Undo the last revert. StoreError if there is none, or its log is damaged."""
    return undo_batch(fs, last_batch(fs), forget)


def last_batch(fs: Overlay) -> Batch:
    """Return the last revert. StoreError if there is none. Blocks; OSError."""
    batch = next(batches(fs.upper), None)
    if batch is None:
        raise StoreError(
            "nothing to undo: nothing was reverted, or the trash was emptied", "cowfs diff lists the changes"
        )
    return batch


def undo_batch(fs: Overlay, batch: Batch, forget: Forget) -> Progress:
    """Undo one batch. StoreError if its log is damaged.

    It can be killed at any point and started again. The log records each undone step; a step that was undone
    but not yet recorded is recognised by the state of the tree.
    """
    log = batch.log()
    try:
        yield from log.scan()
        again = yield from _undo_all(fs, batch, log, forget)
    finally:
        log.close()
    if batch.is_empty() and not again:
        batch.remove()


def _undo_all(
    fs: Overlay, batch: Batch, log: Log, forget: Forget
) -> Generator[Done | Callable[[], None] | None, None, bool]:
    """Undo the steps of a log. Return whether some could not be undone, but may be at the next attempt."""
    again = False
    nothing_to_do: list[int] = []
    removed: set[bytes] = set()
    """Former paths of files that were set aside and then removed."""
    moves, count = Moves(), 0
    """All renames to undo, and how many of them are undone."""
    homes: set[bytes] = set()
    """Present paths of directories that will be renamed: that rename is what is reported of them."""
    for step in log.renames():
        moves.add(step.path, step.source)
        homes.add(step.path)
    for step in reversed(log):
        stale: uncover.Stale = []
        why_not = ""
        undone = False
        try:
            undone = _undo(fs, batch, step, stale)
        except OSError as error:
            why_not = why(error)
            again |= error.errno != errno.ENOENT
        if not why_not:
            nothing_to_do.append(step.number)
        if undone or len(nothing_to_do) == _NOTED:
            batch.note_undone(nothing_to_do)
            nothing_to_do.clear()
            yield None
        if stale:
            yield lambda stale=stale: forget(stale)  # type: ignore[misc]
        count += step.kind == "renamed"
        if why_not:
            yield Done(_final_path(step.source or step.path, log.aside), why_not)
        elif step.kind == "renamed":
            if undone and _is_reported(fs, step, log.aside, removed):
                yield Done(moves.now(step.source, count))
        elif step.kind == "moved" and step.source:
            removed.add(step.source)
        elif undone and not (step.path in homes and _is_of_a_directory(step)):
            yield Done(step.path)
    batch.note_undone(nothing_to_do)
    return again


def _is_reported(fs: Overlay, step: Step, aside: dict[bytes, bytes], removed: set[bytes]) -> bool:
    """Whether to report an undone rename: of a directory, or of a file that was in the way and is back.

    Other files are reported with their content.
    """
    if step.source in aside:
        return False
    if step.path in aside and step.source in removed:
        return True
    place = find(fs, step.source)
    found = fs.lookup(place.parent, place.name)
    return found is not None and found[0].is_dir


def _is_of_a_directory(step: Step) -> bool:
    return step.attributes is not None and stat.S_ISDIR(step.attributes["mode"])


def _final_path(path: bytes, aside: dict[bytes, bytes]) -> bytes:
    """Return the path that *path* becomes when nothing is set aside any more."""
    for found in reversed([*islice(_SET_ASIDE.finditer(path) if aside else (), _DEEPEST)]):
        where = path[: found.end()]
        if where in aside:
            return aside[where] + path[len(where) :]
    return path


def _undo(fs: Overlay, batch: Batch, step: Step, stale: uncover.Stale) -> bool:
    """Undo one step; return False if it was never done, or is already undone. OSError."""
    if not step.path:
        return _undo_attributes(fs, fs.root, step, stale)
    kept = batch.place(step.number)
    found = fs.upper.lookup(*kept)
    if step.kind in {"moved", "copied"} and found is None:
        return False
    if step.kind == "moved" and found is not None and fs.is_whiteout(*found):
        fs.upper.unlink(*kept, None)  # the restored file was exchanged with this whiteout
        return False
    place = find(fs, step.path)
    if step.kind == "moved":
        uncover.cover(fs, place.parent, place.name, kept, stale)
        return True
    if step.kind == "whiteout":
        if fs.lookup(place.parent, place.name) is None:
            return False
        uncover.hide(fs, place.parent, place.name, stale)
        return True
    if step.kind == "renamed":
        return _undo_rename(fs, place, find(fs, step.source), stale)
    node = fs.resolve(place.parent, place.name)
    if step.kind == "attributes":
        return _undo_attributes(fs, node, step, stale)
    assert found is not None
    fs.copy_up(node)
    if _was_written(fs, place, node, found[0]):
        raise FileExistsError(errno.EEXIST, "something else is there now", step.path)
    uncover.give_content(fs, node, fs.upper, found[0], stale)
    uncover.give_attributes(fs, node, uncover.attributes_of(fs, fs.upper, found[0]), stale)
    fs.upper.unlink(*kept, found[0])
    return True


def _was_written(fs: Overlay, place: Found, node: Node, kept: Key) -> bool:
    """Whether a file that was reverted in place was written to since: somebody had it open.

    Its content is the lower's. If a revert or an undo was interrupted, it is the beginning of the lower's or
    of what was *kept*, and then zeros.
    """
    lower = fs.stack.find(place.parent.lowers, place.name)
    sources = [(fs.upper, kept), *((fs.lowers[number], key) for number, key, _ in lower[-1:])]
    with closing(fs.upper.open(node.upper, os.O_RDONLY)) as file:
        for layer, key in sources:
            with closing(layer.open(key, os.O_RDONLY)) as source:
                if _begins_as(file, source):
                    return False
    return True


def _begins_as(file: File, source: File) -> bool:
    """Whether a file is what :func:`uncover.give_content` has made of it, or had when it was interrupted."""
    size = file.stat().st_size
    if size not in {0, source.stat().st_size}:
        return False
    is_same = True
    for at in range(0, size, _PIECE):
        data = file.pread(_PIECE, at)
        if is_same:
            other = source.pread(_PIECE, at)
            if data == other:
                continue
            pairs = enumerate(zip(data, other, strict=False))
            data = data[next((number for number, (one, two) in pairs if one != two), len(other)) :]
            is_same = False
        if data.strip(b"\0"):
            return False
    return True


def _undo_rename(fs: Overlay, place: Found, target: Found, stale: uncover.Stale) -> bool:
    is_there = fs.lookup(place.parent, place.name) is not None
    if fs.lookup(target.parent, target.name) is not None:
        if is_there:
            raise FileExistsError(errno.EEXIST, "something else is there now", target.name)
        return False
    fs.rename(place.parent, place.name, target.parent, target.name)
    stale += [(place.parent.ino, place.name), (target.parent.ino, target.name)]
    return True


def _undo_attributes(fs: Overlay, node: Node, step: Step, stale: uncover.Stale) -> bool:
    wanted = attributes_from_json(step.attributes or {})
    if stat.S_IFMT(wanted.attr.st_mode) != stat.S_IFMT(node.mode):
        raise FileExistsError(errno.EEXIST, "something else is there now", step.path)
    wanted.xattrs = [pair for pair in wanted.xattrs if not fs.format.is_own(pair[0])]
    fs.copy_up_meta(node)
    uncover.give_attributes(fs, node, wanted, stale)
    return True


def is_trash_empty(fs: Overlay) -> bool:
    """Whether :func:`empty_trash` has nothing to delete. Blocks; OSError."""
    return next(batches(fs.upper), None) is None and next(given_up(fs.upper), None) is None


def empty_trash(fs: Overlay) -> Progress:
    """Delete all reverted changes. After this, they cannot be restored.

    No batch can be undone in part: each is renamed first, which gives it up as a whole, and then deleted in
    steps. If this is interrupted, the next call deletes the rest.
    """
    for batch in batches(fs.upper):
        batch.give_up()
    uncover.count_by_lower(fs)
    whole = done = 0
    for batch in given_up(fs.upper):
        for count in batch.counted():
            whole += count
            yield None
    yield Seen(0, whole)
    for batch in given_up(fs.upper):
        for _ in batch.removing(lambda place: away.moved(fs, place, -1)):
            done += 1
            yield Seen(done, whole) if done % OFTEN == 0 else None
    fs.away = None
