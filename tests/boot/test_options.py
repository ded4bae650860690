"""The meaning of the boot options, and the devices they select: the boot library with fake /sys and /proc."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.boot.images import BUSYBOX, HELPERS
from tests.support.system import run

pytestmark = pytest.mark.skipif(not BUSYBOX.exists(), reason="needs busybox-static")

LIBRARY = HELPERS / "boot"


@dataclass
class Disk:
    """A disk in /sys/block."""

    name: str
    removable: int = 0
    parts: tuple[int, ...] = ()
    bus: str = "pci0000:00/0000:00:1f.2/ata1"
    size: int = 1000
    type: str = ""
    holders: tuple[str, ...] = ()
    """``of:by``: the device ``by`` is on the partition (or disk) ``of``."""
    slaves: tuple[str, ...] = ()
    mapping: str = ""
    """The name of a device-mapper device."""
    suspended: int = 0


@dataclass
class System:
    """A fake system for the boot library."""

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
            of, _, by = holder.partition(":")
            target = place if of == disk.name else place / of
            (target / "holders" / by).symlink_to(f"../../{by}")
        for slave in disk.slaves:
            (found,) = [path for path in self.top.glob(f"sys/devices/**/{slave}") if path.is_dir()]
            (place / "slaves" / slave).symlink_to(found)
        (self.top / "sys/block" / disk.name).symlink_to(place)

    def shell(self, command: str, line: str = "", library: str = "cowfs-options.sh") -> list[str]:
        """Run a command after the library, with this kernel command line; return the lines it prints."""
        (self.top / "proc/cmdline").write_bytes(os.fsencode(line + "\n"))
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
    # spaces and other letters, with quotes in the places where boot loaders and people put them
    'backstore="/my stores/größe 日本.bs"': "removable|/my stores/größe 日本.bs|shell|20",
    '"backstore=alldev,/a b.bs" quiet': "all|/a b.bs|shell|20",
    "backstore=/a;reboot": "removable|/a;reboot|shell|20",
    "backstore=/$(reboot)`x`*": "removable|/$(reboot)`x`*|shell|20",
    # the last value wins
    "backstore=/a.bs backstore=off": "off||ram|3",
    "backstore=off backstore=alldev": "all||ram|3",
    # the behaviour without a store
    "backstore.fallback=fail": "removable||fail|3",
    "backstore.fallback=shell": "removable||shell|3",
    "backstore=/a.bs backstore.fallback=ram": "removable|/a.bs|ram|20",
    "backstore.fallback=fail backstore=/a.bs": "removable|/a.bs|fail|20",
    "backstore.wait=0": "removable||ram|0",
    "backstore=/a.bs backstore.wait=600": "removable|/a.bs|shell|600",
    # options of other programs
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
    "backstore=\x1b]0;owned\x07": ("removable||ram|3", "?]0;owned? is not understood"),
    "backstore=a\udc9b2Jb\x9b31m": ("removable||ram|3", "a?2Jb??31m is not understood"),
    "backstore=ü\u202eÛ中\U0001f600\udcc3\udcf0": ("removable||ram|3", "ü???Û中😀?? is not understood"),
    "backstore=\udcc0\udc9b\udce0\udc82\udc9bx": ("removable||ram|3", "?????x is not understood"),
    'backstore="/never closed': ("removable|/never closed|shell|20", ""),
}


@pytest.mark.parametrize("line", GARBAGE)
def test_garbage_is_told_of_and_ignored(system: System, line: str) -> None:
    meaning, warning = GARBAGE[line]
    assert system.shell(SHOW, line) == [meaning]
    assert warning in system.warnings()
    assert bool(system.warnings()) == bool(warning)
    assert set(filter(str.isprintable, system.warnings())) | {"\n"} >= set(system.warnings())


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
        ("cowfs.image=//live//a.sfs", "|/live/a.sfs"),
        ("cowfs.image=/../../etc/passwd", "|/sysrcd.dat"),
        ("cowfs.image=/live/../../x", "|/sysrcd.dat"),
        ("cowfs.image=/live/", "|/sysrcd.dat"),
    ],
)
def test_where_the_image_is(system: System, line: str, expected: str) -> None:
    assert system.shell('echo "$subdir|$image"', line) == [expected]
    assert bool(system.warnings()) == (".." in line or line.endswith(("relative", "live/")))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", ""),
        ("cowfs.subdir=rescue-11.0", "rescue-11.0"),
        ("cowfs.subdir=a subdir=b cowfs.subdir=c", "c"),
        ("cowfs.subdir=../x", ""),
        ("cowfs.subdir=", ""),
        ("cowfs.subdir=-x", ""),
        ('cowfs.subdir="a b"', ""),
    ],
)
def test_which_store_in_the_store(system: System, line: str, expected: str) -> None:
    assert system.shell('echo "$system"', line) == [expected]
    assert bool(system.warnings()) == (bool(line) and not expected)


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


# --- requests by io_uring


@pytest.mark.parametrize(
    ("line", "before", "after"),
    [
        ("boot=cowfs", "N\n", "Y\n"),
        ("boot=cowfs", None, None),
        ("fuse.enable_uring=N boot=cowfs", "N\n", "N\n"),
        ("boot=cowfs fuse.enable_uring=1", "Y\n", "Y\n"),
    ],
)
def test_the_kernel_is_made_to_offer_io_uring(
    system: System, line: str, before: str | None, after: str | None
) -> None:
    switch = system.top / "sys/module/fuse/parameters/enable_uring"
    if before is not None:
        switch.parent.mkdir(parents=True)
        switch.write_text(before)
    system.shell(f". {LIBRARY}/cowfs-boot.sh\noffer_io_uring", line)
    assert (switch.read_text() if switch.exists() else None) == after
