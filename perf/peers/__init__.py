"""The systems under test: one module per kind, each a :class:`System`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from perf.box import Box


@dataclass(frozen=True, slots=True)
class System(ABC):
    """Something that merges a read-only lower with a writable store, or only shows one of them."""

    name: str
    """The name on the command line and in the results."""
    fuse: bool = True
    """Whether a FUSE daemon answers its requests."""

    def missing_requirements(self) -> str:
        """Return what it needs that is not on this machine, and what installs it; "" if it can run."""
        return ""

    @abstractmethod
    def version(self) -> str:
        """Return its version."""

    @abstractmethod
    def options(self) -> str:
        """Return its mount command, with LOWER, STORE and MNT for the places."""

    def create(self, box: Box) -> None:
        """Create an empty store: by default an ext3 image."""
        box.make_store()

    @abstractmethod
    def mount(self, box: Box) -> None:
        """Mount the lower and the store; return when ``box.merged`` answers."""

    def unmount(self, box: Box) -> None:
        """Unmount; return when everything written is in the store's image."""
        box.stop_daemon(box.merged)


def unions() -> dict[str, System]:
    """Return every system that merges, by name, in the order of the tables."""
    from perf.peers import cowfs, fuse_overlayfs, overlayfs, stacks, unionfs_fuse

    return by_name(
        *cowfs.SYSTEMS, *overlayfs.SYSTEMS, *fuse_overlayfs.SYSTEMS, *unionfs_fuse.SYSTEMS, *stacks.STACKS
    )


def target_systems() -> dict[str, System]:
    """Return every system that the targets are about, by name, in the order of the tables."""
    from perf.peers import cowfs, fuse_overlayfs, overlayfs, unionfs_fuse

    return by_name(
        *cowfs.SYSTEMS, overlayfs.SYSTEMS[0], *fuse_overlayfs.SYSTEMS, *fuse_overlayfs.NEWEST,
        *unionfs_fuse.SYSTEMS,
    )  # fmt: skip


def user_systems() -> dict[str, System]:
    """Return every system that is mounted by an ordinary user, by name."""
    from perf.peers import one_user

    return by_name(*one_user.SYSTEMS)


def image_readers() -> dict[str, System]:
    """Return every system that reads a squashfs image, by name, in the order of the tables."""
    from perf.peers import cowfs, images, stacks

    return by_name(*cowfs.READERS, *images.READERS, *stacks.READERS)


def stores() -> dict[str, System]:
    """Return every system that writes to an ext3 image, by name, in the order of the tables."""
    from perf.peers import cowfs, images, stacks

    return by_name(*cowfs.STORES, *images.STORES, *stacks.STACKS)


def systems() -> dict[str, System]:
    """Return every system by name."""
    return {**unions(), **target_systems(), **user_systems(), **image_readers(), **stores()}


def by_name(*systems: System) -> dict[str, System]:
    """Return *systems* by name, in the same order."""
    return {system.name: system for system in systems}
