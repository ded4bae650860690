"""Writable ext3 images without a union above them: the kernel's loop mount, and fuse2fs."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from perf import machine
from perf.box import Box
from perf.peers import System, needs


@dataclass(frozen=True, slots=True)
class LoopMount:
    """The kernel's ext3 on a loop device."""

    name: str = "ext3"
    fuse: bool = False

    def missing(self) -> str:
        return ""

    def version(self) -> str:
        return f"Linux {platform.release()}"

    def options(self) -> str:
        return "mount -t ext3 -o loop STORE.img MNT"

    def create(self, box: Box) -> None:
        box.make_store()

    def mount(self, box: Box) -> None:
        box.mount(box.merged, "-t", "ext3", "-o", "loop", str(box.image))

    def unmount(self, box: Box) -> None:
        box.unmount(box.merged)


@dataclass(frozen=True, slots=True)
class Fuse2fs:
    """fuse2fs of e2fsprogs: the same library, without a journal."""

    name: str = "fuse2fs"
    fuse: bool = True

    def missing(self) -> str:
        return needs("fuse2fs", "fuse2fs")

    def version(self) -> str:
        return machine.version_in(["fuse2fs", "-V"])

    def options(self) -> str:
        return "fuse2fs -f -o rw,fakeroot STORE.img MNT"

    def create(self, box: Box) -> None:
        box.make_store()

    def mount(self, box: Box) -> None:
        box.start_daemon(["fuse2fs", "-f", "-o", "rw,fakeroot", str(box.image), str(box.merged)])

    def unmount(self, box: Box) -> None:
        box.stop_daemon(box.merged)


SYSTEMS: list[System] = [LoopMount(), Fuse2fs()]
