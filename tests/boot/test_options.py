"""What the boot options mean, and which devices they choose: the boot library on a made-up /sys and /proc."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.boot.images import BUSYBOX, HELPERS
from tests.support.system import run

pytestmark = pytest.mark.skipif(not BUSYBOX.exists(), reason="needs busybox-static")

LIBRARY = HELPERS / "boot"


@dataclass
class Disk:
    """A disk as /sys/block shows it."""

    name: str
    removable: int = 0
    parts: tuple[int, ...] = ()
    bus: str = "pci0000:00/0000:00:1f.2/ata1"
    size: int = 1000
    type: str = ""
    holders: tuple[str, ...] = ()
    """``of:by``: the device ``by`` stands on the partition (or disk) ``of``."""
    slaves: tuple[str, ...] = ()
    mapping: str = ""
    """The name of a device-mapper device."""
    suspended: int = 0


@dataclass
class System:
    """A made-up system for the boot library to look at."""

    top: Path
    disks: list[Disk] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("sys/block", "sys/bus/usb/devices", "dev", "proc", "run/initramfs/cowfs"):
            (self.top / name).mkdir(parents=True)
        for disk in self.disks:
            self.add(disk)

    def add(self, disk: Disk) -> None:
        place = self.top / "sys/devices" / disk.bus / "block" / disk.name
        separator = "p" if disk.name[-1].isdigit() else ""
        for part in disk.parts:
            below = place / f"{disk.name}{separator}{part}"
            (below / "holders").mkdir(parents=True)
            (below / "partition").write_text(f"{part}\n")
            (below / "size").write_text("500\n")
        (place / "holders").mkdir(parents=True, exist_ok=True)
        (place / "slaves").mkdir()
        (place / "removable").write_text(f"{disk.removable}\n")
        (place / "size").write_text(f"{disk.size}\n")
        if disk.type:
            (place / "device").mkdir()
            (place / "device/type").write_text(f"{disk.type}\n")
        if disk.mapping:
            (place / "dm").mkdir()
            (place / "dm/name").write_text(f"{disk.mapping}\n")
            (place / "dm/suspended").write_text(f"{disk.suspended}\n")
        for holder in disk.holders:
            below, _, by = holder.partition(":")
            target = place if below == disk.name else place / below
            (target / "holders" / by).symlink_to(f"../../{by}")
        for slave in disk.slaves:
            (found,) = [path for path in self.top.glob(f"sys/devices/**/{slave}") if path.is_dir()]
            (place / "slaves" / slave).symlink_to(found)
        (self.top / "sys/block" / disk.name).symlink_to(place)

    def shell(self, command: str, line: str = "", library: str = "cowfs-options.sh") -> list[str]:
        """Run a command after the library, on this command line of the kernel; the lines that it prints."""
        (self.top / "proc/cmdline").write_text(line + "\n")
        script = f". {LIBRARY}/cowfs-options.sh\nread_options\n{command}"
        environment = {
            f"COWFS_{name.upper()}": str(self.top / name) for name in ("sys", "dev", "proc", "run")
        }
        done = run(BUSYBOX, "sh", "-uc", script, env={**os.environ, **environment})
        assert not done.stderr, done.stderr
        return done.stdout.splitlines()

    def warnings(self) -> str:
        place = self.top / "run/motd.d/cowfs"
        return place.read_text() if place.exists() else ""


@pytest.fixture
def system(tmp_path: Path) -> System:
    return System(tmp_path / "system")


# --- the options

SHOW = 'printf "%s|%s|%s|%s\\n" "$scope" "$named" "$fallback" "$patience"'

OPTIONS = {
    "": "removable||ram|3",
    "quiet root=/dev/ram0 init=/bin/sh": "removable||ram|3",
    "backstore=": "removable||ram|3",
    "backstore=off": "off||ram|3",
    "backstore=alldev": "all||ram|3",
    "backstore=/my.bs": "removable|/my.bs|shell|20",
    "backstore=/a/b/c.bs": "removable|/a/b/c.bs|shell|20",
    "backstore=alldev,/my.bs": "all|/my.bs|shell|20",
    "backstore=/my.bs,alldev": "all|/my.bs|shell|20",
    "backstore=,alldev,,": "all||ram|3",
    "backstore=//a///b.bs": "removable|/a/b.bs|shell|20",
    # spaces and other letters; the quotes are where boot loaders and people put them
    'backstore="/my stores/größe 日本.bs"': "removable|/my stores/größe 日本.bs|shell|20",
    '"backstore=alldev,/a b.bs" quiet': "all|/a b.bs|shell|20",
    "backstore=/a;reboot": "removable|/a;reboot|shell|20",
    "backstore=/$(reboot)`x`*": "removable|/$(reboot)`x`*|shell|20",
    # the last one counts
    "backstore=/a.bs backstore=off": "off||ram|3",
    "backstore=off backstore=alldev": "all||ram|3",
    # what happens without a store
    "backstore.fallback=fail": "removable||fail|3",
    "backstore.fallback=shell": "removable||shell|3",
    "backstore=/a.bs backstore.fallback=ram": "removable|/a.bs|ram|20",
    "backstore.fallback=fail backstore=/a.bs": "removable|/a.bs|fail|20",
    "backstore.wait=0": "removable||ram|0",
    "backstore=/a.bs backstore.wait=600": "removable|/a.bs|shell|600",
    # other programs' options
    "mybackstore=off rd.backstore=off backstores=off": "removable||ram|3",
}


@pytest.mark.parametrize("line", OPTIONS)
def test_options_mean(system: System, line: str) -> None:
    assert system.shell(SHOW, line) == [OPTIONS[line]]
    assert system.warnings() == ""


GARBAGE = {
    "backstore=nonsense": ("removable||ram|3", "nonsense is not understood"),
    "backstore=alldev,sysrcd.bs": ("all||ram|3", "sysrcd.bs is not understood"),
    "backstore=OFF": ("removable||ram|3", "OFF is not understood"),
    "backstore=/": ("removable||ram|3", "/ cannot be the path of a store"),
    "backstore=/dir/": ("removable||ram|3", "/dir/ cannot be"),
    "backstore=/../etc/passwd": ("removable||ram|3", "/../etc/passwd cannot be"),
    "backstore=/a/./b": ("removable||ram|3", "/a/./b cannot be"),
    "backstore=/a.bs,/b.bs": ("removable|/a.bs|shell|20", "/b.bs is ignored"),
    "backstore=off,/a.bs": ("off||ram|3", "exclude each other"),
    "backstore=/a.bs,off,alldev": ("off||ram|3", "exclude each other"),
    "backstore.fallback=maybe": ("removable||ram|3", "backstore.fallback=maybe is not understood"),
    "backstore.fallback=": ("removable||ram|3", "is not understood"),
    "backstore.wait=soon": ("removable||ram|3", "backstore.wait=soon is not a number"),
    "backstore.wait=-1": ("removable||ram|3", "is not a number"),
    "backstore.wait=99999": ("removable||ram|3", "is not a number"),
    "backstore=\x01\x7f%s%n": ("removable||ram|3", "is not understood"),
    'backstore="/never closed': ("removable|/never closed|shell|20", ""),
}


@pytest.mark.parametrize("line", GARBAGE)
def test_garbage_is_told_of_and_ignored(system: System, line: str) -> None:
    meaning, warning = GARBAGE[line]
    assert system.shell(SHOW, line) == [meaning]
    assert warning in system.warnings()
    assert bool(system.warnings()) == bool(warning)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "|/sysrcd.dat"),
        ("subdir=live", "/live|/sysrcd.dat"),
        ("subdir=/a/b/", "/a/b|/sysrcd.dat"),
        ("subdir=/", "|/sysrcd.dat"),
        ('subdir="my system"', "/my system|/sysrcd.dat"),
        ("subdir=../x", "|/sysrcd.dat"),
        ("cowfs.image=/live/filesystem.squashfs", "|/live/filesystem.squashfs"),
        ("cowfs.image=relative", "|/sysrcd.dat"),
    ],
)
def test_where_the_image_is(system: System, line: str, expected: str) -> None:
    assert system.shell('echo "$subdir|$image"', line) == [expected]
    assert bool(system.warnings()) == (".." in line or "relative" in line)


def test_warnings_are_on_the_console_too(system: System) -> None:
    (system.top / "dev/console").touch()
    system.shell(":", "backstore=nonsense")
    assert "cowfs: WARNING: backstore=: nonsense" in (system.top / "dev/console").read_text()


def test_a_warning_is_shown_once_at_the_login(system: System) -> None:
    system.shell("warn 'a [b] *'; warn 'a [b]'; warn 'a [b] *'")
    assert system.warnings() == "cowfs: a [b] *\ncowfs: a [b]\n"


# --- the devices

USB = "pci0000:00/0000:00:14.0/usb2/2-1/2-1:1.0/host6/target6:0:0/6:0:0:0"
STICK = Disk("sdb", removable=1, parts=(1, 2), bus=USB)
HARD = Disk("sda", parts=(1, 2, 10))
DEVICES = {
    "a stick": ([STICK], "sdb1 sdb2 sdb", "sdb1 sdb2 sdb"),
    "a stick without partitions": ([Disk("sdb", removable=1, bus=USB)], "sdb", "sdb"),
    "a hard disk, its partitions by number": ([HARD], "", "sda1 sda2 sda10 sda"),
    "a hard disk behind USB": ([Disk("sdc", bus=USB, parts=(1,))], "sdc1 sdc", "sdc1 sdc"),
    "both, by name": ([STICK, HARD], "sdb1 sdb2 sdb", "sda1 sda2 sda10 sda sdb1 sdb2 sdb"),
    "NVMe": ([Disk("nvme0n1", parts=(1, 2))], "", "nvme0n1p1 nvme0n1p2 nvme0n1"),
    "virtio": ([Disk("vda", parts=(1,)), Disk("vdb")], "", "vda1 vda vdb"),
    "an SD card": ([Disk("mmcblk0", parts=(1,), type="SD")], "mmcblk0p1 mmcblk0", "mmcblk0p1 mmcblk0"),
    "memory that is soldered in": ([Disk("mmcblk1", type="MMC", parts=(1,))], "", "mmcblk1p1 mmcblk1"),
    "a disc": ([Disk("sr0", removable=1)], "sr0", "sr0"),
    "a drive without a disc, a reader without a card": (
        [Disk("sr0", removable=1, size=0), Disk("sdd", removable=1, size=0, bus=USB)], "", "",
    ),
    "a controller with a name of its own": ([Disk("cciss!c0d0", parts=(1,))], "", "cciss!c0d0p1 cciss!c0d0"),
    "what is no disk": (
        [Disk("loop0", parts=(1,)), Disk("ram0"), Disk("zram0"), Disk("fd0", removable=1)], "", "",
    ),
    "device-mapper on a hard disk": (
        [Disk("sda", parts=(1, 2), holders=("sda2:dm-0",)), Disk("dm-0", bus="virtual", slaves=("sda2",))],
        "", "dm-0 sda1 sda",
    ),
    "device-mapper on a stick": (
        [Disk("sdb", removable=1, parts=(1,), bus=USB, holders=("sdb1:dm-0",)),
         Disk("dm-0", bus="virtual", slaves=("sdb1",))],
        "dm-0 sdb", "dm-0 sdb",
    ),
    "device-mapper on device-mapper on a stick": (
        [Disk("sdb", removable=1, bus=USB, holders=("sdb:dm-0",)),
         Disk("dm-0", bus="virtual", slaves=("sdb",), holders=("dm-0:dm-1",)),
         Disk("dm-1", bus="virtual", slaves=("dm-0",))],
        "dm-1", "dm-1",
    ),
    "device-mapper that does not answer": (
        [Disk("dm-0", bus="virtual", mapping="x", suspended=1), Disk("dm-1", bus="virtual", mapping="y")],
        "", "dm-1",
    ),
    "RAID": (
        [Disk("sda", holders=("sda:md0",)), Disk("sdb", holders=("sdb:md0",)),
         Disk("md0", bus="virtual", slaves=("sda", "sdb"))],
        "", "md0",
    ),
    "nothing": ([], "", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", DEVICES)
@pytest.mark.parametrize("scope", ["removable", "all"])
def test_devices(tmp_path: Path, case: str, scope: str) -> None:
    disks, removable, everything = DEVICES[case]
    system = System(tmp_path / "system", disks)
    expected = removable if scope == "removable" else everything
    assert system.shell(f"devices {scope}") == expected.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("skipmount=/dev/sdb1", "sda1 sda2 sda10 sda sdb2 sdb"),
        ("skipmount=/dev/sda", "sdb1 sdb2 sdb"),
        ("skipmount=sda", "sdb1 sdb2 sdb"),
        ("skipmount=/dev/sda1,/dev/sdb", "sda2 sda10 sda"),
        ("skipmount=/dev/sda1 skipmount=/dev/sdb", "sda2 sda10 sda"),
        ("skipmount=/dev/sd", "sda1 sda2 sda10 sda sdb1 sdb2 sdb"),
        ("skipmount=", "sda1 sda2 sda10 sda sdb1 sdb2 sdb"),
    ],
)
def test_devices_that_are_left_alone(tmp_path: Path, line: str, expected: str) -> None:
    system = System(tmp_path / "system", [HARD, STICK])
    assert system.shell("devices all", line) == expected.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("skipmount=/dev/cciss/c0d0", "dm-0 dm-1"),
        ("skipmount=/dev/cciss/c0d0p1,/dev/mapper/my-disk", "cciss!c0d0 dm-1"),
        ("skipmount=/dev/dm-1", "cciss!c0d0p1 cciss!c0d0 dm-0"),
    ],
)
def test_names_with_a_slash_are_left_alone(tmp_path: Path, line: str, expected: str) -> None:
    mapped = [
        Disk(f"dm-{number}", bus="virtual", mapping=name) for number, name in enumerate(("my-disk", "x"))
    ]
    system = System(tmp_path / "system", [Disk("cciss!c0d0", parts=(1,)), *mapped])
    assert system.shell("devices all", line) == expected.split()


def test_a_node_may_be_in_a_directory(system: System) -> None:
    assert system.shell("node 'cciss!c0d0p1'") == [f"{system.top}/dev/cciss/c0d0p1"]


def test_a_stick_that_is_still_starting_is_waited_for(system: System) -> None:
    coming = "disk_is_coming && echo coming || echo no"
    assert system.shell(coming) == ["no"]
    interface = system.top / "sys/bus/usb/devices/2-1:1.0"
    interface.mkdir()
    (interface / "bInterfaceClass").write_text("03\n")
    assert system.shell(coming) == ["no"]  # a keyboard
    (interface / "bInterfaceClass").write_text("08\n")
    assert system.shell(coming) == ["coming"]
    (interface / "host6/target6:0:0/6:0:0:0/block/sdb").mkdir(parents=True)
    assert system.shell(coming) == ["no"]  # it is there


# --- candidates: what is by that name on the carriers


@pytest.fixture
def carriers(system: System) -> System:
    """A system whose carriers are directories: mounting shows them, and notes how it was asked for."""
    for name in ("sdb", "sdc", "vda"):
        system.add(Disk(name, removable=int(name != "vda")))
        (system.top / "disks" / name).mkdir(parents=True)
    return system


LOOK = """
. {library}/cowfs-boot.sh
mount_carrier() {{ mkdir -p "$disks" && [ -e {top}/disks/"$1" ] && ln -s {top}/disks/"$1" "$disks/$1"; }}
unmount_carrier() {{ rm "$disks/$1"; }}
image_device={image}
[ $image_device = none ] || mount_carrier $image_device
patience=0
path=$subdir${{named:-/sysrcd.bs}}
if wait_for_candidates "$path"; then echo $candidates; else tell_missing "$path"; echo none; fi
"""


def look(system: System, line: str = "", image: str = "none") -> str:
    (system.top / "dev/console").touch()
    shutil.rmtree(system.top / "run/initramfs/cowfs/disk", ignore_errors=True)
    return system.shell(LOOK.format(library=LIBRARY, top=system.top, image=image or "none"), line)[-1]


def put(system: System, *names: str) -> None:
    for name in names:
        path = system.top / "disks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"store")


@pytest.mark.parametrize(
    ("line", "files", "image", "expected"),
    [
        ("", ["sdb/sysrcd.bs"], "", "sdb"),
        ("", ["sdc/sysrcd.bs", "sdb/sysrcd.bs"], "", "sdb sdc"),
        ("", ["sdc/sysrcd.bs", "sdb/sysrcd.bs"], "sdc", "sdc sdb"),
        ("", ["vda/sysrcd.bs"], "", "none"),
        ("", ["vda/sysrcd.bs"], "vda", "none"),
        ("backstore=alldev", ["vda/sysrcd.bs"], "vda", "vda"),
        ("backstore=alldev", ["vda/sysrcd.bs", "sdb/sysrcd.bs"], "", "sdb vda"),
        ("backstore=alldev skipmount=/dev/vda", ["vda/sysrcd.bs"], "", "none"),
        ("backstore=/my.bs", ["sdb/sysrcd.bs", "sdc/my.bs"], "", "sdc"),
        ("backstore=/my.bs", ["vda/my.bs"], "", "none"),
        ("backstore=alldev,/d/my.bs", ["vda/d/my.bs"], "", "vda"),
        ('backstore="/a b/ö.bs"', ["sdb/a b/ö.bs"], "", "sdb"),
        ("subdir=live", ["sdb/sysrcd.bs", "sdc/live/sysrcd.bs"], "", "sdc"),
        ("subdir=live backstore=/x.bs", ["sdb/x.bs", "sdc/live/x.bs"], "", "sdc"),
        ("", ["sdb/SYSRCD.BS", "sdc/dir/sysrcd.bs"], "", "none"),
        ("", [], "", "none"),
    ],
)
def test_candidates(carriers: System, line: str, files: list[str], image: str, expected: str) -> None:
    put(carriers, *files)
    assert look(carriers, line, image) == expected


def test_what_is_no_file_is_told_of(carriers: System) -> None:
    (carriers.top / "disks/sdb/sysrcd.bs").mkdir()
    (carriers.top / "disks/sdc/sysrcd.bs").symlink_to("elsewhere")
    assert look(carriers) == "none"
    assert "/sysrcd.bs on sdb is a directory" in carriers.warnings()
    assert "/sysrcd.bs on sdc is a symbolic link" in carriers.warnings()


def test_a_disk_and_its_partition_are_one_store(carriers: System) -> None:
    """Where a partition begins at the start of its disk, both have the same filesystem."""
    carriers.add(Disk("sdd", removable=1, parts=(1,)))
    put(carriers, "sdd/sysrcd.bs", "sdd1/sysrcd.bs")
    assert look(carriers) == "sdd1"


# --- what cannot be read

CONTENTS = {
    "ntfs": ({3: b"NTFS    "}, "sdz (ntfs) cannot be read by this kernel"),
    "exFAT": ({3: b"EXFAT   "}, "sdz (exfat) cannot be mounted: its filesystem is damaged"),
    "FAT": ({82: b"FAT32   ", 510: b"\x55\xaa"}, "sdz (vfat) cannot be mounted: its filesystem is damaged"),
    "f2fs": ({1024: b"\x10\x20\xf5\xf2"}, "sdz (f2fs) cannot be read by this kernel"),
    "btrfs": ({65600: b"_BHRfS_M"}, "sdz (btrfs) cannot be read by this kernel"),
    "ext4": ({1080: b"\x53\xef"}, "sdz (ext4) cannot be mounted: its filesystem is damaged"),
    "BitLocker": ({3: b"-FVE-FS-"}, "sdz (BitLocker) cannot be read by this kernel"),
    "a text": ({0: b"dear diary\n"}, "sdz holds nothing that is known here"),
    "binary": ({70: b"\xff\x00\xfe"}, "sdz holds nothing that is known here"),
    # and what is not to be read
    "swap": ({4086: b"SWAPSPACE2"}, ""),
    "LVM": ({512: b"LABELONE"}, ""),
    "RAID": ({4096: b"\xfc\x4e\x2b\xa9"}, ""),
    "nothing": ({}, ""),
}


def fill(system: System, name: str, pieces: dict[int, bytes]) -> None:
    with (system.top / "dev" / name).open("wb") as disk:
        disk.truncate(1 << 20)
        for offset, piece in pieces.items():
            disk.seek(offset)
            disk.write(piece)
    (system.top / "proc/filesystems").write_text("nodev\tsysfs\n\text4\n\tvfat\n\texfat\n")


@pytest.mark.parametrize("what", CONTENTS)
@pytest.mark.parametrize("line", ["", "backstore=/my.bs"])
def test_what_cannot_be_read_is_said(system: System, what: str, line: str) -> None:
    """On the console; and at the login, if the store was named."""
    pieces, said = CONTENTS[what]
    system.add(Disk("sdz", removable=1, size=100_000))
    fill(system, "sdz", pieces)
    assert look(system, line) == "none"
    log = (system.top / "run/initramfs/cowfs/log").read_text()
    assert ("sdz" in log) == bool(said)
    assert said in log
    assert ("sdz" in system.warnings()) == bool(said and line)


def test_what_is_no_disk_to_be_read_is_not_told_of(system: System) -> None:
    """A divided disk, a small partition of unknown use, and one that was removed meanwhile."""
    system.add(Disk("sdx", removable=1, parts=(1,), size=100_000))
    system.add(Disk("sdy", removable=1, size=2048))
    for name in ("sdx", "sdx1", "sdy"):
        fill(system, name, {0: b"unknown"})
    fill(system, "sdx1", {3: b"NTFS    "})
    assert look(system) == "none"
    log = (system.top / "run/initramfs/cowfs/log").read_text()
    assert re.findall("sd[xyz]1?", log) == ["sdx1"]


def test_an_encrypted_disk_is_told_of_if_a_store_was_named(system: System) -> None:
    system.add(Disk("sdz", removable=1, size=100_000))
    fill(system, "sdz", {0: b"LUKS\xba\xbe"})
    look(system)
    assert "sdz" not in (system.top / "run/initramfs/cowfs/log").read_text()
    look(system, "backstore=/my.bs")
    assert "sdz is encrypted (LUKS): it must be opened first" in system.warnings()


def test_a_disk_that_cannot_be_read_at_all(system: System) -> None:
    system.add(Disk("sdz", removable=1, size=100_000))
    look(system)
    assert (
        "sdz cannot be read: no disk is in it, or it is damaged"
        in (system.top / "run/initramfs/cowfs/log").read_text()
    )


@pytest.mark.parametrize(
    ("sector", "expected"), [(1920, "yes"), (2032, "yes"), (1921, "no"), (0, "no"), (8, "no")]
)
def test_one_disk_of_a_raid_is_known(system: System, sector: int, expected: str) -> None:
    """Versions 0.90 and 1.0, whose mark is at the end: what is before it could be mounted alone."""
    system.add(Disk("sdz", size=2048, parts=(1,)))
    fill(system, "sdz", {sector * 512: b"\xfc\x4e\x2b\xa9"})
    assert system.shell("is_raid_member sdz && echo yes || echo no") == [expected]
    assert system.shell("is_raid_member sdz1 && echo yes || echo no") == ["no"]


def test_a_medium_that_is_changed_is_looked_at(system: System) -> None:
    """The drive has the same name; disks_now tells. Drives are opened, or nobody would know of the change."""
    system.add(Disk("sr0", removable=1, size=0))
    (system.top / "sys/block/sr0/diskseq").write_text("4\n")
    autoclose = system.top / "proc/sys/dev/cdrom/autoclose"
    autoclose.parent.mkdir(parents=True)
    autoclose.write_text("1\n")
    os.mkfifo(system.top / "dev/sr0")
    put_in = f"until grep -q 0 {autoclose}; do usleep 1000; done; : >{system.top}/dev/sr0; echo opened"
    assert system.shell(f"( {put_in} ) & disks_now; look_into_drives; wait") == ["4", "0", "opened"]
    assert autoclose.read_text() == "1\n", "a drive that is open did not close, and may again"
    before = system.shell("disks_now")
    (system.top / "sys/block/sr0/diskseq").write_text("5\n")
    assert system.shell("disks_now") != before


# --- disks that go away while they are looked at

GOING = """
. {library}/cowfs-boot.sh
mount_carrier() {{
    case $1:$2 in
    {gone}) return 1 ;;
    esac
    mkdir -p "$disks" && [ -e {top}/disks/"$1" ] && ln -s {top}/disks/"$1" "$disks/$1" && mounted_as=$2
}}
unmount_carrier() {{ rm "$disks/$1"; }}
serve() {{ echo "$1"; }}
bind_into_world() {{ :; }}
world=/nowhere patience=0
{command}
"""


def test_an_image_on_a_disk_that_vanishes_is_looked_for_on_others(carriers: System) -> None:
    put(carriers, "sdb/sysrcd.dat", "sdc/sysrcd.dat")
    command = 'find_image; echo "$image_device $image_mode $(ls "$disks")"'
    script = GOING.format(library=LIBRARY, top=carriers.top, gone="sdb:ro", command=command)
    assert carriers.shell(script) == ["sdc ro sdc"]


def test_a_store_on_a_disk_that_vanishes_is_told_of(carriers: System) -> None:
    put(carriers, "sdb/sysrcd.bs", "sdc/sysrcd.bs")
    (carriers.top / "proc/mounts").write_text(
        f"/dev/sdc {carriers.top}/run/initramfs/cowfs/disk/sdc vfat rw 0 0\n"
    )
    command = "image_device=none image_mode=look; use_store /sysrcd.bs"
    script = GOING.format(library=LIBRARY, top=carriers.top, gone="sdb:rw | sdb:ro", command=command)
    assert carriers.shell(script) == [f"{carriers.top}/run/initramfs/cowfs/disk/sdc/sysrcd.bs"]
    assert "sdb cannot be mounted any more: the store on it is not used" in carriers.warnings()
