"""Revert changes, and make and restore checkpoints.

The control socket of a mounted union uses it, and so do commands on a store that is not mounted.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from typing import Any

from cowfs.changes import checkpoint, merge, revert, undo, vacuum
from cowfs.changes.select import Selection, selected
from cowfs.changes.steps import Done, Progress, Seen
from cowfs.errors import StoreError, UsageError
from cowfs.linux.files import LACK_OF_ROOM
from cowfs.overlay.uncover import Stale
from cowfs.store.served.store import Store
from cowfs.union import Union


def request(
    what: str, paths: list[bytes] | None = None, *, metadata: bool = False, dry_run: bool = False
) -> dict[str, Any]:
    """Return the request to do *what*: ``revert`` (no paths: everything), ``undo``, ``vacuum``, ``trash``."""
    if what == "revert" and dry_run:
        what = "rehearse"  # a daemon that does not know this does nothing
    given = None if paths is None else [base64.b64encode(path).decode() for path in paths]
    return {"what": what, "paths": given, "metadata": metadata, "dry_run": dry_run, "counts": True}


def _at_once() -> None:
    """Do nothing: a step that makes the caller send pending replies before a thread works."""


Told = Generator[dict[str, Any] | Callable[[], None] | None, None, None]


def told(union: Union, asked: dict[str, Any], ask_again: Callable[[Stale], None]) -> Told:
    """Do what is *asked*; yield :data:`cowfs.fuse.control.Replies`. Does not wait for lowers."""
    fs, what = union.overlay, asked.get("what")
    if union.store.read_only and not (what in {"rehearse", "vacuum"} and asked.get("dry_run")):
        raise UsageError(f"{union.store.path}: is read-only", "mount it without ro")
    if fs.loaded and what != "trash" and not asked.get("dry_run"):
        raise UsageError(
            f"{union.modules[fs.loaded[0]].path}: is a module of this mount; a store cannot depend on it",
            "remove all modules first, with cowfs lower remove",
        )
    steps: Progress
    if what == "revert":
        back = functools.partial(undo.undo_batch, fs, forget=ask_again)
        steps = revert.revert(fs, _selection(asked), ask_again, back, metadata=bool(asked.get("metadata")))
    elif what == "rehearse":
        steps = revert.rehearse(fs, _selection(asked), metadata=bool(asked.get("metadata")))
    elif what == "undo":
        steps = undo.undo(fs, ask_again)
    elif what == "vacuum":
        steps = vacuum.vacuum(fs, ask_again, dry_run=bool(asked.get("dry_run")))
    elif what == "trash":
        steps = undo.empty_trash(fs)
    else:
        raise UsageError(f"{what!r}: cannot be done")
    try:
        for step in steps:
            if isinstance(step, Done):
                path = base64.b64encode(step.path).decode()
                yield {"path": path, "kind": step.kind, "why_not": step.why_not, "bytes": step.size}
            elif isinstance(step, Seen):
                if asked.get("counts"):
                    yield {"seen": step.changes, "whole": step.whole}
                    yield _at_once
            else:
                yield step
    except OSError as error:
        raise _failed(union, error) from None


def _selection(asked: dict[str, Any]) -> Selection:
    paths = asked.get("paths")
    return Selection() if paths is None else selected(map(base64.b64decode, paths))


def is_needed(union: Union, asked: dict[str, Any], tick: Callable[[int, int], None]) -> bool:
    """Return whether what is *asked* would change anything in a union that is not mounted.

    The store is only read. *tick* is told how much was looked at, as in :class:`Seen`. Blocks. Raises the
    CowfsError of what is refused.
    """
    fs = union.overlay
    if merge.is_pending(union.store):
        return True  # until then it is a layer of a deleted checkpoint that is compared with
    try:
        match asked["what"]:
            case "undo":
                undo.last_batch(fs)
                return True
            case "trash":
                return not undo.is_trash_empty(fs)
            case "vacuum":
                look = vacuum.is_needed(fs)
            case _:
                look = revert.is_needed(fs, _selection(asked), metadata=bool(asked["metadata"]))
        while True:
            try:
                step = next(look)
            except StopIteration as end:
                return bool(end.value)
            if isinstance(step, Seen):
                tick(*step)
    except OSError as error:
        raise _failed(union, error) from None


def checkpoints(
    union: Union, asked: dict[str, Any], ask_again: Callable[[Stale], None] = lambda _: None
) -> Told:
    """Do what is *asked* with the checkpoint ``name``: ``take``, ``go_back`` or ``delete``."""
    store, fs, name = union.store, union.overlay, str(asked.get("name"))
    if store.read_only:
        raise UsageError(f"{store.path}: is read-only", "mount it without ro")
    must_not_be_apart(store)
    try:
        match asked.get("what"):
            case "take":
                yield from checkpoint.take(store, fs, name)
            case "go_back":
                yield from checkpoint.go_back(store, fs, name, ask_again)
            case "delete":
                yield from checkpoint.delete(store, fs, name)
            case what:
                raise UsageError(f"{what!r}: cannot be done")
    except OSError as error:
        with suppress(OSError):
            yield from checkpoint.tidy(store)  # what was prepared
        raise _failed(union, error) from None


def must_not_be_apart(store: Store) -> None:
    """UsageError for the upper and the work dir of another program, which cannot have checkpoints."""
    if store.is_apart:
        raise UsageError(
            f"{store.path}: is the upperdir of another program, which would not find its changes again",
            "keep states with that program, as with podman commit",
        )


def _failed(union: Union, error: OSError) -> StoreError:
    hint = "delete files, or make it larger with cowfs grow" if error.errno in LACK_OF_ROOM else ""
    return StoreError(f"{union.store.path}: {error.strerror}", hint)


def offline(union: Union, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Do what is *asked* with a union that is not mounted. Blocks."""
    yield from done(told(union, asked, lambda _: None))


def done(steps: Told) -> Iterator[dict[str, Any]]:
    """Do all steps; yield their replies. Blocks."""
    for step in steps:
        if isinstance(step, dict):
            yield step
        elif step is not None:
            step()
