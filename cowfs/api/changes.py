"""The changes of a store or of a mounted union, to look at."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from cowfs.changes.version import Tree, Version
from cowfs.client import find_mount
from cowfs.errors import StoreError, UsageError
from cowfs.linux.fuse import LISTED
from cowfs.mounted_changes import MountedChanges
from cowfs.offline_changes import Lowers, OfflineChanges, Tell
from cowfs.store.format.sniff import is_plain_directory, may_exist
from cowfs.types import Change

if TYPE_CHECKING:
    from cowfs.changes.blame import History, Record
    from cowfs.changes.du import Used
    from cowfs.changes.select import Selection


class Changes(Protocol):
    """The changes of a store, or of a mounted union."""

    def __iter__(self) -> Iterator[Change]:
        """Find them, sorted by name within each directory; see :mod:`cowfs.changes.diff`."""

    def exactly(self) -> Iterator[Change]:
        """Find them, and directories whose time alone differs."""

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
        """Yield what each inode takes in the store, and why it is there; last what the filesystem itself
        takes."""

    def about(self) -> list[tuple[str, str]]:
        """Return what it is and what it is compared with, as names and values for people."""

    def withheld(self) -> dict[str, str]:
        """Return why ``nosuid`` and ``nodev`` must hold for what is copied from it, for others can change it;
        and as ``shown`` why others must not see that at all: they could show what we alone may read."""

    def records(self) -> Iterator[Record] | None:
        """Return who changed what, the newest first; None if nobody has recorded that, or we may not know."""


@contextmanager
def open_changes(
    what: str,
    lowers: Lowers | None = None,
    tell: Tell = lambda _: None,
    *,
    since: str | None = None,
    until: str | None = None,
) -> Iterator[Changes]:
    """Open the changes of *what*, a mountpoint or a store that is not mounted; *tell* is told of oddities.

    With *since*, those after that checkpoint; with *until*, those before that one. A store is opened
    read-only. UsageError, StoreError, MountFailure or WrongLower say why it cannot be.
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

    The file is whole in the end, or what it was before; one that is there is replaced only with *force*.
    ``-`` is standard output. *selection*: of these
    changes only. *tick* is told what is read, and how many of it were. Blocks; raises CowfsError, and OSError
    with the path of what cannot be read.
    """
    from cowfs.changes.select import Selection
    from cowfs.exports.report import Facts, write_report
    from cowfs.exports.target import new_file

    found = find_mount(what)
    with open_changes(what, lowers, tell) as changes, ExitStack() as stack:
        if target == "-":
            out = sys.stdout.buffer
        elif found is not None and is_on(target, found.dev):
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
    """Return who made, wrote, renamed and removed what is or was at *paths*, as a store or mount recorded it.

    A path may be a glob (:func:`cowfs.changes.select.pattern`); with *recursive* all that is recorded below
    is meant, too. Without it there is a history of each path that is no glob, empty if nothing is known. The
    second value is since when there are records, in µs since the epoch. Raises CowfsError.
    """
    from cowfs.changes import blame as changes
    from cowfs.changes.select import pattern, plain
    from cowfs.recorded import of_mount, of_store

    exact = [] if recursive else [each for path in paths if (each := plain(path)) is not None]
    wide = [path for path in paths if recursive or plain(path) is None]
    matches = [pattern(path).match if recursive else pattern(path).fullmatch for path in wide]
    found = find_mount(what)

    def contents(stack: ExitStack) -> Iterator[bytes]:
        return of_store(what, engine, stack, tell) if found is None else of_mount(what, found.dev)

    more: list[bytes] = []
    if wide:
        with ExitStack() as stack:
            more = changes.names_of(contents(stack), what, lambda path: any(each(path) for each in matches))
    with ExitStack() as stack:
        return changes.blame(contents(stack), [*exact, *more], what)


def is_on(path: str, dev: str) -> bool:
    """Whether a path, or where it would be made, is on the filesystem of this device."""
    try:
        here = os.stat(os.path.dirname(os.path.abspath(path))).st_dev
    except OSError:
        return False
    return f"{os.major(here)}:{os.minor(here)}" == dev
