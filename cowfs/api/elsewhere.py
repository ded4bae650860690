"""Take changes elsewhere: into other formats, trees and stores, and onto other roots."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from cowfs.api.changes import Changes, is_on, open_changes
from cowfs.api.mounting import mount
from cowfs.client import find_mount
from cowfs.errors import UsageError
from cowfs.exports.how import How
from cowfs.offline_changes import Lowers, Tell
from cowfs.types import Change

if TYPE_CHECKING:
    from cowfs.exports.apply import Root
    from cowfs.exports.choose import Ask
    from cowfs.exports.losses import Losses
    from cowfs.rebasing import Rebased
    from cowfs.store.offline.convert_in_place import Converted


def export(
    what: str,
    target: str,
    how: How,
    lowers: Lowers | None = None,
    *,
    trust: bool = False,
    tell: Tell = lambda _: None,
    tick: Callable[[bytes, int], None] = lambda *_: None,
) -> Losses:
    """Write the changes of a store or a mount, or its whole tree, to *target*; return what gets lost.

    A directory of files gets no set-ID bits, capabilities and devices from what others can change, but with
    *trust*.
    *target* is whole in the end, or what it was before. *tick* is told of each path that is come to, and of
    so many bytes of it. Raises CowfsError, and OSError with the path of what cannot be read.
    """
    from cowfs.exports.run import check, export

    check(how)
    found = find_mount(what)
    with open_changes(what, lowers, tell) as changes:
        if found is not None and is_on(target, found.dev):
            raise UsageError(f"{target}: is inside the mount that is exported", "choose a path outside of it")
        withheld = {} if trust or how.format != "overlayfs" else _withheld(changes, target)
        return export(changes, how, target, tick, withheld)


def apply(
    what: str,
    root: str,
    lowers: Lowers | None = None,
    *,
    force: bool = False,
    trust: bool = False,
    dry_run: Callable[[Change], object] | None = None,
    backup: str = "",
    ask: Ask | None = None,
    tell: Tell = lambda _: None,
    tick: Callable[[bytes, int], None] = lambda *_: None,
) -> tuple[list[tuple[bytes, str]], Losses]:
    """Carry the changes of a store or a mount onto the directory *root*, or into another store.

    Returns the conflicts (each a path and what is wrong there), and what could not be made. With conflicts,
    and without *force*, nothing is changed; neither with *dry_run*, which is told of each change. Set-ID
    bits, capabilities and devices of what others can change are left out, but with *trust*. With *backup* a
    directory of that name is made first, of what is replaced (:func:`undo_apply`); *ask* chooses what is
    changed, conflicts too (:func:`cowfs.exports.choose.chosen`). Blocks.
    Raises CowfsError, and OSError with the path of what cannot be read or changed.
    """
    from cowfs.exports.apply import Apply, Compared, conflicts
    from cowfs.exports.choose import chosen
    from cowfs.exports.kept import keep
    from cowfs.exports.losses import Losses
    from cowfs.exports.plan import plan

    found = find_mount(what)
    losses = Losses()
    with ExitStack() as stack:
        changes = stack.enter_context(open_changes(what, lowers, tell))
        root = _tree_of(root, stack)
        if found is not None and is_on(os.path.join(root, "."), found.dev):
            raise UsageError(f"{root}: is inside the mount whose changes are meant", "choose another one")
        withheld = {} if trust else _withheld(changes, root)
        target = _root(root, stack)
        before, after = changes.tree_before(), changes.tree()
        items = plan(changes.exactly(), after, before)
        if dry_run is not None:
            for change in changes:
                dry_run(change)
        bad = list(conflicts(items, target, before, after))
        if ask is not None:
            items = chosen(items, before, after, dict(bad), ask)
        if dry_run is None and (force or ask is not None or not bad):
            if backup:
                for line in keep(items, after, target, backup, tick):
                    tell(f"{backup}: {line}")
            Apply(target, Compared(before), losses, tick).run(items, after, withheld)
    return bad, losses


def _withheld(changes: Changes, target: str) -> dict[str, str]:
    """Return what must not be made of changes; UsageError if nothing must be where others may see it."""
    withheld = changes.withheld()
    if "shown" in withheld:
        raise UsageError(f"{target}: {withheld['shown']}", "use --trust if you trust it")
    return withheld


def undo_apply(
    root: str, backup: str, tick: Callable[[bytes, int], None] = lambda *_: None, *, trust: bool = False
) -> tuple[list[bytes], Losses]:
    """Let a directory, or a store, have again what *backup* has kept of it.

    Returns the directories that stay, as something new is in them, and what could not be made: with *trust*
    set-ID bits, capabilities and devices, too, though others can change the backup. Blocks. Raises
    CowfsError, and OSError with the path of what cannot be changed.
    """
    from cowfs.exports.kept import bring_back
    from cowfs.linux.trust import forbidden

    with ExitStack() as stack:
        withheld = {} if trust else forbidden([os.path.abspath(backup)], (0, os.geteuid()))
        return bring_back(backup, _root(_tree_of(root, stack), stack), tick, withheld)


def _root(path: str, stack: ExitStack) -> Root:
    from cowfs.exports.apply import Root

    try:
        root = Root(path)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", "give a directory") from None
    stack.callback(root.close)
    return root


def _tree_of(path: str, stack: ExitStack) -> str:
    """Return a directory; for a store that is not mounted, one that it is mounted on until *stack* ends."""
    from cowfs.client import mount_with_store
    from cowfs.offline_changes import recorded_lowers
    from cowfs.store.format.sniff import may_be_store
    from cowfs.store.served.open import open_store

    if find_mount(path) is not None or not may_be_store(path):
        return path
    if mount_with_store(path) is not None:
        raise UsageError(f"{path}: is mounted", "give its mountpoint")
    with closing(open_store(path, read_only=True)) as store:
        given, offsets, data_only = recorded_lowers(path, store.header.lowers, ())
    if data_only:
        raise UsageError(f"{path}: has data-only lowers", "mount it, and give the mountpoint")
    tree = stack.enter_context(mount(given, path, offset=":".join(map(str, offsets))))
    return str(tree.path)


def backup(
    what: str,
    target: str,
    *,
    force: bool = False,
    tell: Tell = lambda _: None,
    progress: Tell = lambda _: None,
    tick: Callable[[int], None] = lambda _: None,
) -> None:
    """Copy a store, or that of a mount in use, to *target*: what it is at one moment.

    A store in a directory becomes a directory, any other a file; either is a store. *target* is whole in the
    end, or not there; one that is there is replaced only with *force*. *tell* is told of oddities,
    *progress* of what the daemon of a mount does, *tick* of bytes that were copied. Blocks. Raises
    CowfsError, and OSError with the path of what cannot be copied.
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
    """Check a store that :func:`backup` has made, and copy it to *target*.

    With *force* in the place of an image, which must not be in use. *target* is whole in the end, or what it
    was. *tell* is told of oddities, *tick* of bytes that were copied. Blocks. Raises as :func:`backup` does.
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
) -> Converted:
    """Give a store the format ``overlayfs`` or ``aufs``, in place, or complete that; return what was done.

    To aufs, what the store has of its *lowers* by a renamed directory or a file without its data is copied
    into it first. *tick* is told of each name. Blocks. Raises CowfsError.
    """
    from cowfs.converting import convert

    return convert(store, target, lowers or Lowers(), tell=tell, tick=tick)


def rebase(
    store: str,
    new: Lowers,
    old: Lowers | None = None,
    *,
    dry_run: bool = False,
    conflicts: str = "",
    tell: Tell = lambda _: None,
    tick: Callable[[bytes], None] = lambda _: None,
) -> Rebased:
    """Let a store belong to *new*, another version of its lowers, with the changes and checkpoints it has.

    *old* are the lowers that it was made for; without them, they are where it last saw them. What both have
    changed stays as the store has it, and is told in what is returned; the versions of each are written to
    the directory *conflicts*, if one is given. With *dry_run* nothing is changed. Whenever it is interrupted
    the store is the old one or the new one. *tick* is told of each path. Blocks. Raises CowfsError.
    """
    from cowfs.rebasing import rebase

    return rebase(store, old or Lowers(), new, dry_run=dry_run, conflicts=conflicts, tell=tell, tick=tick)
