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
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from cowfs.changes.version import Tree, Version
from cowfs.client import ask, checked_answer, find_mount, the_mount
from cowfs.command import Option, mount_arguments, run_command
from cowfs.command import warm as warm  # noqa: PLC0414 (re-exported by the package)
from cowfs.errors import CowfsError, MountFailure, StoreError, SystemFailure, UsageError
from cowfs.linux.files import LACK_OF_ROOM
from cowfs.linux.fuse import LISTED
from cowfs.mounted_changes import PATIENCE, MountedChanges
from cowfs.offline_changes import Lowers, OfflineChanges, Tell, must_be_there, open_offline_union
from cowfs.store.format.sniff import is_plain_directory, may_exist
from cowfs.types import Change

if TYPE_CHECKING:
    from cowfs.changes.blame import History, Record
    from cowfs.changes.du import Used
    from cowfs.changes.select import Selection
    from cowfs.exports.apply_root import Root
    from cowfs.exports.choose import Ask
    from cowfs.exports.losses import Losses
    from cowfs.exports.run import How
    from cowfs.linux.mount_table import MountInfo

__all__ = [
    "Changes", "Checkpoint", "Done", "Lowers", "MountedTree", "Tell", "apply", "blame", "checkpoint",
    "checkpoints", "delete_checkpoint", "export", "histories", "mount", "open_changes", "reclaimable",
    "report", "rollback", "take_back", "undo_apply",
]  # fmt: skip


class Changes(Protocol):
    """The changes of a store, or of a mounted union."""

    def __iter__(self) -> Iterator[Change]:
        """Yield the changes, sorted by name within each directory; see :mod:`cowfs.changes.diff`."""

    def exactly(self) -> Iterator[Change]:
        """Yield the changes, and also directories whose time alone differs."""

    def tree(self) -> Tree:
        """Return the merged tree."""

    def tree_before(self) -> Tree:
        """Return the tree of the lowers."""

    def before(self, path: bytes) -> Version | None:
        """Return what the lowers have at *path* (from the root, without a leading slash), or None."""

    def after(self, path: bytes) -> Version | None:
        """Return what the merged tree has at *path*, or None."""

    def files_before(self, path: bytes) -> Iterator[bytes]:
        """Yield the path of each file that the lowers have below the directory *path*."""

    def explain(self, path: bytes) -> dict[str, Any]:
        """Return why *path* shows what it shows: see :func:`cowfs.changes.explain.explain`."""

    def usage(self) -> Iterator[Used]:
        """Yield what each inode takes in the store, and why it is there; last, what the filesystem itself
        takes.
        """

    def about(self) -> list[tuple[str, str]]:
        """Return what this is and what it is compared with, as names and values for people."""

    def withheld(self) -> dict[str, str]:
        """Return why copies made from this must have ``nosuid`` and ``nodev``: others can change it.

        ``shown`` says why others must not see such a copy at all: it could show them what only we may read.
        """

    def records(self) -> Iterator[Record] | None:
        """Return who changed what, the newest first; None if nobody recorded it, or we may not know."""


@contextmanager
def open_changes(
    what: str,
    lowers: Lowers | None = None,
    tell: Tell = lambda _: None,
    *,
    since: str | None = None,
    until: str | None = None,
) -> Iterator[Changes]:
    """Open the changes of *what*, a mountpoint or a store that is not mounted; *tell* is called with
    warnings. *since* and *until* name checkpoints: only changes after the one, and before the other.

    A store is opened read-only. Raises UsageError, StoreError, MountFailure or WrongLower if it cannot be
    opened.
    """
    lowers = lowers or Lowers()
    found = find_mount(what)
    with ExitStack() as stack:
        if found is not None:
            if lowers.given is not None:
                raise UsageError(
                    f"{what}: is mounted, so it is compared with the lower it is mounted on", "remove --lower"
                )
            yield MountedChanges(what, found.dev, stack, tell, (since, until))
            return
        if what == "memory":
            raise UsageError("a store in memory can only be reached through its mount", "give the mountpoint")
        if not may_exist(what):
            raise StoreError(f"{what}: no such store or mountpoint", LISTED)
        if is_plain_directory(what):
            raise StoreError(f"{what}: neither a store nor a cowfs mountpoint", LISTED)
        yield OfflineChanges(what, lowers, stack, tell, (since, until))


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

    A directory of files gets no set-ID bits, capabilities and devices if others can change the source, unless
    *trust* is set. At the end *target* is complete, or as it was before. *tick* is called with each path
    reached, and with the number of bytes read of it. Raises CowfsError, and OSError with the path of what
    cannot be read.
    """
    from cowfs.exports.run import check, export

    check(how)
    found = find_mount(what)
    with open_changes(what, lowers, tell) as changes:
        if found is not None and _is_on(target, found.dev):
            raise UsageError(f"{target}: is inside the mount that is exported", "choose a path outside of it")
        withheld = {} if trust or how.format != "overlayfs" else _withheld(changes, target)
        return export(changes, how, target, tick, withheld)


def report(
    what: str,
    target: str,
    selection: Selection | None = None,
    lowers: Lowers | None = None,
    *,
    force: bool = False,
    tell: Tell = lambda _: None,
    tick: Callable[[str, int], None] = lambda *_: None,
) -> None:
    """Write the changes of a store or a mount as an HTML page to the file *target*.

    At the end the file is complete, or as it was before; an existing one is replaced only with *force*. ``-``
    is standard output. *selection* limits the page to these changes. *tick* is called with what is being
    read, and how many of it were. Blocks; raises CowfsError, and OSError with the path of what cannot be
    read.
    """
    from cowfs.changes.select import Selection
    from cowfs.exports.report import Facts, write_report
    from cowfs.exports.target import new_file

    found = find_mount(what)
    with open_changes(what, lowers, tell) as changes, ExitStack() as stack:
        if target == "-":
            out = sys.stdout.buffer
        elif found is not None and _is_on(target, found.dev):
            raise UsageError(
                f"{target}: is inside the mount that is reported on", "choose a path outside of it"
            )
        else:
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
"""So many histories are in memory: each takes some KiB."""


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
    from cowfs.exports.choose import chosen
    from cowfs.exports.conflicts import conflicts
    from cowfs.exports.kept import keep
    from cowfs.exports.losses import Losses
    from cowfs.exports.plan import plan

    found = find_mount(what)
    losses = Losses()
    with ExitStack() as stack:
        changes = stack.enter_context(open_changes(what, lowers, tell))
        root = _tree_of(root, stack)
        if found is not None and _is_on(os.path.join(root, "."), found.dev):
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
            try:
                Apply(target, Compared(before), losses, tick).run(items, after, withheld)
            except OSError as error:
                raise _not_completed(error, root, backup) from None
    return bad, losses


def _not_completed(error: OSError, root: str, backup: str) -> Exception:
    """Return what to raise where changes could be made in part."""
    if error.errno not in LACK_OF_ROOM:
        return error
    path = os.fsdecode(error.filename or b"").lstrip("/")
    without = ", without --backup" if backup else ""
    return SystemFailure(
        f"{os.path.join(root, path)}: {error.strerror}; each path has its old or its new content",
        f"free space there, and complete it with the same command{without}",
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
    from cowfs.exports.kept import bring_back
    from cowfs.linux.trust import forbidden

    with ExitStack() as stack:
        withheld = {} if trust else forbidden([os.path.abspath(backup)], (0, os.geteuid()))
        return bring_back(backup, _root(_tree_of(root, stack), stack), tick, withheld)


def _root(path: str, stack: ExitStack) -> Root:
    from cowfs.exports.apply_root import Root

    try:
        root = Root(path)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", "give a directory") from None
    stack.callback(root.close)
    return root


def _tree_of(path: str, stack: ExitStack) -> str:
    """Return a directory; for a store that is not mounted, one where it stays mounted until *stack* ends."""
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


def _is_on(path: str, dev: str) -> bool:
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
    """Bytes of the store that it has freed, if that is what it is for."""


def take_back(
    what: str,
    asked: str,
    paths: Sequence[bytes] | None = None,
    lowers: Lowers | None = None,
    *,
    metadata: bool = False,
    dry_run: bool = False,
    tell: Tell = lambda _: None,
    tick: Callable[[int], None] = lambda _: None,
) -> Iterator[Done]:
    """Give *paths* in a store or a mount the lower's version again, and yield each thing that is done.

    *asked* is ``revert`` (without *paths*: of everything), ``undo`` (of the last revert), ``vacuum`` (removes
    what makes no difference; with *dry_run* only finds it) or ``trash`` (empties the trash). *tick* is told
    how many changes a revert has looked at. CowfsError says why it cannot be done.
    """
    from cowfs.take_back import offline, request

    message = request(
        what=asked, paths=None if paths is None else list(paths), metadata=metadata, dry_run=dry_run
    )
    found = find_mount(what)
    with ExitStack() as stack:
        if found is not None:
            replies: Iterator[dict[str, Any]] = ask(found.dev, "take_back", timeout=PATIENCE, **message)
        else:
            union = open_offline_union(what, lowers or Lowers(), stack, tell, read_only=dry_run)
            replies = offline(union, message)
        for reply in replies:
            if "seen" in reply:
                with checked_answer(what):
                    tick(int(reply["seen"]))
                continue
            with checked_answer(what):
                path = base64.b64decode(reply["path"])
                done = Done(path, str(reply["why_not"]), str(reply["kind"]), int(reply["bytes"]))
            yield done


def reclaimable(what: str, lowers: Lowers | None = None, tell: Tell = lambda _: None) -> int:
    """Return how many bytes of a store or a mount ``cowfs vacuum`` would set free, if it were asked now.

    Compares the copies of files with what is below them: that takes as long as reading both. Raises
    CowfsError. What the trash takes is not in it: :meth:`Changes.usage` tells that.
    """
    return sum(done.size for done in take_back(what, "vacuum", None, lowers, dry_run=True, tell=tell))


class Checkpoint(NamedTuple):
    """A state of the tree that was kept."""

    name: str
    taken: str
    """ISO 8601, UTC."""
    on: str | None
    """The checkpoint that it was made after; None: the lowers."""
    current: bool
    """Whether the tree as it is now was made from it."""
    last: bool
    """Whether nothing but what was changed since is above it."""


def checkpoints(what: str) -> list[Checkpoint]:
    """Return the checkpoints of a store or of a mount, the oldest first. Raises CowfsError."""
    from cowfs.store.format.checkpoints import listed
    from cowfs.store.served.open import open_store

    found = find_mount(what)
    if found is not None:
        told = list(ask(found.dev, "checkpoints"))
    else:
        must_be_there(what)
        if is_plain_directory(what):
            raise StoreError(f"{what}: neither a store nor a cowfs mountpoint", LISTED)
        with closing(open_store(what, read_only=True)) as store:
            told = listed(store.layers, store.upper)
    with checked_answer(what):
        return [
            Checkpoint(
                str(one["name"]),
                str(one["taken"]),
                None if one["on"] is None else str(one["on"]),
                bool(one["current"]),
                bool(one["last"]),
            )
            for one in told
        ]


def checkpoint(what: str, name: str, lowers: Lowers | None = None, tell: Tell = lambda _: None) -> None:
    """Keep the present state of the tree of a store or a mount under a name. It is on disk then.

    UsageError for an invalid name.
    """
    _ask_checkpoints(what, "take", name, lowers, tell)


def rollback(what: str, name: str, lowers: Lowers | None = None, tell: Tell = lambda _: None) -> None:
    """Make the tree what it was at a checkpoint; later changes that no other checkpoint keeps are lost.

    MountFailure if it is mounted and a process uses a file of it.
    """
    found = find_mount(what)
    if found is not None:
        _must_not_be_used(what, found.dev)
    _ask_checkpoints(what, "go_back", name, lowers, tell)


def delete_checkpoint(
    what: str, name: str, lowers: Lowers | None = None, tell: Tell = lambda _: None
) -> None:
    """Delete a checkpoint. The tree and the other checkpoints keep their contents."""
    _ask_checkpoints(what, "delete", name, lowers, tell)
    if find_mount(what) is None:
        with ExitStack() as stack:  # which merges its remaining layer
            open_offline_union(what, lowers or Lowers(), stack, tell)


def _ask_checkpoints(what: str, asked: str, name: str, lowers: Lowers | None, tell: Tell) -> None:
    from cowfs.take_back import checkpoints as steps
    from cowfs.take_back import done

    found = find_mount(what)
    with ExitStack() as stack:
        if found is not None:
            replies: Iterator[dict[str, Any]] = ask(
                found.dev, "checkpoint", timeout=PATIENCE, what=asked, name=name
            )
        else:
            union = open_offline_union(what, lowers or Lowers(), stack, tell)
            replies = done(steps(union, {"what": asked, "name": name}))
        for _ in replies:
            pass


class MountedTree:
    """A union that :func:`mount` has mounted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        """Where it is mounted."""

    def diff(self) -> list[Change]:
        """Return what differs from the lowers, sorted by name within each directory. Raises CowfsError."""
        with open_changes(str(self.path)) as changes:
            return list(changes)

    def checkpoints(self) -> list[Checkpoint]:
        """Return the checkpoints, the oldest first. Raises CowfsError."""
        return checkpoints(str(self.path))

    def snapshot(self, name: str | None = None) -> str:
        """Keep the present state of the tree as a checkpoint; return its name, which is chosen if not given.

        UsageError for an invalid name.
        """
        if name is None:
            taken = {one.name for one in self.checkpoints()}
            name = next(free for number in count(1) if (free := f"snapshot-{number}") not in taken)
        checkpoint(str(self.path), name)
        return name

    def rollback(self, name: str) -> None:
        """Make the tree what it was at a checkpoint.

        CowfsError if a process (this one, too) has a file of it open or its working directory there.
        """
        rollback(str(self.path), name)

    def inject(self, *faults: str) -> None:
        """From now on make requests fail as *faults* say; earlier faults end.

        Without *faults* all requests succeed again. Each fault is a value of ``-o fault=``. CowfsError if the
        tree was mounted without that option (``fault=none`` is enough).
        """
        self._ask_faults(faults=list(faults))

    def crash(self) -> None:
        """End the daemon as a power cut would: what was not synced is lost.

        Mount the tree again after that. CowfsError where that is impossible: with a store in a directory, and
        without ``fault=``.
        """
        with suppress(MountFailure):  # the daemon ends in the middle of its reply
            self._ask_faults(crash=True)

    def _ask_faults(self, **asked: Any) -> None:
        for _ in ask(the_mount(str(self.path)).dev, "fault", timeout=PATIENCE, **asked):
            pass


@contextmanager
def mount(
    lower: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    store: str | os.PathLike[str] | None = None,
    *,
    mountpoint: str | os.PathLike[str] | None = None,
    **options: Option,
) -> Iterator[MountedTree]:
    """Mount a union of *lower* (an image or a directory; several: the topmost first) and *store*; unmount it
    at the end.

    A daemon of its own serves it, as with ``cowfs mount``; any user who may mount through fusermount3 can use
    it. Without *store* changes are kept in memory and lost at the end. Without *mountpoint* it is mounted in
    a temporary directory, which is removed at the end. *options* are those of ``-o``: ``size="64M"``,
    ``fakeroot=True``. Blocks until the mount answers and, at the end, until all is written and the store is
    released. CowfsError says why it cannot be mounted, or that a process still used it at the end: then it is
    detached, and the store is released when that process is done. If the block raised an exception, that gets
    this as a note.
    """
    lowers = [lower] if isinstance(lower, str | os.PathLike) else list(lower)
    with ExitStack() as stack:
        if mountpoint is None:
            where = tempfile.mkdtemp(prefix="cowfs-")
            stack.callback(os.rmdir, where)
        else:
            where = os.path.abspath(mountpoint)
        before = find_mount(where)
        temporary = where if mountpoint is None else None
        try:
            run_command(mount_arguments(lowers, where, store, options.items()), temporary)
        except BaseException:
            now = find_mount(where)
            if now is not None and now != before:  # interrupted after it was mounted
                _unmount(where, now)
            raise
        mounted = find_mount(where)
        try:
            yield MountedTree(Path(where))
        except BaseException as error:
            try:
                _unmount(where, mounted)
            except CowfsError as failure:  # the other exception matters more, and may be the cause
                error.add_note(f"cowfs: {failure}")
            raise
        _unmount(where, mounted)


def _unmount(where: str, mounted: MountInfo | None) -> None:
    """Unmount, and wait until all is written; MountFailure if it could only be detached."""
    if find_mount(where) != mounted:  # somebody else has unmounted it
        return
    try:
        run_command(["umount", where])
    except CowfsError:
        with suppress(CowfsError):
            run_command(["umount", "--lazy", where])
        raise


_TOLD = 3
"""So many uses are named."""


def _must_not_be_used(what: str, dev: str) -> None:
    """Raise MountFailure, which says what is open and by whom."""
    from cowfs.changes.render import escape
    from cowfs.linux.users import mounted_within, uses_of

    for mount in mounted_within(dev):
        raise MountFailure(f"{escape(mount.mountpoint)}: is mounted in the tree", "unmount that first")
    uses = list(uses_of(dev))
    if uses:
        said = [
            f"{escape(use.path)} ({use.how}, by {escape(os.fsencode(use.program))}, pid {use.pid})"
            for use in uses[:_TOLD]
        ]
        more = f", and {len(uses) - _TOLD} more" if len(uses) > _TOLD else ""
        raise MountFailure(
            f"{what}: in use: {', '.join(said)}{more}", f"fuser -vm {what} shows all who use it"
        )
