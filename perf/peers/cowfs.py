"""cowfs, run from the source tree by the interpreter that runs the suite; and that of another tree beside it.

``COWFS_BEFORE=DIR make perf`` measures the tree DIR too, in the same rounds: what a change costs. DIR is a
checkout in which ``make setup`` was run.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from perf import machine
from perf.box import PROJECT, STORE_BYTES, Box
from perf.peers import System


@dataclass(frozen=True, slots=True)
class Cowfs:
    """cowfs with one of its engines, the lower image and the store given to it as files."""

    name: str
    engine: str
    tree: Path = PROJECT
    fuse: bool = True
    by_dev_fuse: bool = False
    """Whether requests come by /dev/fuse even where the kernel gives them by io_uring."""

    def missing(self) -> str:
        done = subprocess.run(
            [*command(self.tree), "mount", "--help"],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode == 0:
            return ""
        said = done.stderr.strip().splitlines()
        return f"`cowfs mount` does not run: {said[-1] if said else done.returncode} (make setup)"

    def version(self) -> str:
        return machine.revision(self.tree)

    def options(self) -> str:
        return " ".join(["cowfs mount IMAGE MNT --store STORE.img", *self._how()])

    def create(self, box: Box) -> None:
        box.check([*command(self.tree), "create", str(box.image), f"{STORE_BYTES >> 20}M"])

    def mount(self, box: Box) -> None:
        machine.offer_io_uring("Y")  # which others on this machine may have turned off since
        store = ["--store", str(box.image), *self._how()]
        box.start_daemon([*command(self.tree), "mount", str(box.corpus.image), str(box.merged), *store])

    def _how(self) -> list[str]:
        return ["--engine", self.engine, *(["-o", "io_uring=off"] if self.by_dev_fuse else []), "-f"]

    def unmount(self, box: Box) -> None:
        box.stop_daemon(box.merged, [*command(self.tree), "umount", str(box.merged)])


def command(tree: Path = PROJECT) -> list[str]:
    """How the cowfs of *tree* is started."""
    if tree == PROJECT:
        return [machine.python(), "-m", "cowfs.cli.main"]
    return ["env", "-C", str(tree), str(tree / ".venv/bin/python"), "-m", "cowfs.cli.main"]


@dataclass(frozen=True, slots=True)
class CowfsReader:
    """cowfs as a user without root has it: it reads the image itself, and the store is a directory."""

    name: str = "cowfs-process"
    fuse: bool = True

    def missing(self) -> str:
        return SYSTEMS[0].missing()

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


SYSTEMS: list[System] = [
    Cowfs("cowfs", "auto"),
    Cowfs("cowfs-dev-fuse", "auto", by_dev_fuse=True),
    Cowfs("cowfs-kernel", "kernel"),
]
STORES: list[System] = [Cowfs("cowfs-store", "process"), Cowfs("cowfs-kernel", "kernel")]
if BEFORE := os.environ.get("COWFS_BEFORE"):
    SYSTEMS.append(Cowfs("cowfs-before", "auto", Path(BEFORE).resolve()))
    STORES.append(Cowfs("cowfs-store-before", "process", Path(BEFORE).resolve()))
READERS: list[System] = [CowfsReader()]
