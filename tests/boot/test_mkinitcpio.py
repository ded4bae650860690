"""The hook for mkinitcpio, run by a stand-in, because Debian does not have mkinitcpio."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.boot import images
from tests.boot.machine import Machine, hard_disk, stick
from tests.boot.test_boot import CARRIER, GUEST, PLAIN, make_store
from tests.support.system import needs_root, run

pytestmark = [
    needs_root,
    pytest.mark.skipif(shutil.which("depmod") is None, reason="needs depmod (scripts/setup --boot)"),
]

MKINITCPIO = Path(__file__).parent / "initcpio/mkinitcpio"


@pytest.fixture
def hooks(tmp_path: Path) -> Path:
    """Install the files of make install-boot for mkinitcpio, and the library that they use."""
    prefix = tmp_path / "usr"
    run("make", "-s", "-C", images.PROJECT, "install-boot", f"PREFIX={prefix}")
    return prefix / "lib/initcpio"


def build(out: Path, kernel: tuple[Path, str], hooks: Path, *names: str, check: bool = True) -> str:
    """Make an initramfs with these hooks; return the output. The first hook is under test."""
    environment = {**os.environ, "MODULES": "qemu_fw_cfg"}  # for the test itself
    return run(
        MKINITCPIO, out, kernel[1], kernel[0], hooks, *names, check=check, timeout=120, env=environment
    ).stderr


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_boots(hooks: Path, boot: Callable[..., Machine], image_disk: Path, tmp_path: Path) -> None:
    assert build(tmp_path / "initramfs", images.kernel()[1:], hooks, "cowfs", "udev") == ""
    store = make_store(tmp_path / "s.bs")
    mine = images.fat_stick(tmp_path / "stick.img", {"/sysrcd.bs": store}, 64)
    devices = [*hard_disk(image_disk, "image"), *stick(mine, "stick")]
    machine = boot(
        f"{PLAIN} boot=cowfs", test=f"{GUEST}\n tell_root", devices=devices, initramfs=tmp_path / "initramfs"
    )
    with machine.wait():
        assert machine.said("root") == "fuse.cowfs"
        assert machine.said("store") == f"{CARRIER}/sda1/sysrcd.bs"
        machine.shows("are unmounted cleanly")
    assert images.fat_is_clean(mine) == ""


def test_is_refused_where_nobody_would_run_it(hooks: Path, tmp_path: Path) -> None:
    said = build(tmp_path / "initramfs", (tmp_path, "none"), hooks, "cowfs", "systemd", check=False)
    assert "needs the hook udev" in said
    assert not (tmp_path / "initramfs").exists()
