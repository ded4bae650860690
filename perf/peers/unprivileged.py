"""What a user without root has today: squashfuse, fuse2fs and fuse-overlayfs, three daemons on each other.

Run by root here as everything else is; what costs time is the stack of daemons, not who owns them.
"""

from __future__ import annotations

from dataclasses import dataclass

from perf import machine
from perf.box import Box
from perf.peers import System, fuse_overlayfs, needs


@dataclass(frozen=True, slots=True)
class Stacked:
    """fuse-overlayfs over a lower by squashfuse_ll and a store by fuse2fs."""

    name: str = "squashfuse+fuse2fs+fuse-overlayfs"
    fuse: bool = True

    def missing(self) -> str:
        wanted = (
            ("squashfuse_ll", "squashfuse"),
            ("fuse2fs", "fuse2fs"),
            ("fuse-overlayfs", "fuse-overlayfs"),
        )
        return "; ".join(filter(None, (needs(*each) for each in wanted)))

    def version(self) -> str:
        squashfuse = machine.version_in(["squashfuse_ll", "--help"])
        fuse2fs = machine.version_in(["fuse2fs", "-V"])
        return f"squashfuse {squashfuse}, fuse2fs {fuse2fs}, fuse-overlayfs {fuse_overlayfs.version()}"

    def options(self) -> str:
        daemons = "squashfuse_ll -f IMAGE LOWER; fuse2fs -f -o rw,fakeroot STORE.img STORE; "
        return daemons + "fuse-overlayfs -f -o lowerdir=LOWER,upperdir=STORE/upper,workdir=STORE/work MNT"

    def create(self, box: Box) -> None:
        box.make_store()

    def mount(self, box: Box) -> None:
        box.start_helper(["squashfuse_ll", "-f", str(box.corpus.image), str(box.lower)], box.lower)
        box.start_helper(["fuse2fs", "-f", "-o", "rw,fakeroot", str(box.image), str(box.store)], box.store)
        for name in ("upper", "work"):
            (box.store / name).mkdir(exist_ok=True)
        box.start_daemon(fuse_overlayfs.command(box))

    def unmount(self, box: Box) -> None:
        for target in (box.merged, box.store, box.lower):
            box.stop_daemon(target)


SYSTEMS: list[System] = [Stacked()]
