"""The part of the Python API that copies a store, converts it, or moves it to another lower."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cowfs.offline_changes import Lowers, Tell

if TYPE_CHECKING:
    from cowfs.changes.names import Expect
    from cowfs.rebasing import Rebased
    from cowfs.store.offline.convert_in_place import Converted


def backup(
    what: str,
    target: str,
    *,
    force: bool = False,
    tell: Tell = lambda _: None,
    progress: Tell = lambda _: None,
    tick: Callable[[int], None] = lambda _: None,
) -> None:
    """Copy a store, or the store of a mount in use, to *target*, as it is at one moment.

    The copy is a store: a directory if the store is one, else a file. An existing one is replaced only with
    *force*. *tell* gets warnings, *progress* what the daemon has done, *tick* numbers of bytes copied. At the
    end *target* is complete or does not exist. Blocks. Raises CowfsError, and OSError with the path of what
    cannot be copied.
    """
    from cowfs.backups import backup

    backup(what, target, force=force, tell=tell, progress=progress, tick=tick)


def restore(
    source: str,
    target: str,
    *,
    force: bool = False,
    tell: Tell = lambda _: None,
    tick: Callable[[int], None] = lambda _: None,
) -> None:
    """Check a store made by :func:`backup` and copy it to *target*; with *force* it replaces an unused image.

    At the end *target* is complete, or as it was before. Otherwise as :func:`backup`.
    """
    from cowfs.backups import restore

    restore(source, target, force=force, tell=tell, tick=tick)


def convert(
    store: str,
    target: str,
    lowers: Lowers | None = None,
    *,
    tell: Tell = lambda _: None,
    tick: Callable[[bytes], None] = lambda _: None,
    expect: Expect | None = None,
) -> Converted:
    """Convert a store in place to ``overlayfs`` or ``aufs``, or complete that; return what was done.

    For aufs, the data that it refers to in its *lowers* is copied into it first. *tick* is called for each
    name. Before each pass *expect* is given a function that returns about how many names there will be.
    Blocks. Raises CowfsError.
    """
    from cowfs.changes.names import not_asked
    from cowfs.converting import convert

    return convert(store, target, lowers or Lowers(), tell=tell, tick=tick, expect=expect or not_asked)


def rebase(
    store: str,
    new: Lowers,
    old: Lowers | None = None,
    *,
    dry_run: bool = False,
    conflicts: str = "",
    tell: Tell = lambda _: None,
    tick: Callable[[bytes], None] = lambda _: None,
    expect: Expect | None = None,
) -> Rebased:
    """Move a store, with its changes and checkpoints, to *new*, another version of its lowers.

    *old* are its lowers; the default is where the store last had them. What both sides have changed stays as
    in the store, and is in the result; with *conflicts* all versions of it are written to that directory,
    which is created. With *dry_run* nothing changes. If it is interrupted, the store is the old one or the
    new one. *tick* and *expect* are as in :func:`convert`. Blocks. Raises CowfsError.
    """
    from cowfs.changes.names import not_asked
    from cowfs.rebasing import rebase

    return rebase(
        store,
        old or Lowers(),
        new,
        dry_run=dry_run,
        conflicts=conflicts,
        tell=tell,
        tick=tick,
        expect=expect or not_asked,
    )
