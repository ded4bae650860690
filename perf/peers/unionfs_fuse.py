"""unionfs-fuse with copy-on-write; the kernel mounts the lower and the store."""

from __future__ import annotations

from dataclasses import dataclass

from perf import machine
from perf.box import Box
from perf.peers import System


@dataclass(frozen=True, slots=True)
class UnionfsFuse(System):
    """unionfs-fuse, run by root."""

    name: str = "unionfs-fuse"

    def missing_requirements(self) -> str:
        return machine.missing_programs(("unionfs", "unionfs-fuse"))

    def version(self) -> str:
        # It prints the version of fusermount3 first.
        own = [line for line in machine.output(["unionfs", "--version"]).splitlines() if "unionfs" in line]
        return own[0].split()[-1] if own else ""

    def options(self) -> str:
        return "unionfs -f -o cow STORE/upper=RW:LOWER=RO MNT"

    def mount(self, box: Box) -> None:
        box.mount_lower()
        box.mount_store()
        branches = f"{box.store}/upper=RW:{box.lower}=RO"
        box.start_daemon(["unionfs", "-f", "-o", "cow", branches, str(box.merged)])

    def unmount(self, box: Box) -> None:
        box.stop_daemon(box.merged)
        box.unmount(box.store)
        box.unmount(box.lower)


SYSTEMS = [UnionfsFuse()]
