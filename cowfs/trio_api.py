"""The Python API for programs that use trio: what blocks does so in a thread."""

from __future__ import annotations

import pathlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

from cowfs import api
from cowfs.command import Option, Path
from cowfs.types import Change


class AsyncMountedTree:
    """A union that :func:`mount_async` has mounted: like :class:`cowfs.api.MountedTree`, without blocking.

    Nothing is cancelled halfway: a cancelled task continues when the call is done.
    """

    def __init__(self, tree: api.MountedTree) -> None:
        self._tree = tree

    @property
    def path(self) -> pathlib.Path:
        """Where it is mounted."""
        return self._tree.path

    async def diff(self) -> list[Change]:
        """Return what differs from the lowers. Raises CowfsError."""
        return await trio.to_thread.run_sync(self._tree.diff)

    async def checkpoints(self) -> list[api.Checkpoint]:
        """Return the states that were kept, the oldest first. Raises CowfsError."""
        return await trio.to_thread.run_sync(self._tree.checkpoints)

    async def snapshot(self, name: str | None = None) -> str:
        """Keep the state that the tree has now as a checkpoint; return its name."""
        return await trio.to_thread.run_sync(self._tree.snapshot, name)

    async def rollback(self, name: str) -> None:
        """Let the tree be what it was at a checkpoint."""
        await trio.to_thread.run_sync(self._tree.rollback, name)

    async def inject(self, *faults: str) -> None:
        """Let requests fail from now on as *faults* say (:meth:`cowfs.api.MountedTree.inject`)."""
        await trio.to_thread.run_sync(self._tree.inject, *faults)

    async def crash(self) -> None:
        """Let the daemon end as at a power cut (:meth:`cowfs.api.MountedTree.crash`)."""
        await trio.to_thread.run_sync(self._tree.crash)


@asynccontextmanager
async def mount_async(
    lower: Path | Sequence[Path],
    store: Path | None = None,
    *,
    mountpoint: Path | None = None,
    **options: Option,
) -> AsyncIterator[AsyncMountedTree]:
    """Mount as :func:`cowfs.api.mount` does, without blocking; unmount at the end, also when cancelled."""
    manager = api.mount(lower, store, mountpoint=mountpoint, **options)
    with trio.CancelScope(shield=True):  # else a mount might be made, and nobody know
        tree = await trio.to_thread.run_sync(manager.__enter__)
    try:
        yield AsyncMountedTree(tree)
    except BaseException as error:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(manager.__exit__, type(error), error, error.__traceback__)
        raise
    with trio.CancelScope(shield=True):
        await trio.to_thread.run_sync(manager.__exit__, None, None, None)
