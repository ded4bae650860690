"""What an ordinary user can mount: cowfs, and the stack of three daemons, all run by nobody.

The files in the lower are nobody's, and so are the clients: a mount of a user is closed to others.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from perf import machine
from perf.box import Box
from perf.images import NOBODY
from perf.peers import System, fuse_overlayfs, needs, newest
from perf.peers.cowfs import SYSTEMS as COWFS
from perf.peers.cowfs import Cowfs, command

BECOME = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
LL, FUSE2FS = "squashfuse_ll", "fuse2fs"


def take(box: Box) -> None:
    """Give everything that is the system's to nobody, and have its programs run so."""
    box.user = BECOME
    for path in (box.path, box.lower, box.store, box.merged, box.image):
        if path.exists():
            os.chown(path, NOBODY, NOBODY)


@dataclass(frozen=True, slots=True)
class CowfsOfUser:
    """cowfs, as it comes."""

    of_root: Cowfs
    fuse: bool = True

    @property
    def name(self) -> str:
        return f"{self.of_root.name}-user"

    def missing(self) -> str:
        return self.of_root.missing()

    def version(self) -> str:
        return self.of_root.version()

    def options(self) -> str:
        return self.of_root.options()

    def create(self, box: Box) -> None:
        self.of_root.create(box)
        take(box)

    def mount(self, box: Box) -> None:
        self.of_root.mount(box)

    def unmount(self, box: Box) -> None:
        box.stop_daemon(box.merged, [*BECOME, *command(), "umount", str(box.merged)])


@dataclass(frozen=True, slots=True)
class StackOfUser:
    """fuse-overlayfs over a lower by squashfuse_ll and a store by fuse2fs."""

    name: str
    new: bool = False
    fuse: bool = True

    def missing(self) -> str:
        if self.new:
            return newest.missing(LL, FUSE2FS, "fuse-overlayfs")
        wanted = ((LL, "squashfuse"), (FUSE2FS, FUSE2FS), ("fuse-overlayfs", "fuse-overlayfs"))
        return "; ".join(filter(None, (needs(*each) for each in wanted)))

    def version(self) -> str:
        squashfuse = machine.version_in([*self._program(LL), "--help"])
        fuse2fs = machine.version_in([*self._program(FUSE2FS), "-V"])
        return (
            f"squashfuse {squashfuse}, fuse2fs {fuse2fs}, fuse-overlayfs {fuse_overlayfs.version(self.new)}"
        )

    def options(self) -> str:
        daemons = "squashfuse_ll -f IMAGE LOWER; fuse2fs -f -o rw,fakeroot STORE.img STORE; "
        return daemons + fuse_overlayfs.SYSTEMS[0].options()

    def create(self, box: Box) -> None:
        box.make_store()
        take(box)

    def mount(self, box: Box) -> None:
        box.start_helper([*self._program(LL), "-f", str(box.corpus.image), str(box.lower)], box.lower)
        store = [*self._program(FUSE2FS), "-f", "-o", "rw,fakeroot", str(box.image), str(box.store)]
        box.start_helper(store, box.store)
        box.output(["mkdir", "-p", f"{box.store}/upper", f"{box.store}/work"], box.scratch)
        box.start_daemon(fuse_overlayfs.command(box, self.new))

    def unmount(self, box: Box) -> None:
        for target in (box.merged, box.store, box.lower):
            box.stop_daemon(target)

    def _program(self, name: str) -> list[str]:
        return newest.command(name) if self.new else [name]


SYSTEMS: list[System] = [CowfsOfUser(each) for each in COWFS[:2] if isinstance(each, Cowfs)]
SYSTEMS += [StackOfUser("stack-user"), StackOfUser("stack-user-new", new=True)]
