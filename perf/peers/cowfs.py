"""cowfs, run from the source tree by the interpreter that runs the suite; optionally a second tree beside it.

``COWFS_BEFORE=DIR make perf`` also measures the tree DIR in the same rounds, to find the cost of a change.
DIR is a checkout in which ``make setup`` was run.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from perf import machine
from perf.box import PROJECT, STORE_BYTES, Box
from perf.peers import System


@dataclass(frozen=True, slots=True, kw_only=True)
class Cowfs(System):
    """cowfs with one of its engines. It mounts the lower image and the store itself."""

    engine: str
    tree: Path = PROJECT
    dev_fuse: bool = False
    """Whether requests come by /dev/fuse even if the kernel offers io_uring."""

    def missing_requirements(self) -> str:
        done = subprocess.run(
            [*command(self.tree), "mount", "--help"],
            cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            return ""
        message = done.stderr.strip().splitlines()
        return f"`cowfs mount` does not run: {message[-1] if message else done.returncode} (make setup)"

    def version(self) -> str:
        return machine.revision(self.tree)

    def options(self) -> str:
        return " ".join(["cowfs mount IMAGE MNT --store STORE.img", *self._mount_options()])

    def create(self, box: Box) -> None:
        box.check([*command(self.tree), "create", str(box.image), f"{STORE_BYTES >> 20}M"])

    def mount(self, box: Box) -> None:
        machine.set_io_uring("Y")  # another program may have switched it off since
        store = ["--store", str(box.image), *self._mount_options()]
        box.start_daemon([*command(self.tree), "mount", str(box.corpus.image), str(box.merged), *store])

    def _mount_options(self) -> list[str]:
        return ["--engine", self.engine, *(["-o", "io_uring=off"] if self.dev_fuse else []), "-f"]

    def unmount(self, box: Box) -> None:
        box.stop_daemon(box.merged, [*command(self.tree), "umount", str(box.merged)])


def command(tree: Path = PROJECT) -> list[str]:
    """Return the words that run the cowfs of *tree*."""
    if tree == PROJECT:
        return [machine.python(), "-m", "cowfs.cli.main"]
    return ["env", "-C", str(tree), str(tree / ".venv/bin/python"), "-m", "cowfs.cli.main"]


@dataclass(frozen=True, slots=True)
class CowfsReader(System):
    """cowfs as a user without root has it: cowfs reads the image itself, and the store is a directory."""

    name: str = "cowfs-process"

    def missing_requirements(self) -> str:
        return SYSTEMS[0].missing_requirements()

    def version(self) -> str:
        return machine.revision(PROJECT)

    def options(self) -> str:
        return "cowfs mount IMAGE MNT --store STORE --engine process -f"

    def create(self, box: Box) -> None:
        pass

    def mount(self, box: Box) -> None:
        store = ["--store", str(box.store), "--engine", "process"]
        box.start_daemon([*command(), "mount", str(box.corpus.image), str(box.merged), *store, "-f"])

    def unmount(self, box: Box) -> None:
        box.stop_daemon(box.merged, [*command(), "umount", str(box.merged)])


SYSTEMS = [
    Cowfs("cowfs", engine="auto"),
    Cowfs("cowfs-dev-fuse", engine="auto", dev_fuse=True),
    Cowfs("cowfs-kernel", engine="kernel"),
]
STORES = [Cowfs("cowfs-store", engine="process"), Cowfs("cowfs-kernel", engine="kernel")]
if BEFORE := os.environ.get("COWFS_BEFORE"):
    SYSTEMS.append(Cowfs("cowfs-before", engine="auto", tree=Path(BEFORE).resolve()))
    STORES.append(Cowfs("cowfs-store-before", engine="process", tree=Path(BEFORE).resolve()))
READERS = [CowfsReader()]
