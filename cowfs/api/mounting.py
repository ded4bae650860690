"""Mount a union for as long as a block of Python lasts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cowfs.api.changes import open_changes
from cowfs.api.taken_back import Checkpoint, checkpoint, checkpoints, rollback
from cowfs.client import ask, find_mount, the_mount
from cowfs.command import Option, mount_arguments, run_command
from cowfs.errors import CowfsError, MountFailure
from cowfs.mounted_changes import PATIENCE
from cowfs.types import Change

if TYPE_CHECKING:
    from cowfs.linux.mount_table import MountInfo


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
        """Return the states that were kept, the oldest first. Raises CowfsError."""
        return checkpoints(str(self.path))

    def snapshot(self, name: str | None = None) -> str:
        """Keep the state that the tree has now as a checkpoint; return its name, which is found if not given.

        UsageError if it cannot have that name.
        """
        if name is None:
            taken = {one.name for one in self.checkpoints()}
            name = next(free for number in count(1) if (free := f"snapshot-{number}") not in taken)
        checkpoint(str(self.path), name)
        return name

    def rollback(self, name: str) -> None:
        """Let the tree be what it was at a checkpoint.

        CowfsError if a process (this one, too) has a file of it open or its working directory there.
        """
        rollback(str(self.path), name)

    def inject(self, *faults: str) -> None:
        """Let requests fail from now on as *faults* say, and as no earlier ones did; none: all succeed again.

        Each is what ``-o fault=`` takes. CowfsError for a tree that was mounted without one, or ``none``.
        """
        self._ask_faults(faults=list(faults))

    def crash(self) -> None:
        """Let the daemon end as at a power cut: what was not synced is lost. To be mounted again after that.

        CowfsError where a crash cannot be: with a store in a directory, and without ``fault=``.
        """
        with suppress(MountFailure):  # it ends in the middle of its reply
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

    A daemon of its own serves it, as with ``cowfs mount``; any user who may mount through fusermount3 can.
    Without *store* changes are kept in memory, and are gone at the end. Without *mountpoint* it is mounted in
    a temporary directory, which goes with it. *options* are those of ``-o``: ``size="64M"``,
    ``fakeroot=True``. Blocks until the mount answers and, at the end, until all is written and the store is
    released. CowfsError says why it cannot be mounted, or that a process still used it at the end: it has
    been detached, and the store is released when that process is done. An exception of the block gets that
    as a note.
    """
    lowers = [lower] if isinstance(lower, str | os.PathLike) else list(lower)
    with ExitStack() as stack:
        if mountpoint is None:
            where = tempfile.mkdtemp(prefix="cowfs-")
            stack.callback(os.rmdir, where)
        else:
            where = os.path.abspath(mountpoint)
        before = find_mount(where)
        try:
            run_command(mount_arguments(lowers, where, store, options.items()))
        except BaseException:
            now = find_mount(where)
            if now is not None and now != before:  # interrupted when it was mounted already
                _unmount(where, now)
            raise
        mounted = find_mount(where)
        try:
            yield MountedTree(Path(where))
        except BaseException as error:
            try:
                _unmount(where, mounted)
            except CowfsError as failure:  # of the two the other one matters, and may be why
                error.add_note(f"cowfs: {failure}")
            raise
        _unmount(where, mounted)


def _unmount(where: str, mounted: MountInfo | None) -> None:
    """Unmount, and wait until all is written; MountFailure if it could only be detached."""
    if find_mount(where) != mounted:  # somebody has done it
        return
    try:
        run_command(["umount", where])
    except CowfsError:
        with suppress(CowfsError):
            run_command(["umount", "--lazy", where])
        raise
