"""fuse-overlayfs with its defaults; the kernel mounts the lower and the store."""

from __future__ import annotations

from dataclasses import dataclass

from perf import machine
from perf.box import Box
from perf.peers import System, newest

NAME = "fuse-overlayfs"
OPTIONS = "fuse-overlayfs -f -o lowerdir=LOWER,upperdir=STORE/upper,workdir=STORE/work MNT"


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseOverlayfs(System):
    """fuse-overlayfs, run by root."""

    use_newest: bool = False
    """Whether it is Debian 13's instead of this system's."""

    def missing_requirements(self) -> str:
        return newest.missing(NAME) if self.use_newest else machine.missing_programs((NAME, NAME))

    def version(self) -> str:
        return version(self.use_newest)

    def options(self) -> str:
        return OPTIONS

    def mount(self, box: Box) -> None:
        box.mount_lower()
        box.mount_store()
        box.start_daemon(command(box, self.use_newest))

    def unmount(self, box: Box) -> None:
        box.stop_daemon(box.merged)
        box.unmount(box.store)
        box.unmount(box.lower)


def command(box: Box, use_newest: bool = False) -> list[str]:
    """Return the command that mounts ``lower`` and ``store`` at ``merged``."""
    places = f"lowerdir={box.lower},upperdir={box.store}/upper,workdir={box.store}/work"
    return [*newest.program(NAME, use_newest), "-f", "-o", places, str(box.merged)]


def version(use_newest: bool = False) -> str:
    """Return the version of fuse-overlayfs, which prints that of fusermount3 first."""
    lines = machine.output([*newest.program(NAME, use_newest), "--version"]).splitlines()
    own = [line.split()[-1] for line in lines if line.startswith(NAME)]
    return own[0] if own else ""


SYSTEMS = [FuseOverlayfs(NAME)]
NEWEST = [FuseOverlayfs(f"{NAME}-new", use_newest=True)]
