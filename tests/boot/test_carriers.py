"""Virtual machines that boot from all kinds of media: filesystems, buses, partitions and whole disks."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.boot import images
from tests.boot.conftest import Parts
from tests.boot.machine import (
    empty_drive,
    hard_disk,
    nvme,
    plug,
    put_in,
    sata,
    scsi_disk,
    sd_card,
    stick,
    unplug,
)
from tests.boot.test_boot import CARRIER, GUEST, PLAIN, Boot, changed_store, content, make_store
from tests.support.system import needs_root, run

pytestmark = [needs_root, pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Kind:
    """A disk on which a boot finds a store."""

    filesystem: str
    bus: Callable[[Path, str], list[str]]
    device: str
    """Its name in the guest: the partition, if it has one."""
    table: str = ""
    modules: str = ""
    """Modules that the guest needs in addition."""
    package: str = ""
    """The package with the programs for it."""
    options: str = "backstore=alldev"
    megabytes: int = 224
    kernel: str = images.KERNEL_PACKAGE
    by_name: bool = False
    """Whether `cowfs persist` gets the disk, or a path on it that is mounted."""


def make_carrier(kind: Kind, image: Path) -> Path:
    if shutil.which(images.MAKERS[kind.filesystem][0]) is None:
        pytest.skip(f"needs {images.MAKERS[kind.filesystem][0]} ({kind.package})")
    return images.carrier(image, kind.filesystem, kind.megabytes, kind.table)


def is_left_clean(kind: Kind, disk: Path, tmp_path: Path) -> Path | None:
    """Check the disk and the store on it; return the store if a tool can copy it."""
    part = images.carrier_of(disk, kind.table)
    assert images.carrier_complaints(part, kind.filesystem) == ""
    store = images.from_carrier(part, kind.filesystem, "/sysrcd.bs", tmp_path / "after.bs")
    if store is not None:
        assert images.is_clean(store) == ""
    return store


@pytest.mark.nightly
def test_image_and_store_on_a_card(boot: Boot, image_disk: Path, parts: Parts, tmp_path: Path) -> None:
    """exFAT, as cards are sold. A new store is created; the next boot needs only the card."""
    kind = Kind("exfat", sd_card, "mmcblk0p1", "mbr", package="exfatprogs", megabytes=254)
    disk = make_carrier(kind, tmp_path / "card.img")
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
        assert "SELECTED" in machine.said("found")
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
    "ntfs on a stick, MBR": Kind(
        "ntfs", stick, "sda1", "mbr", "ntfs3", "ntfs-3g", options="", kernel=images.NEWER_KERNEL, by_name=True
    ),
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", KINDS)
def test_store_on(boot: Boot, image_disk: Path, tmp_path: Path, name: str) -> None:
    """`cowfs persist` creates the store, and the next boot finds it."""
    kind = KINDS[name]
    disk = make_carrier(kind, tmp_path / "disk.img")
    if kind.filesystem == "ntfs" and not list(images.kernel(kind.kernel)[1].rglob("ntfs3.ko*")):
        pytest.skip(f"needs a kernel with ntfs3: {kind.kernel}, which is in Debian's security updates")
    initramfs = images.initramfs(tmp_path / "initramfs", kind.modules, kind.kernel)
    start = partial(boot, kernel=images.kernel(kind.kernel)[0], initramfs=initramfs)
    devices = [*hard_disk(image_disk, "image"), *kind.bus(disk, "disk")]
    place = f"/dev/{kind.device}" if kind.by_name else "/mnt/x/sysrcd.bs"
    mount = "" if kind.by_name else f"mkdir /mnt/x && mount -t {kind.filesystem} /dev/{kind.device} /mnt/x"
    test = f"""{GUEST}
        echo first >/root/first
        {mount}
        cowfs persist / {place} 160; out "persist: $?"
        {"cowfs grow / 176" if kind.by_name else ""}
        echo later >/root/later
    """
    with start(f"{PLAIN} backstore=off", test=test, devices=devices).wait() as machine:
        assert machine.said("persist") == "0"
        machine.shows("are unmounted cleanly")
    is_left_clean(kind, disk, tmp_path)

    test = f"""{GUEST}
        tell_root
        out "kept: $(cat /root/first /root/later | tr '\\n' ' ')"
        echo second >/root/second
        out "size: $(stat -c %s {CARRIER}/{kind.device}/sysrcd.bs)"
        out "found: $(cowfs find {kind.options.removeprefix("backstore=")} | tr '\\n' ' ')"
    """
    with start(f"{PLAIN} {kind.options}", test=test, devices=devices).wait() as machine:
        assert machine.said("store") == f"{CARRIER}/{kind.device}/sysrcd.bs"
        assert machine.said("kept").split() == ["first", "later"]
        assert int(machine.said("size")) >> 20 == (176 if kind.by_name else 160)
        found = machine.said("found")
        assert found.startswith(f"/dev/{kind.device}  /sysrcd.bs  (mounted on {CARRIER}/{kind.device})"), (
            found
        )
        assert "SELECTED" in found
        assert machine.said("motd") == ""
        assert "needs recovery" not in machine.text, "the first boot left it clean"
        machine.shows("are unmounted cleanly")
    store = is_left_clean(kind, disk, tmp_path)
    assert store is None or content(store, "root/second") == "second\n"


@pytest.mark.nightly
def test_store_is_made_on_the_stick_of_the_image(boot: Boot, parts: Parts, tmp_path: Path) -> None:
    """The boot without a store has mounted that stick read-only."""
    mine = images.fat_stick(tmp_path / "stick.img", {"/sysrcd.dat": parts.image}, 224)
    test = f"""{GUEST}
        echo first >/root/first
        cowfs persist / /dev/sda1 128; out "persist: $?"
        echo later >/root/later
    """
    with boot(PLAIN, test=test, devices=stick(mine, "stick")).wait() as machine:
        assert machine.said("persist") == "0"
        machine.shows("are unmounted cleanly")
    assert images.fat_is_clean(mine) == ""
    test = f"""{GUEST}
        tell_root
        out "kept: $(cat /root/first /root/later | tr '\\n' ' ')"
    """
    with boot(PLAIN, test=test, devices=stick(mine, "stick")).wait() as machine:
        assert machine.said("store") == f"{CARRIER}/sda1/sysrcd.bs"
        assert machine.said("kept").split() == ["first", "later"]
        assert "needs recovery" not in machine.text
    assert images.fat_is_clean(mine) == ""
    assert images.is_clean(images.from_fat(mine, "/sysrcd.bs", tmp_path / "after.bs")) == ""


@pytest.mark.nightly
def test_store_in_a_mapping(boot: Boot, image_disk: Path, parts: Parts, tmp_path: Path) -> None:
    """Device-mapper: the disk below has the same filesystem, and is left alone."""
    if shutil.which("dmsetup") is None:
        pytest.skip("needs dmsetup (dmsetup)")
    files = tmp_path / "files"
    files.mkdir()
    make_store(files / "sysrcd.bs")
    disk = images.ext4_disk(tmp_path / "disk.img", files, 48)
    initramfs = images.initramfs(tmp_path / "plain", "dm_mod")
    initramfs = images.with_mapping(tmp_path / "initramfs", initramfs, "vdb")
    test = f"""{GUEST}
        tell_root
        out "found: $(cowfs find alldev | tr '\\n' ' ')"
        out "below: $(ls /sys/block/vdb/holders)"
        echo kept >/root/kept
    """
    devices = [*hard_disk(image_disk, "image"), *hard_disk(disk, "disk")]
    with boot(f"{PLAIN} backstore=alldev", initramfs=initramfs, test=test, devices=devices).wait() as machine:
        assert machine.said("below") == "dm-0"
        assert machine.said("store") == f"{CARRIER}/dm-0/sysrcd.bs"
        assert re.findall(r"/dev/\S+  ", machine.said("found")) == ["/dev/dm-0  "]
        assert "SELECTED" in machine.said("found")
        assert machine.said("motd") == ""
        machine.shows("are unmounted cleanly")
    assert images.is_clean(disk) == ""
    after = images.from_ext4(disk, "/sysrcd.bs", tmp_path / "after.bs")
    assert images.is_clean(after) == ""
    assert content(after, "root/kept") == "kept\n"


@pytest.mark.nightly
def test_image_on_a_disc_that_is_put_in_late(boot: Boot, parts: Parts, tmp_path: Path) -> None:
    """The store is on a stick, both in a subdirectory; another stick is left alone."""
    for name in ("cd", "mine", "other"):
        (tmp_path / name / "live").mkdir(parents=True)
    os.link(parts.image, tmp_path / "cd/live/sysrcd.dat")
    cd = images.iso(tmp_path / "cd.iso", tmp_path / "cd")
    sticks = []
    for name in ("other", "mine"):
        make_store(tmp_path / name / "live/sysrcd.bs")
        sticks.append(images.ext4_disk(tmp_path / f"{name}.img", tmp_path / name, 48))
    untouched = sticks[0].read_bytes()
    test = f"{GUEST}\n tell_root\n echo kept >/root/kept"
    devices = [*empty_drive("cd"), *stick(sticks[0], "other"), *stick(sticks[1], "mine")]
    with boot(f"{PLAIN} subdir=live skipmount=/dev/sda", test=test, devices=devices) as machine:
        machine.wait_for("waiting for a disk with the root image /live/sysrcd.dat")
        put_in(machine, "cd", cd)
        machine.wait()
        assert machine.said("lower").startswith(f"{CARRIER}/sr0/live/sysrcd.dat (squashfs")
        assert machine.said("store") == f"{CARRIER}/sdb/live/sysrcd.bs"
        assert machine.said("motd") == ""
        machine.shows("are unmounted cleanly")
    assert sticks[0].read_bytes() == untouched
    after = images.from_ext4(sticks[1], "/live/sysrcd.bs", tmp_path / "after.bs")
    assert (images.is_clean(after), images.is_clean(sticks[1])) == ("", "")
    assert content(after, "root/kept") == "kept\n"


@pytest.mark.nightly
def test_stick_with_its_lock_set(boot: Boot, parts: Parts, tmp_path: Path) -> None:
    """Image and store on it, in a subdirectory; and it was not unmounted: its journal waits to be replayed.

    With the lock all is seen, and nothing is kept; without, the same stick is as any other.
    """
    files = tmp_path / "files"
    (files / "live").mkdir(parents=True)
    os.link(parts.image, files / "live/sysrcd.dat")
    store = changed_store(tmp_path / "sysrcd.bs", parts.image, {"root/before": "kept"})
    shutil.copy(store, files / "live/sysrcd.bs")
    disk = images.ext4_disk(tmp_path / "disk.img", files, 96)
    run("debugfs", "-w", "-R", "feature needs_recovery", disk)
    assert images.is_clean(disk)
    untouched = disk.read_bytes()
    test = f"""{GUEST}
        tell_root
        out "before: $(cat /root/before)"
        echo now >/root/now && out "now: $(cat /root/now)"
    """
    locked = stick(disk, "mine", "readonly=on")
    with boot(f"{PLAIN} subdir=live", test=test, devices=locked).wait() as machine:
        machine.shows("root image: /live/sysrcd.dat on sda")
        assert machine.said("store") == "in memory (lost at the unmount)"
        assert (machine.said("before"), machine.said("now")) == ("kept", "now")
        assert "/live/sysrcd.bs on sda cannot be written to" in machine.said("motd")
        machine.shows("are unmounted cleanly")
    assert disk.read_bytes() == untouched

    with boot(f"{PLAIN} subdir=live", test=test, devices=stick(disk, "mine")).wait() as machine:
        assert machine.said("store") == f"{CARRIER}/sda/live/sysrcd.bs"
        assert machine.said("motd") == ""
        machine.shows("are unmounted cleanly")
    assert images.is_clean(disk) == ""
    after = images.from_ext4(disk, "/live/sysrcd.bs", tmp_path / "after.bs")
    assert images.is_clean(after) == ""
    assert content(after, "root/now") == "now\n"


@pytest.mark.nightly
def test_one_disk_of_a_mirror(boot: Boot, image_disk: Path, parts: Parts, tmp_path: Path) -> None:
    """A RAID that is not assembled: writing to one disk would make the disks differ."""
    files = tmp_path / "files"
    files.mkdir()
    store = changed_store(tmp_path / "sysrcd.bs", parts.image, {"root/before": "kept"})
    shutil.copy(store, files / "sysrcd.bs")
    disk = images.ext4_disk(tmp_path / "disk.img", files, 64)
    with disk.open("r+b") as out:
        out.truncate((64 << 20) + (64 << 10))
        out.seek((64 << 20) + (64 << 10) - 8192)
        out.write(b"\xfc\x4e\x2b\xa9")  # version 1.0: 8 KiB before the end
    untouched = disk.read_bytes()
    test = f"""{GUEST}
        tell_root
        out "before: $(cat /root/before)"
        out "found: $(cowfs find alldev | tr '\\n' ' ')"
    """
    devices = [*hard_disk(image_disk, "image"), *hard_disk(disk, "disk")]
    with boot(f"{PLAIN} backstore=alldev", test=test, devices=devices).wait() as machine:
        assert machine.said("before") == "kept"
        assert "on vdb cannot be written to (one disk of a RAID)" in machine.said("motd")
        assert "it cannot be written to: changes will be in memory" in machine.said("found")
        machine.shows("are unmounted cleanly")
    assert disk.read_bytes() == untouched


@pytest.mark.nightly
def test_what_the_kernel_cannot_read_is_said(boot: Boot, image_disk: Path, tmp_path: Path) -> None:
    """NTFS without a driver. Devices that are not supposed to be read are not reported."""
    ntfs = make_carrier(
        Kind("ntfs", stick, "sda1", "mbr", package="ntfs-3g", megabytes=32), tmp_path / "ntfs.img"
    )
    swap, locked = tmp_path / "swap.img", tmp_path / "luks.img"
    for file in (swap, locked):
        with file.open("wb") as out:
            out.truncate(32 << 20)
    run("mkswap", swap)
    with locked.open("r+b") as out:
        out.write(b"LUKS\xba\xbe\0\2")
    devices = [*hard_disk(image_disk, "image"), *stick(ntfs, "ntfs"), *hard_disk(swap, "swap")]
    devices += hard_disk(locked, "luks")
    options = f"{PLAIN} backstore=alldev,/my.bs backstore.wait=2 backstore.fallback=ram"
    with boot(options, test=f"{GUEST}\n tell_root", devices=devices).wait() as machine:
        motd = machine.said("motd")
        assert "sda1 (ntfs) cannot be read by this kernel" in motd
        assert "vdc is encrypted (LUKS): it must be opened first" in motd
        assert "vdb" not in motd and "alldev" not in motd
        machine.shows("are unmounted cleanly")


@pytest.mark.nightly
def test_sticks_that_come_and_go_while_it_is_looked_for_them(
    boot: Boot, image_disk: Path, tmp_path: Path
) -> None:
    """A stick without a store is pulled out again; then the right one comes, at the same place."""
    wrong = images.fat_stick(tmp_path / "wrong.img", {"/a": image_disk}, 80)
    right = images.fat_stick(tmp_path / "right.img", {"/my.bs": make_store(tmp_path / "s.bs")}, 64)
    devices = [*hard_disk(image_disk, "image"), *stick(wrong, "wrong"), *stick(right, "right", plugged=False)]
    options = f"{PLAIN} backstore=/my.bs backstore.wait=60"
    with boot(options, test=f"{GUEST}\n tell_root", devices=devices) as machine:
        machine.wait_for("waiting for a disk with the store /my.bs")
        unplug(machine, "wrong")
        plug(machine, "right")
        machine.wait()
        assert re.fullmatch(rf"{CARRIER}/sd[ab]1/my.bs", machine.said("store"))
        assert machine.said("motd") == ""
        machine.shows("are unmounted cleanly")
    assert [images.fat_is_clean(image) for image in (wrong, right)] == ["", ""]
