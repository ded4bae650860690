"""The Python API: what was changed in a store or in a mounted union.

::

    with open_changes("/mnt") as changes:
        for change in changes:
            print(change.kind, os.fsdecode(change.path), change.what)
            before, after = changes.before(change.path), changes.after(change.path)

    with mount("/usr") as tree:
        (tree.path / "bin/new").write_text("x")
        print(tree.diff())

Every function blocks. It raises :class:`cowfs.errors.CowfsError` with a message for the user, or the
:class:`OSError` of a layer.
"""

from __future__ import annotations

import base64
import errno
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from cowfs.checkpoints import (
    Checkpoint,
    checkpoint,
    checkpoints,
    delete_checkpoint,
    deleted_counts,
    is_mount_above_deleted,
    rollback,
)
from cowfs.client import ask, checked_answer, find_mount
from cowfs.command import warm as warm  # noqa: PLC0414 (re-exported by the package)
from cowfs.errors import SystemFailure, UsageError
from cowfs.exports.how import DIRECTORIES, How
from cowfs.linux.files import LACK_OF_ROOM
from cowfs.mounted_changes import PATIENCE
from cowfs.mounted_tree import MountedTree, mount
from cowfs.offline_changes import Lowers, Tell, open_offline_union
from cowfs.opened_changes import Changes, open_changes
from cowfs.types import Change
from cowfs.watched import Event, Events, watch

if TYPE_CHECKING:
    from cowfs.backups import backup, restore
    from cowfs.changes.blame import History
    from cowfs.changes.names import Expect
    from cowfs.changes.patch import Counts
    from cowfs.changes.select import Selection
    from cowfs.changes.version import Tree
    from cowfs.converting import convert
    from cowfs.exports.apply_root import Root
    from cowfs.exports.choose import Ask
    from cowfs.exports.losses import Losses
    from cowfs.exports.plan import Plan
    from cowfs.rebasing import rebase

_ELSEWHERE = {"backup": "backups", "convert": "converting", "rebase": "rebasing", "restore": "backups"}

__all__ = [
    "Change", "Changes", "Checkpoint", "Done", "Event", "Events", "How", "Lowers", "MountedTree", "Tell",
    "apply", "backup", "blame", "checkpoint", "checkpoints", "convert", "delete_checkpoint", "export",
    "histories", "line_counts", "mount", "open_changes", "patch", "rebase", "reclaimable", "report",
    "restore", "rollback", "take_back", "undo_apply", "watch",
]  # fmt: skip


def __getattr__(name: str) -> object:
    """Import what is asked for on first use: most programs need none of it."""
    if name not in _ELSEWHERE:
        raise AttributeError(name)
    return getattr(import_module(f"cowfs.{_ELSEWHERE[name]}"), name)


def export(
    what: str,
    target: str,
    how: How,
    lowers: Lowers | None = None,
    *,
    trust: bool = False,
    tell: Tell = lambda _: None,
    tick: Callable[[bytes, int], None] = lambda *_: None,
    expect: Expect | None = None,
) -> Losses:
    """Write the changes of a store or a mount, or its whole tree, to *target*; return what gets lost.

    A directory of files gets no set-ID bits, capabilities and devices if others can change the source, unless
    *trust* is set. At the end *target* is complete, or as it was before. *tick* is called with each path
    reached, and with the number of bytes read of it. Before each pass *expect* is given a function that
    returns about how many paths there will be. Raises CowfsError, and OSError with the path of what cannot be
    read.
    """
    from cowfs.exports.run import Watch, check, export
    from cowfs.exports.target import must_be_elsewhere

    check(how)
    found = find_mount(what)
    with open_changes(what, lowers, tell) as changes:
        if found is not None and _is_on(target, found.dev):
            raise UsageError(f"{target}: is inside the mount that is exported", "choose a path outside of it")
        must_be_elsewhere(target, changes.paths(), below=how.merged and how.format in DIRECTORIES)
        withheld = {} if trust or how.format != "overlayfs" else _withheld(changes, target)
        if expect is not None:
            expect(functools.partial(changes.count_names, merged=how.merged or how.format == "iso"))
        return export(changes, how, target, Watch(tick, expect), withheld)


def patch(
    changes: Changes, wanted: Iterable[Change] | None = None, *, binary: bool = False
) -> Iterator[bytes]:
    """Yield changes as a patch that ``git apply`` takes, a file at a time: all of them, or only the *wanted*.

    With *binary* it has the content of binary files. Blocks. Raises SystemFailure without diff(1).
    """
    from cowfs.changes.patch import patch

    return patch(changes if wanted is None else wanted, changes, binary=binary)


def line_counts(changes: Changes, wanted: Iterable[Change] | None = None) -> Iterator[Counts]:
    """Yield how many lines each changed file has gained and lost, as ``cowfs diff --stat`` prints it.

    Blocks. Raises SystemFailure without diff(1).
    """
    from cowfs.changes.patch import stat_of

    return stat_of(changes if wanted is None else wanted, changes)


def report(
    what: str,
    target: str,
    selection: Selection | None = None,
    lowers: Lowers | None = None,
    *,
    force: bool = False,
    tell: Tell = lambda _: None,
    tick: Callable[[str, int, int], None] = lambda *_: None,
) -> None:
    """Write the changes of a store or a mount as an HTML page to the file *target*.

    At the end the file is complete, or as it was before; an existing one is replaced only with *force*. ``-``
    is standard output. *selection* limits the page to these changes. *tick* is called with what is being
    read, how many of it were, and how many there are, or 0. Blocks; raises CowfsError, and OSError with the
    path of what cannot be read.
    """
    from cowfs.changes.select import Selection
    from cowfs.exports.report import Facts, write_report
    from cowfs.exports.target import must_be_elsewhere, new_file

    found = find_mount(what)
    with open_changes(what, lowers, tell) as changes, ExitStack() as stack:
        if target == "-":
            out = sys.stdout.buffer
        elif found is not None and _is_on(target, found.dev):
            raise UsageError(
                f"{target}: is inside the mount that is reported on", "choose a path outside of it"
            )
        else:
            must_be_elsewhere(target, changes.paths())
            fd = stack.enter_context(new_file(target, force=force))
            out = stack.enter_context(os.fdopen(fd, "wb", closefd=False))
        selection = selection or Selection()
        selection.must_exist(changes, what)
        facts = Facts(what, changes.about(), changes.records())
        write_report(changes, facts, selection, out.write, tick)
        out.flush()


def blame(
    what: str,
    paths: Sequence[bytes],
    *,
    recursive: bool = False,
    engine: str = "auto",
    tell: Tell = lambda _: None,
) -> tuple[list[History], int | None]:
    """Return who made, wrote, renamed and removed the files at *paths*, as a store or mount recorded it.

    A path may be a glob (:func:`cowfs.changes.select.pattern`); with *recursive* it includes everything
    recorded below. Without *recursive* each path that is not a glob has a history, empty if nothing is known.
    The second value is the time of the first record, in µs since the epoch. Raises CowfsError.
    """
    found: list[History] = []
    since = None
    for piece, begun in histories(what, paths, recursive=recursive, engine=engine, tell=tell):
        found += piece
        since = begun
    return found, since


_AT_ONCE = 10_000
"""The most histories in memory; each takes some KiB."""


def histories(
    what: str,
    paths: Sequence[bytes],
    *,
    recursive: bool = False,
    engine: str = "auto",
    tell: Tell = lambda _: None,
    tick: Callable[[str], None] = lambda _: None,
) -> Iterator[tuple[list[History], int | None]]:
    """Yield what :func:`blame` returns in pieces, one at least: so any number of paths takes little memory.

    The record is read again for each piece. *tick* is told what is done meanwhile.
    """
    from cowfs.changes import blame as changes
    from cowfs.changes.select import pattern, plain
    from cowfs.recorded import of_mount, of_store

    exact = [] if recursive else [each for path in paths if (each := plain(path)) is not None]
    wide = [path for path in paths if recursive or plain(path) is None]
    matches = [pattern(path).match if recursive else pattern(path).fullmatch for path in wide]
    found = find_mount(what)

    def contents(stack: ExitStack, say: Tell) -> Iterator[bytes]:
        return of_store(what, engine, stack, say) if found is None else of_mount(what, found.dev)

    if wide:
        tick("looking for names in the record")
        with ExitStack() as stack:
            records = contents(stack, tell)
            exact += changes.names_of(records, what, lambda path: any(each(path) for each in matches))
    for first in range(0, max(len(exact), 1), _AT_ONCE):
        tick(f"{first} of {len(exact)} paths")
        with ExitStack() as stack:
            records = contents(stack, (lambda _: None) if wide or first else tell)
            yield changes.blame(records, exact[first : first + _AT_ONCE], what)


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

    Returns the conflicts (each a path and what is wrong there), and what could not be made. With conflicts
    nothing is changed, unless *force* is set. *dry_run* is called with each change, and nothing is changed.
    Set-ID bits, capabilities and devices are left out if others can change the source, unless *trust* is set.
    *backup* names a directory that first receives everything to be replaced (:func:`undo_apply`). *ask*
    chooses what is changed, conflicts included (:func:`cowfs.exports.choose.chosen`). Blocks. Raises
    CowfsError, and OSError with the path of what cannot be read or changed.
    """
    from cowfs.exports.apply import Apply, Compared
    from cowfs.exports.apply_backup import back_up
    from cowfs.exports.choose import chosen
    from cowfs.exports.losses import Losses
    from cowfs.exports.target import must_be_elsewhere

    found = find_mount(what)
    losses = Losses()
    _must_be_another(what, "" if found is None else found.dev, root)
    with ExitStack() as stack:
        changes = stack.enter_context(open_changes(what, lowers, tell))
        named, is_store = root, _is_store(root)
        for directory in (root, backup) if backup else (root,):
            must_be_elsewhere(directory, changes.paths()[:1])
        withheld = {} if trust else _withheld(changes, root)
        before, after = changes.tree_before(), changes.tree()
        target = None if is_store else _root(root, stack)
        items = _planned(changes, before, after)
        if dry_run is not None:
            for change in changes:
                dry_run(change)
        bad, is_done = _conflicts(items, before, after, target, root, tell)
        if ask is not None:
            items = chosen(items, before, after, dict(bad), ask)
        nothing = not items or (is_done and not withheld)
        if dry_run is None and (force or ask is not None or not bad) and (backup or not nothing):
            if target is None:
                root = _tree_of(named, stack)
                target = _root(root, stack)
            if backup:
                for line in back_up(items, after, target, named, backup, tick):
                    tell(f"{backup}: {line}")
            try:
                Apply(target, Compared(before), losses, tick).run(items, after, withheld)
            except OSError as error:
                raise _not_completed(error, named, root, backup) from None
    return bad, losses


def _must_be_another(what: str, dev: str, root: str) -> None:
    """Raise UsageError if *root* is the store *what*, or in the mount with the device number *dev*."""
    from cowfs.exports.target import is_same

    if not dev and is_same(what, root):
        raise UsageError(f"{root}: is the store whose changes are meant", "give another directory or store")
    if dev and _is_on(os.path.join(root, "new"), dev):
        raise UsageError(f"{root}: is in the mount whose changes are meant", "give another directory")


def _planned(changes: Changes, before: Tree, after: Tree) -> Plan:
    """Return what is to be made. An export has a root in any case: leave that out if it is all, and equal."""
    from cowfs.exports.conflicts import is_unchanged
    from cowfs.exports.plan import plan

    items = plan(changes.exactly(), after, before)
    if list(items) == [b""] and is_unchanged(before.node(b""), after.node(b"")):
        return {}
    return items


def _conflicts(
    items: Plan, before: Tree, after: Tree, target: Root | None, root: str, tell: Tell
) -> tuple[list[tuple[bytes, str]], bool]:
    """Return what is wrong in *target*, or in the store *root*, of which no byte is changed yet; and whether
    the store has all changes already."""
    from cowfs.exports.conflicts import conflicts, conflicts_in_tree, is_done

    if target is not None:
        return list(conflicts(items, target, before, after)), False
    with ExitStack() as stack:
        try:
            there = stack.enter_context(open_changes(root, tell=tell))
        except UsageError as error:  # --lower is the one of the changes
            raise UsageError(error.message, "mount it with its lower, and give the mountpoint") from None
        tree = there.tree()
        bad = list(conflicts_in_tree(items, tree, before, after))
        return bad, not bad and is_done(items, tree, before, after)


def _not_completed(error: OSError, named: str, root: str, backup: str) -> Exception:
    """Return what to raise where changes could be made in part; *named* is what *root* is the tree of."""
    path = os.fsdecode(error.filename or b"").lstrip("/")
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return SystemFailure(
            f"{named}: not all changes were made: /{path}: {error.strerror}",
            "each path has its old or its new content; the same command completes it",
        )
    if error.errno not in LACK_OF_ROOM:
        return error
    without = ", without --backup" if backup else ""
    where, room = os.path.join(root, path), "free space there"
    if named != root:  # a store, which was mounted for this alone
        where, room = f"{named}: /{path}", f"make it larger with cowfs grow {named} SIZE"
    return SystemFailure(
        f"{where}: {error.strerror}; each path has its old or its new content",
        f"{room}, and complete it with the same command{without}",
    )


def _withheld(changes: Changes, target: str) -> dict[str, str]:
    """Return what must not be made of changes; UsageError if nothing must be where others may see it."""
    withheld = changes.withheld()
    if "shown" in withheld:
        raise UsageError(f"{target}: {withheld['shown']}", "use --trust if you trust it")
    return withheld


def undo_apply(
    root: str, backup: str, tick: Callable[[bytes, int], None] = lambda *_: None, *, trust: bool = False
) -> tuple[list[bytes], Losses]:
    """Restore to a directory, or a store, what *backup* has kept of it.

    Returns the directories that stay because something new is in them, and what could not be made. With
    *trust* set-ID bits, capabilities and devices are restored even if others can change the backup. Blocks.
    Raises CowfsError, and OSError with the path of what cannot be changed.
    """
    from cowfs.exports.apply_backup import must_be_backup, restore
    from cowfs.linux.trust import forbidden

    must_be_backup(backup, root)
    with ExitStack() as stack:
        withheld = {} if trust else forbidden([os.path.abspath(backup)], (0, os.geteuid()))
        return restore(backup, _root(_tree_of(root, stack), stack), root, tick, withheld)


def _root(path: str, stack: ExitStack) -> Root:
    from cowfs.exports.apply_root import Root

    try:
        root = Root(path)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", "give a directory") from None
    stack.callback(root.close)
    return root


def _is_store(path: str) -> bool:
    """Whether a path is a store that is not mounted. UsageError if it is mounted elsewhere."""
    from cowfs.client import mount_with_store
    from cowfs.store.format.sniff import may_be_store

    if find_mount(path) is not None or not may_be_store(path):
        return False
    if mount_with_store(path) is not None:
        raise UsageError(f"{path}: is mounted", "give its mountpoint")
    return True


def _tree_of(path: str, stack: ExitStack) -> str:
    """Return a directory; for a store that is not mounted, one where it stays mounted until *stack* ends."""
    from cowfs.offline_changes import recorded_lowers
    from cowfs.store.served.open import open_store

    if not _is_store(path):
        return path
    with closing(open_store(path, read_only=True)) as store:
        given, offsets, data_only = recorded_lowers(path, store.header.lowers, ())
    if data_only:
        raise UsageError(f"{path}: has data-only lowers", "mount it, and give the mountpoint")
    stack.enter_context(warm())  # which unmounts it, if we are killed
    tree = stack.enter_context(mount(given, path, offset=":".join(map(str, offsets))))
    return str(tree.path)


def _is_on(path: str, dev: str) -> bool:
    """Whether the directory in which *path* is to be is on this filesystem."""
    try:
        here = os.stat(os.path.dirname(os.path.abspath(path))).st_dev
    except OSError:
        return False
    return f"{os.major(here)}:{os.minor(here)}" == dev


class Done(NamedTuple):
    """What was reverted, restored, or removed; or why it was not."""

    path: bytes
    why_not: str
    kind: str
    size: int
    """Bytes of the store that it freed, if that is its purpose."""


def take_back(
    what: str,
    asked: str,
    paths: Sequence[bytes] | None = None,
    lowers: Lowers | None = None,
    *,
    metadata: bool = False,
    dry_run: bool = False,
    tell: Tell = lambda _: None,
    tick: Callable[[int, int], None] = lambda *_: None,
) -> Iterator[Done]:
    """Give *paths* in a store or a mount the lower's version again, and yield each thing that is done.

    *asked* is ``revert`` (without *paths*: of everything), ``undo`` (of the last revert), ``vacuum`` (removes
    what makes no difference) or ``trash`` (empties the trash). With *dry_run*, ``vacuum`` only finds it, and
    ``revert`` only finds out what it could not do, and yields one thing without a reason if it would do
    anything; the others are refused. *tick* is told how many changes or names were looked at, and about how
    many there are, or 0. CowfsError says why it cannot be done.
    """
    from cowfs.store.format.checkpoints import is_above_deleted
    from cowfs.take_back import offline, request

    if dry_run and asked not in _COMPARING:
        raise UsageError(f"{asked} has no dry run")
    message = request(
        what=asked, paths=None if paths is None else list(paths), metadata=metadata, dry_run=dry_run
    )
    found = find_mount(what)
    with ExitStack() as stack:
        if found is not None:
            if asked in _COMPARING and is_mount_above_deleted(what):
                tell(deleted_counts(what))
            replies: Iterator[dict[str, Any]] = ask(found.dev, "take_back", timeout=PATIENCE, **message)
        elif not dry_run and not _is_needed(what, message, lowers or Lowers(), tick):
            return
        else:
            union = open_offline_union(what, lowers or Lowers(), stack, tell, read_only=dry_run)
            if asked in _COMPARING and is_above_deleted(union.store.layers, union.store.upper):
                tell(deleted_counts(what))
            replies = offline(union, message)
        for reply in replies:
            if "seen" in reply:
                with checked_answer(what):
                    tick(int(reply["seen"]), int(reply.get("whole", 0)))
                continue
            with checked_answer(what):
                path = base64.b64decode(reply["path"])
                done = Done(path, str(reply["why_not"]), str(reply["kind"]), int(reply["bytes"]))
            yield done


_COMPARING = {"revert", "vacuum"}
"""What :func:`take_back` does by comparing with the layer below."""


def _is_needed(what: str, message: dict[str, Any], lowers: Lowers, tick: Callable[[int, int], None]) -> bool:
    """Whether a command would change anything in a store that is not mounted: to open it to write does."""
    from cowfs.take_back import is_needed

    with ExitStack() as stack:
        union = open_offline_union(what, lowers, stack, lambda _: None, read_only=True)
        return is_needed(union, message, tick)


def reclaimable(what: str, lowers: Lowers | None = None, tell: Tell = lambda _: None) -> int:
    """Return how many bytes of a store or a mount ``cowfs vacuum`` would free, if it were asked now.

    Compares the copies of files with what is below them: that takes as long as reading both. Raises
    CowfsError. What the trash takes is not in it: :meth:`Changes.usage` tells that.
    """
    return sum(done.size for done in take_back(what, "vacuum", None, lowers, dry_run=True, tell=tell))
