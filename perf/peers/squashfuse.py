"""Readers of squashfs: squashfuse, the kernel, and squashfuse below fuse-overlayfs.

The last is what a user without root has today to change what is in an image; the store is a directory.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

from perf import machine
from perf.box import Box
from perf.peers import System, fuse_overlayfs, needs

LL = "squashfuse_ll"


@dataclass(frozen=True, slots=True)
class Squashfuse:
    """One of squashfuse's two daemons, which only read."""

    name: str
    fuse: bool = True

    def missing(self) -> str:
        return needs(self.name, "squashfuse")

    def version(self) -> str:
        return machine.version_in([self.name, "--help"])

    def options(self) -> str:
        return f"{self.name} -f IMAGE MNT"

    def create(self, box: Box) -> None:
        pass

    def mount(self, box: Box) -> None:
        box.start_daemon([self.name, "-f", str(box.corpus.image), str(box.merged)])

    def unmount(self, box: Box) -> None:
        box.stop_daemon(box.merged)


@dataclass(frozen=True, slots=True)
class KernelSquashfs:
    """The kernel's squashfs, which wants root."""

    name: str = "squashfs"
    fuse: bool = False

    def missing(self) -> str:
        return ""

    def version(self) -> str:
        return f"Linux {platform.release()}"

    def options(self) -> str:
        return "mount -t squashfs -o loop,ro IMAGE MNT"

    def create(self, box: Box) -> None:
        pass

    def mount(self, box: Box) -> None:
        box.mount(box.merged, "-t", "squashfs", "-o", "loop,ro", str(box.corpus.image))

    def unmount(self, box: Box) -> None:
        box.unmount(box.merged)


@dataclass(frozen=True, slots=True)
class Stacked:
    """fuse-overlayfs over squashfuse_ll."""

    name: str = f"{LL}+fuse-overlayfs"
    fuse: bool = True

    def missing(self) -> str:
        return "; ".join(filter(None, (needs(LL, "squashfuse"), needs("fuse-overlayfs", "fuse-overlayfs"))))

    def version(self) -> str:
        return f"{machine.version_in([LL, '--help'])}, fuse-overlayfs {fuse_overlayfs.version()}"

    def options(self) -> str:
        return f"{LL} -f IMAGE LOWER; {fuse_overlayfs.SYSTEMS[0].options()}"

    def create(self, box: Box) -> None:
        for name in ("upper", "work"):
            (box.store / name).mkdir()

    def mount(self, box: Box) -> None:
        box.start_helper([LL, "-f", str(box.corpus.image), str(box.lower)], box.lower)
        box.start_daemon(fuse_overlayfs.command(box))

    def unmount(self, box: Box) -> None:
        for target in (box.merged, box.lower):
            box.stop_daemon(target)


SYSTEMS: list[System] = [Squashfuse(LL), Squashfuse("squashfuse"), KernelSquashfs(), Stacked()]
