"""The systems under test: one module per system, all behind :class:`System`."""

from __future__ import annotations

import shutil
from typing import Protocol

from perf.box import Box


class System(Protocol):
    """Something that merges a read-only lower with a writable store, or only shows the lower."""

    @property
    def name(self) -> str:
        """How the command line and the results call it."""
        ...

    @property
    def fuse(self) -> bool:
        """Whether a daemon answers its requests."""
        ...

    def missing(self) -> str:
        """What it lacks on this machine and what installs it; "" when it can run."""
        ...

    def version(self) -> str:
        """Its version."""
        ...

    def options(self) -> str:
        """How it is mounted, with LOWER, STORE and MNT for the places."""
        ...

    def create(self, box: Box) -> None:
        """Make a fresh store."""
        ...

    def mount(self, box: Box) -> None:
        """Mount the lower and the store; return when ``box.merged`` answers."""
        ...

    def unmount(self, box: Box) -> None:
        """Unmount; return when everything written is in the store's image."""
        ...


def needs(program: str, package: str) -> str:
    """The message for a missing *program*; "" when it is there."""
    return "" if shutil.which(program) else f"{program} is not installed (Debian package {package})"


def unions() -> dict[str, System]:
    """Every system that merges, by name, in the order of the tables."""
    from perf.peers import cowfs, fuse_overlayfs, overlayfs, unionfs_fuse, unprivileged

    known = [*cowfs.SYSTEMS, *overlayfs.SYSTEMS, *fuse_overlayfs.SYSTEMS, *unionfs_fuse.SYSTEMS]
    known += unprivileged.SYSTEMS
    return {system.name: system for system in known}


def targets() -> dict[str, System]:
    """Every system that the targets are about, by name, in the order of the tables."""
    from perf.peers import cowfs, fuse_overlayfs, overlayfs, unionfs_fuse

    known = [*cowfs.SYSTEMS, overlayfs.SYSTEMS[0], *fuse_overlayfs.SYSTEMS, *fuse_overlayfs.NEWEST]
    return {system.name: system for system in [*known, *unionfs_fuse.SYSTEMS]}


def of_a_user() -> dict[str, System]:
    """Every system that an ordinary user mounts, by name."""
    from perf.peers import one_user

    return {system.name: system for system in one_user.SYSTEMS}


def readers() -> dict[str, System]:
    """Every system that reads a squashfs image, by name, in the order of the tables."""
    from perf.peers import cowfs, squashfuse

    return {system.name: system for system in [*cowfs.READERS, *squashfuse.SYSTEMS]}


def stores() -> dict[str, System]:
    """Every system with an ext3 image to write to, by name, in the order of the tables."""
    from perf.peers import cowfs, images, unprivileged

    return {system.name: system for system in [*cowfs.STORES, *images.SYSTEMS, *unprivileged.SYSTEMS]}


def systems() -> dict[str, System]:
    """Every system by name."""
    return {**unions(), **targets(), **of_a_user(), **readers(), **stores()}
