"""Virtual machines that boot from all kinds of carriers: filesystems, buses, partitions and whole disks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.boot import images
from tests.boot.conftest import Parts
from tests.boot.machine import hard_disk, nvme, sata, scsi_disk, sd_card, stick
from tests.boot.test_boot import CARRIER, GUEST, PLAIN, Boot, content, often_enough
from tests.support.system import needs_root

pytestmark = [needs_root, pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Kind:
    """A carrier that a boot finds a store on."""

    filesystem: str
    bus: Callable[[Path, str], list[str]]
    device: str
    """What the guest calls it: the partition, if it has one."""
    table: str = ""
    modules: str = ""
    """What the guest needs besides what all have."""
    package: str = ""
    """That has the programs for it."""
    options: str = "backstore=alldev"
    megabytes: int = 192
    by_name: bool = False
    """Whether `cowfs persist` is given the disk, or a path on it that is mounted."""


def make_carrier(kind: Kind, image: Path) -> Path:
    if shutil.which(images.MAKERS[kind.filesystem][0]) is None:
        pytest.skip(f"needs {images.MAKERS[kind.filesystem][0]} ({kind.package})")
    return images.carrier(image, kind.filesystem, kind.megabytes, kind.table)


def is_left_clean(kind: Kind, disk: Path, tmp_path: Path) -> Path | None:
    """The carrier, and the store on it, which is returned where it can be had without a mount."""
    part = images.carrier_of(disk, kind.table)
    assert images.carrier_complaints(part, kind.filesystem) == ""
    store = images.from_carrier(part, kind.filesystem, "/sysrcd.bs", tmp_path / "after.bs")
    if store is not None:
        assert images.is_clean(store) == ""
    return store


def test_image_and_store_on_a_card(boot: Boot, image_disk: Path, parts: Parts, tmp_path: Path) -> None:
    """exFAT, as cards are sold. The store is made when there was none; the next boot needs the card only."""
    kind = Kind("exfat", sd_card, "mmcblk0p1", "mbr", package="exfatprogs", megabytes=254)
    disk = make_carrier(kind, tmp_path / "card.img")
    os.truncate(disk, 256 << 20)
    initramfs = images.initramfs(tmp_path / "initramfs", "exfat sdhci_pci mmc_block")
    test = f"""{GUEST}
        mkdir /mnt/card && mount -t exfat /dev/mmcblk0p1 /mnt/card
        cp /run/initramfs/cowfs/disk/vda/sysrcd.dat /mnt/card/ && umount /mnt/card
        echo first >/root/first
        cowfs persist / /dev/mmcblk0p1 128; out "persist: $?"
        tell_root
        out "mounted: $(grep -c mmcblk /proc/mounts)"
        echo later >/root/later
    """
    devices = [*hard_disk(image_disk, "image"), *sd_card(disk, "card")]
    with boot(PLAIN, initramfs=initramfs, test=test, devices=devices).wait() as machine:
        machine.shows(r"no store \(/sysrcd.bs\) was found")
        assert [machine.said(key) for key in ("persist", "store")] == ["0", "/dev/mmcblk0p1/sysrcd.bs"]
        assert machine.said("mounted") == "0", "it is the daemon's own"
        machine.shows("are unmounted cleanly")
    is_left_clean(kind, disk, tmp_path)

    test = f"""{GUEST}
        tell_root
        out "kept: $(cat /root/first /root/later | tr '\\n' ' ')"
        echo second >/root/second
        out "found: $(cowfs find | tr '\\n' ' ')"
    """
    with boot(PLAIN, initramfs=initramfs, test=test, devices=sd_card(disk, "card")).wait() as machine:
        assert machine.said("store") == f"{CARRIER}/mmcblk0p1/sysrcd.bs"
        assert machine.said("lower").startswith(f"{CARRIER}/mmcblk0p1/sysrcd.dat (squashfs")
        assert machine.said("kept").split() == ["first", "later"]
        assert "TAKEN" in machine.said("found")
        assert machine.said("motd") == ""
        assert "needs recovery" not in machine.text, "the first boot left it clean"
        machine.shows("are unmounted cleanly")
    is_left_clean(kind, disk, tmp_path)


KINDS = {
    "btrfs on NVMe, GPT": Kind(
        "btrfs", nvme, "nvme0n1p1", "gpt", "nvme btrfs", "btrfs-progs", megabytes=320, by_name=True
    ),
    "xfs on SATA, whole": Kind("xfs", sata, "sda", "", "ahci xfs", "xfsprogs", megabytes=400),
    "ext2 on SCSI, MBR": Kind("ext2", scsi_disk, "sda1", "mbr", by_name=True),
    "ext3 on virtio, whole": Kind("ext3", hard_disk, "vdb"),
    "ext4 on a stick, GPT": Kind("ext4", stick, "sda1", "gpt", options="", by_name=True),
    "vfat on a stick, whole": Kind("vfat", stick, "sda", options=""),
}


@often_enough
@pytest.mark.parametrize("name", KINDS)
def test_store_on(boot: Boot, image_disk: Path, tmp_path: Path, name: str) -> None:
    """Made by `cowfs persist`, found by the next boot."""
    kind = KINDS[name]
    disk = make_carrier(kind, tmp_path / "disk.img")
    initramfs = images.initramfs(tmp_path / "initramfs", kind.modules)
    devices = [*hard_disk(image_disk, "image"), *kind.bus(disk, "disk")]
    place = f"/dev/{kind.device}" if kind.by_name else "/mnt/x/sysrcd.bs"
    mount = "" if kind.by_name else f"mkdir /mnt/x && mount -t {kind.filesystem} /dev/{kind.device} /mnt/x"
    test = f"""{GUEST}
        echo first >/root/first
        {mount}
        cowfs persist / {place} 128; out "persist: $?"
        echo later >/root/later
    """
    with boot(f"{PLAIN} backstore=off", initramfs=initramfs, test=test, devices=devices).wait() as machine:
        assert machine.said("persist") == "0"
        machine.shows("are unmounted cleanly")
    is_left_clean(kind, disk, tmp_path)

    test = f"""{GUEST}
        tell_root
        out "kept: $(cat /root/first /root/later | tr '\\n' ' ')"
        echo second >/root/second
        out "found: $(cowfs find {kind.options.removeprefix("backstore=")} | tr '\\n' ' ')"
    """
    with boot(f"{PLAIN} {kind.options}", initramfs=initramfs, test=test, devices=devices).wait() as machine:
        assert machine.said("store") == f"{CARRIER}/{kind.device}/sysrcd.bs"
        assert machine.said("kept").split() == ["first", "later"]
        found = machine.said("found")
        assert found.startswith(f"/dev/{kind.device}  /sysrcd.bs  (mounted on {CARRIER}/{kind.device})"), (
            found
        )
        assert "TAKEN" in found
        assert machine.said("motd") == ""
        assert "needs recovery" not in machine.text, "the first boot left it clean"
        machine.shows("are unmounted cleanly")
    store = is_left_clean(kind, disk, tmp_path)
    assert store is None or content(store, "root/second") == "second\n"
