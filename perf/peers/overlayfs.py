"""The kernel's overlayfs: with the features that cowfs has too, and with its defaults."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from perf import machine
from perf.box import Box
from perf.peers import System


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelOverlay(System):
    """overlayfs with some *features* enabled; the kernel mounts the store too."""

    features: str
    fuse: bool = False

    def missing_requirements(self) -> str:
        if "overlay" in Path("/proc/filesystems").read_text().split():
            return ""
        return "the kernel has no overlayfs loaded (modprobe overlay)"

    def version(self) -> str:
        return machine.kernel()

    def options(self) -> str:
        return f"mount -t overlay -o {self._options('LOWER', 'STORE')} overlay MNT"

    def mount(self, box: Box) -> None:
        box.mount_lower()
        box.mount_store()
        options = self._options(str(box.lower), str(box.store))
        box.mount(box.merged, "-t", "overlay", "-o", options, "overlay")

    def unmount(self, box: Box) -> None:
        box.unmount(box.merged)
        box.unmount(box.store)
        box.unmount(box.lower)

    def _options(self, lower: str, store: str) -> str:
        places = f"lowerdir={lower},upperdir={store}/upper,workdir={store}/work"
        return f"{places},{self.features}" if self.features else places


SYSTEMS = [
    KernelOverlay("overlayfs", features="redirect_dir=on,metacopy=on,index=on,xino=on"),
    KernelOverlay("overlayfs-default", features=""),
]
