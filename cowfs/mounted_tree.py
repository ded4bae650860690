"""Mounts a union for the length of a Python block."""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from typing import TYPE_CHECKING, Any

from cowfs.checkpoints import Checkpoint, checkpoint, checkpoints, rollback
from cowfs.client import ask, find_mount, the_mount
from cowfs.command import Option, Path, mount_arguments, run_command, text_of
from cowfs.errors import CowfsError, MountFailure
from cowfs.linux.files import absolute
from cowfs.mounted_changes import PATIENCE
from cowfs.opened_changes import open_changes
from cowfs.types import Change
from cowfs.unmounting import unmount

if TYPE_CHECKING:
    from cowfs.linux.mount_table import MountInfo


class MountedTree:
    """A union that :func:`mount` has mounted."""

    def __init__(self, path: pathlib.Path) -> None:
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
    lower: Path | Sequence[Path],
    store: Path | None = None,
    *,
    mountpoint: Path | None = None,
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
    lowers = lower if isinstance(lower, Sequence) and not isinstance(lower, str | bytes) else [lower]
    with ExitStack() as stack:
        if mountpoint is None:
            where = tempfile.mkdtemp(prefix="cowfs-")
            stack.callback(os.rmdir, where)
        else:
            where = absolute(text_of("mountpoint", mountpoint))
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
            yield MountedTree(pathlib.Path(where))
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
        unmount(where)
    except CowfsError:
        with suppress(CowfsError):
            unmount(where, lazy=True)
        raise
