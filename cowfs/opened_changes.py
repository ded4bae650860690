"""Opens what was changed: of a store that is not mounted, or of a mounted union."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from cowfs.changes.version import Tree, Version
from cowfs.client import find_mount, must_take_requests
from cowfs.errors import StoreError, UsageError
from cowfs.mounted_changes import MountedChanges
from cowfs.offline_changes import Lowers, OfflineChanges, Tell, must_be_there
from cowfs.types import Change

if TYPE_CHECKING:
    from cowfs.changes.blame import Record
    from cowfs.changes.du import Used


class Changes(Protocol):
    """The changes of a store, or of a mounted union."""

    def __iter__(self) -> Iterator[Change]:
        """Yield the changes, sorted by name within each directory; see :mod:`cowfs.changes.diff`."""

    def within(self, paths: Sequence[bytes]) -> Iterator[Change]:
        """Yield all changes at and below *paths*, and renames away from there; perhaps also others.

        This reads no more of the store than it needs. Without paths, yield all changes.
        """

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

    def paths(self) -> list[str]:
        """Return the path of the store, then those of the lowers, as far as they have one."""

    def count_names(self, *, merged: bool = False) -> int:
        """Return about how many names were changed, or the *merged* tree has; 0 if nobody knows.

        Blocks, perhaps as long as find(1) takes.
        """

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
    tell = _once(tell)
    found = find_mount(what)
    with ExitStack() as stack:
        if found is not None:
            if lowers.given is not None:
                raise UsageError(
                    f"{what}: is mounted, so it is compared with the lower it is mounted on", "remove --lower"
                )
            must_take_requests(found.dev)
            yield MountedChanges(what, found.dev, stack, tell, (since, until))
            return
        if what == "memory":
            raise UsageError("a store in memory can only be reached through its mount", "give the mountpoint")
        must_be_there(what)
        changes = OfflineChanges(what, lowers, stack, tell, (since, until))
        try:
            yield changes
        except PermissionError as error:
            if error.filename is not None or not changes.has_own_numbers:
                raise
            raise StoreError(
                f"{what}: has files of subordinate users, which you may not read",
                "run this with their rights: unshare --map-root-user --map-auto cowfs ...",
            ) from None


def _once(tell: Tell) -> Tell:
    """Return what tells each text once, however often it is met."""
    said = set[str]()

    def once(text: str) -> None:
        if text not in said:
            said.add(text)
            tell(text)

    return once
