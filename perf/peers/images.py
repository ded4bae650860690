"""Single images without a union above them: the kernel's loop mounts, fuse2fs and squashfuse."""

from __future__ import annotations

from dataclasses import dataclass

from perf import machine
from perf.box import Box
from perf.peers import System


@dataclass(frozen=True, slots=True)
class LoopMount(System):
    """The kernel's ext3 on a loop device."""

    name: str = "ext3"
    fuse: bool = False

    def version(self) -> str:
        return machine.kernel()

    def options(self) -> str:
        return "mount -t ext3 -o loop STORE.img MNT"

    def mount(self, box: Box) -> None:
        box.mount(box.merged, "-t", "ext3", "-o", "loop", str(box.image))

    def unmount(self, box: Box) -> None:
        box.unmount(box.merged)


@dataclass(frozen=True, slots=True)
class Fuse2fs(System):
    """fuse2fs of e2fsprogs, which uses the same library, without a journal."""

    name: str = "fuse2fs"

    def missing_requirements(self) -> str:
        return machine.missing_programs(("fuse2fs", "fuse2fs"))

    def version(self) -> str:
        return machine.version_in(["fuse2fs", "-V"])

    def options(self) -> str:
        return "fuse2fs -f -o rw,fakeroot STORE.img MNT"

    def mount(self, box: Box) -> None:
        box.start_daemon(["fuse2fs", "-f", "-o", "rw,fakeroot", str(box.image), str(box.merged)])


@dataclass(frozen=True, slots=True)
class Squashfuse(System):
    """One of squashfuse's two daemons, which only read."""

    def missing_requirements(self) -> str:
        return machine.missing_programs((self.name, "squashfuse"))

    def version(self) -> str:
        return machine.version_in([self.name, "--help"])

    def options(self) -> str:
        return f"{self.name} -f IMAGE MNT"

    def create(self, box: Box) -> None:
        pass

    def mount(self, box: Box) -> None:
        box.start_daemon([self.name, "-f", str(box.corpus.image), str(box.merged)])


@dataclass(frozen=True, slots=True)
class KernelSquashfs(LoopMount):
    """The kernel's squashfs, which needs root."""

    name: str = "squashfs"

    def options(self) -> str:
        return "mount -t squashfs -o loop,ro IMAGE MNT"

    def create(self, box: Box) -> None:
        pass

    def mount(self, box: Box) -> None:
        box.mount(box.merged, "-t", "squashfs", "-o", "loop,ro", str(box.corpus.image))


STORES: list[System] = [LoopMount(), Fuse2fs()]
READERS: list[System] = [Squashfuse("squashfuse_ll"), Squashfuse("squashfuse"), KernelSquashfs()]
