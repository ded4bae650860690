"""fuse-overlayfs with its defaults; the kernel mounts the lower and the store."""

from __future__ import annotations

from dataclasses import dataclass

from perf import machine
from perf.box import Box
from perf.peers import System, needs, newest

NAME = "fuse-overlayfs"


@dataclass(frozen=True, slots=True)
class FuseOverlayfs:
    """fuse-overlayfs, run by root."""

    name: str = NAME
    new: bool = False
    """Whether it is Debian 13's, and not this system's."""
    fuse: bool = True

    def missing(self) -> str:
        return newest.missing(NAME) if self.new else needs(NAME, NAME)

    def version(self) -> str:
        return version(self.new)

    def options(self) -> str:
        return "fuse-overlayfs -f -o lowerdir=LOWER,upperdir=STORE/upper,workdir=STORE/work MNT"

    def create(self, box: Box) -> None:
        box.make_store()

    def mount(self, box: Box) -> None:
        box.mount_lower()
        box.mount_store()
        box.start_daemon(command(box, self.new))

    def unmount(self, box: Box) -> None:
        box.stop_daemon(box.merged)
        box.unmount(box.store)
        box.unmount(box.lower)


def command(box: Box, new: bool = False) -> list[str]:
    """The command that mounts ``lower`` and ``store`` at ``merged``."""
    places = f"lowerdir={box.lower},upperdir={box.store}/upper,workdir={box.store}/work"
    return [*program(new), "-f", "-o", places, str(box.merged)]


def program(new: bool) -> list[str]:
    """What runs it."""
    return newest.command(NAME) if new else [NAME]


def version(new: bool = False) -> str:
    """The version of fuse-overlayfs, which prints that of fusermount3 first."""
    lines = machine.output([*program(new), "--version"]).splitlines()
    own = [line.split()[-1] for line in lines if line.startswith(NAME)]
    return own[0] if own else ""


SYSTEMS: list[System] = [FuseOverlayfs()]
NEWEST: list[System] = [FuseOverlayfs(f"{NAME}-new", new=True)]
