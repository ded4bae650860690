"""fuse-overlayfs with its defaults; the kernel mounts the lower and the store."""

from __future__ import annotations

from dataclasses import dataclass

from perf import machine
from perf.box import Box
from perf.peers import System, needs


@dataclass(frozen=True, slots=True)
class FuseOverlayfs:
    """fuse-overlayfs, run by root."""

    name: str = "fuse-overlayfs"
    fuse: bool = True

    def missing(self) -> str:
        return needs("fuse-overlayfs", "fuse-overlayfs")

    def version(self) -> str:
        return version()

    def options(self) -> str:
        return "fuse-overlayfs -f -o lowerdir=LOWER,upperdir=STORE/upper,workdir=STORE/work MNT"

    def create(self, box: Box) -> None:
        box.make_store()

    def mount(self, box: Box) -> None:
        box.mount_lower()
        box.mount_store()
        box.start_daemon(command(box))

    def unmount(self, box: Box) -> None:
        box.stop_daemon(box.merged)
        box.unmount(box.store)
        box.unmount(box.lower)


def command(box: Box) -> list[str]:
    """The command that mounts ``lower`` and ``store`` at ``merged``."""
    places = f"lowerdir={box.lower},upperdir={box.store}/upper,workdir={box.store}/work"
    return ["fuse-overlayfs", "-f", "-o", places, str(box.merged)]


def version() -> str:
    """The version of fuse-overlayfs, which prints that of fusermount3 first."""
    lines = machine.output(["fuse-overlayfs", "--version"]).splitlines()
    own = [line.split()[-1] for line in lines if line.startswith("fuse-overlayfs")]
    return own[0] if own else ""


SYSTEMS: list[System] = [FuseOverlayfs()]
