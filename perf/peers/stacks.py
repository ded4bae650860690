"""What users without root have today: squashfuse, fuse2fs and fuse-overlayfs on top of each other.

Root runs them here, like everything else. The cost comes from the stack of daemons, not from who owns them;
:mod:`perf.peers.one_user` has the same stack run by an ordinary user.
"""

from __future__ import annotations

from dataclasses import dataclass

from perf import machine
from perf.box import Box
from perf.peers import System, fuse_overlayfs, newest

LL, FUSE2FS, FUSE_OVERLAYFS = "squashfuse_ll", "fuse2fs", fuse_overlayfs.NAME
PACKAGES = ((LL, "squashfuse"), (FUSE2FS, FUSE2FS), (FUSE_OVERLAYFS, FUSE_OVERLAYFS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack(System):
    """fuse-overlayfs on a lower by squashfuse_ll and a store by fuse2fs."""

    use_newest: bool = False
    """Whether the programs are Debian 13's instead of this system's."""

    def missing_requirements(self) -> str:
        if self.use_newest:
            return newest.missing(LL, FUSE2FS, FUSE_OVERLAYFS)
        return machine.missing_programs(*PACKAGES)

    def version(self) -> str:
        squashfuse = machine.version_in([*self._program(LL), "--help"])
        fuse2fs = machine.version_in([*self._program(FUSE2FS), "-V"])
        overlay = fuse_overlayfs.version(self.use_newest)
        return f"squashfuse {squashfuse}, fuse2fs {fuse2fs}, fuse-overlayfs {overlay}"

    def options(self) -> str:
        daemons = "squashfuse_ll -f IMAGE LOWER; fuse2fs -f -o rw,fakeroot STORE.img STORE; "
        return daemons + fuse_overlayfs.OPTIONS

    def mount(self, box: Box) -> None:
        box.start_helper([*self._program(LL), "-f", str(box.corpus.image), str(box.lower)], box.lower)
        store = [*self._program(FUSE2FS), "-f", "-o", "rw,fakeroot", str(box.image), str(box.store)]
        box.start_helper(store, box.store)
        box.output(["mkdir", "-p", f"{box.store}/upper", f"{box.store}/work"], box.scratch)
        box.start_daemon(fuse_overlayfs.command(box, self.use_newest))

    def unmount(self, box: Box) -> None:
        for target in (box.merged, box.store, box.lower):
            box.stop_daemon(target)

    def _program(self, name: str) -> list[str]:
        return newest.program(name, self.use_newest)


@dataclass(frozen=True, slots=True)
class ReaderStack(System):
    """fuse-overlayfs on squashfuse_ll: changes go to a directory."""

    name: str = f"{LL}+fuse-overlayfs"

    def missing_requirements(self) -> str:
        return machine.missing_programs(PACKAGES[0], PACKAGES[2])

    def version(self) -> str:
        return f"{machine.version_in([LL, '--help'])}, fuse-overlayfs {fuse_overlayfs.version()}"

    def options(self) -> str:
        return f"{LL} -f IMAGE LOWER; {fuse_overlayfs.OPTIONS}"

    def create(self, box: Box) -> None:
        for name in ("upper", "work"):
            (box.store / name).mkdir()

    def mount(self, box: Box) -> None:
        box.start_helper([LL, "-f", str(box.corpus.image), str(box.lower)], box.lower)
        box.start_daemon(fuse_overlayfs.command(box))

    def unmount(self, box: Box) -> None:
        for target in (box.merged, box.lower):
            box.stop_daemon(target)


STACKS = [Stack("squashfuse+fuse2fs+fuse-overlayfs")]
READERS = [ReaderStack()]
