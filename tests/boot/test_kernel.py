"""A kernel that an upgrade has written into the store: what the boot library says of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.boot.images import BUSYBOX
from tests.boot.test_options import LIBRARY, System

pytestmark = pytest.mark.skipif(not BUSYBOX.exists(), reason="needs busybox-static")

OLD, NEW = "6.1.0-9-amd64", "6.1.0-56-amd64"
LOADER = "BOOT_IMAGE=(hd0,msdos1)/live/vmlinuz quiet"


@pytest.fixture
def system(tmp_path: Path) -> System:
    """A system that its image's kernel started. Its root equals the image."""
    system = System(tmp_path / "system")
    (system.top / "proc/sys/kernel").mkdir(parents=True)
    (system.top / "proc/sys/kernel/osrelease").write_text(f"{OLD}\n")
    (system.top / "dev/console").touch()
    for name in ("view/boot", f"view/usr/lib/modules/{OLD}", "run/initramfs/cowfs/disk/sdb1/live"):
        (system.top / name).mkdir(parents=True)
    (system.top / "view/lib").symlink_to("usr/lib")
    (system.top / f"view/boot/vmlinuz-{OLD}").write_text("old")
    (system.top / "run/initramfs/cowfs/disk/sdb1/live/vmlinuz").write_text("old")
    shutil.copytree(system.top / "view", system.top / "root", symlinks=True)
    return system


def told(system: System, line: str = LOADER) -> list[str]:
    script = f". {LIBRARY}/cowfs-boot.sh; tell_kernel {system.top}/root {system.top}/view"
    assert system.shell(script, line) == []
    return [one.removeprefix("cowfs: ") for one in system.warnings().splitlines()]


def install(system: System, version: str, content: str = "new") -> None:
    kernel = system.top / f"root/boot/vmlinuz-{version}"
    kernel.write_text(content)
    os.utime(kernel, (2_000_000_000, 2_000_000_000))
    (system.top / f"root/lib/modules/{version}").mkdir(exist_ok=True)


def test_a_system_as_its_image_is(system: System) -> None:
    assert told(system) == []


def test_a_newer_kernel(system: System) -> None:
    install(system, NEW)
    assert told(system) == [
        f"the system has the kernel {NEW}, and {OLD} was started: copy /boot/vmlinuz-{NEW} over"
        " sdb1/live/vmlinuz, and its initramfs"
    ]


def test_where_the_boot_loader_says_nothing(system: System) -> None:
    install(system, NEW)
    assert told(system, "quiet") == [
        f"the system has the kernel {NEW}, and {OLD} was started: copy /boot/vmlinuz-{NEW}, and its initramfs"
    ]


def test_it_was_started(system: System) -> None:
    """The image has an older one, which is also in the root."""
    install(system, NEW)
    (system.top / "proc/sys/kernel/osrelease").write_text(f"{NEW}\n")
    (system.top / "run/initramfs/cowfs/disk/sdb1/live/vmlinuz").write_text("new")
    assert told(system) == []


def test_an_older_one(system: System) -> None:
    install(system, "5.10.0-30-amd64")
    assert told(system) == []


def test_the_same_version_built_anew(system: System) -> None:
    install(system, OLD, "fix")
    carrier = system.top / "run/initramfs/cowfs/disk/sdb1/live/vmlinuz"
    assert told(system, "BOOT_IMAGE=/elsewhere quiet") == []
    assert told(system, "quiet") == []
    assert told(system) == [
        f"the system has a newer build of the kernel {OLD} than was started: copy /boot/vmlinuz-{OLD} over"
        " sdb1/live/vmlinuz, and its initramfs"
    ]
    (system.top / "run/motd.d/cowfs").unlink()
    carrier.write_text("fix")
    assert told(system) == []


def test_its_modules_are_gone(system: System) -> None:
    install(system, NEW)
    shutil.rmtree(system.top / f"root/lib/modules/{OLD}")
    assert told(system)[1:] == [
        f"the modules of the running kernel {OLD} were removed: hardware may not work until one of these is"
        f" started: {NEW}"
    ]


def test_a_system_without_kernels(system: System) -> None:
    """The boot goes on."""
    for name in ("root", "view"):
        shutil.rmtree(system.top / name)
        (system.top / name).mkdir()
    (system.top / "proc/sys/kernel/osrelease").unlink()
    assert told(system) == []
