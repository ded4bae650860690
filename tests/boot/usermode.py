"""A machine without hardware: user-mode Linux, a kernel that is a program.

Its guests run on this processor, not in an emulator: a boot takes 20 seconds of processor time. It is for
tests that need something of a kernel that this one may lack, but no hardware. Its disks are /dev/ubda etc.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from tests.boot import images
from tests.boot.machine import Machine
from tests.support.mounts import project_root
from tests.support.system import run

PACKAGE = "user-mode-linux"
MODULES = """
    fuse squashfs loop ext4 crc32c_generic vfat nls_cp437 nls_iso8859-1 nls_ascii nls_utf8
"""
_SECTOR = 512
_PLACE = images.CACHE / "usermode"


class UserMode(Machine):
    """A run of user-mode Linux. *devices* are the paths of its disks."""

    _waits: dict[str, int] | None = None

    def _held_up(self) -> float:
        """Return how long its processes, of which one at a time runs, have waited for a processor."""
        waits = self._waits = self._waits or {}
        pid = str(self.process.pid)
        with suppress(OSError):
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            for each in (pid, *children):
                waits[each] = int(Path(f"/proc/{each}/schedstat").read_text().split()[1])
        return sum(waits.values()) / 1e9

    def _command(
        self,
        kernel: Path | None,
        initramfs: Path,
        script: Path,
        options: str,
        devices: Sequence[str],
        memory: int,
    ) -> list[str]:
        text = script.read_bytes()
        script.write_bytes(text + b"\n" * (-len(text) % _SECTOR))
        disks = [f"ubd{number}={disk}" for number, disk in enumerate(devices)]
        return [
            *(str(kernel), f"mem={memory}M", f"initrd={initramfs}", *disks, f"ubd15r={script}"),
            *(f"uml_dir={script.parent}", "con=null", "con0=fd:0,fd:1", "quiet", "loglevel=1", "panic=1"),
            *("root=cowfs", *options.split()),  # it would add another root=
        ]


def kernel() -> tuple[Path, Path, str]:
    """Return the program, the directory with its lib/modules, and its version; it is not installed."""
    with images.alone(_PLACE.name):
        if not _PLACE.exists():
            if "Candidate: " not in run("apt-cache", "policy", PACKAGE, check=False).stdout:
                pytest.skip(f"needs {PACKAGE}, which only some architectures have")
            partial = _PLACE.with_suffix(".new")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            run("apt-get", "-o", "APT::Sandbox::User=root", "download", PACKAGE, cwd=partial, timeout=300)
            (archive,) = partial.glob("*.deb")
            run("dpkg-deb", "-x", archive, partial, timeout=120)
            archive.unlink()
            (partial / "lib").mkdir()
            (partial / "lib/modules").symlink_to("../usr/lib/uml/modules")
            (version,) = os.listdir(partial / "lib/modules")
            run("depmod", "-b", partial, version, timeout=120)
            partial.rename(_PLACE)
    (version,) = os.listdir(_PLACE / "lib/modules")
    return _PLACE / "usr/bin/linux.uml", _PLACE, version


def initramfs(out: Path, modules: str = "") -> Path:
    """Make the initramfs of mkinitramfs-busybox for it. *modules* are more of its modules."""
    _, root, version = kernel()
    run(
        Path(project_root()) / "mount-helpers/mkinitramfs-busybox", out, version, root,
        env={**os.environ, "COWFS_MODULES": f"{MODULES} {modules}"}, timeout=120,
    )  # fmt: skip
    return out
