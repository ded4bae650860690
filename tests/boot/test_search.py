"""How the boot library searches disks, with a fake /sys whose disks are directories and files."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from tests.boot.images import BUSYBOX
from tests.boot.test_options import LIBRARY, Disk, System

pytestmark = pytest.mark.skipif(not BUSYBOX.exists(), reason="needs busybox-static")


@pytest.fixture
def system(tmp_path: Path) -> System:
    return System(tmp_path / "system")


# --- candidates: the files with this name on the disks


@pytest.fixture
def disks(system: System) -> System:
    """A system whose disks are directories. Mounting shows them, and records the arguments."""
    (system.top / "proc/mounts").touch()
    for name in ("sdb", "sdc", "sr0", "vda"):
        system.add(Disk(name, removable=int(name != "vda")))
        (system.top / "disks" / name).mkdir(parents=True)
    return system


LOOK = """
. {library}/cowfs-boot.sh
mount_disk() {{
    mkdir -p "$disks" && [ -e {top}/disks/"$1" ] && ln -s {top}/disks/"$1" "$disks/$1" || return
    case $1 in sr*) type=iso9660 ;; *) type=vfat ;; esac
    echo "/dev/$1 $disks/$1 $type ro 0 0" >>"$COWFS_PROC/mounts"
}}
unmount_disk() {{ rm "$disks/$1" && sed -i "\\|$disks/$1 |d" "$COWFS_PROC/mounts"; }}
image_device={image}
[ $image_device = none ] || mount_disk $image_device
patience=0
path=$subdir${{named:-/sysrcd.bs}}
begin_search
if wait_for_candidates; then
    echo "$(echo $candidates) |" $on_read_only_media | sed 's/ |$//'
else
    report_missing
    echo none
fi
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
        # writable disks come first
        ("", ["sr0/sysrcd.bs"], "sr0", " | sr0"),
        ("", ["sr0/sysrcd.bs", "sdc/sysrcd.bs"], "sr0", "sdc | sr0"),
        ("", ["sr0/sysrcd.bs", "sdc/sysrcd.bs", "sdb/sysrcd.bs"], "sdc", "sdc sdb | sr0"),
        ("", [], "", "none"),
    ],
)
def test_candidates(disks: System, line: str, files: list[str], image: str, expected: str) -> None:
    put(disks, *files)
    assert look(disks, line, image) == expected


def test_a_name_that_is_no_file_is_reported(disks: System) -> None:
    (disks.top / "disks/sdb/sysrcd.bs").mkdir()
    (disks.top / "disks/sdc/sysrcd.bs").symlink_to("elsewhere")
    assert look(disks) == "none"
    assert "/sysrcd.bs on sdb is a directory" in disks.warnings()
    assert "/sysrcd.bs on sdc is a symbolic link" in disks.warnings()


def test_a_disk_and_its_partition_are_one_store(disks: System) -> None:
    """If a partition begins at the start of its disk, both have the same filesystem."""
    disks.add(Disk("sdd", removable=1, parts=(1,)))
    put(disks, "sdd/sysrcd.bs", "sdd1/sysrcd.bs")
    assert look(disks) == "sdd1"


# --- unreadable disks

CONTENTS = {
    "ntfs": ({3: b"NTFS    "}, "sdz (ntfs) cannot be read by this kernel"),
    "exFAT": ({3: b"EXFAT   "}, "sdz (exfat) cannot be mounted: its filesystem is damaged"),
    "FAT": ({82: b"FAT32   ", 510: b"\x55\xaa"}, "sdz (vfat) cannot be mounted: its filesystem is damaged"),
    "f2fs": ({1024: b"\x10\x20\xf5\xf2"}, "sdz (f2fs) cannot be read by this kernel"),
    "btrfs": ({65600: b"_BHRfS_M"}, "sdz (btrfs) cannot be read by this kernel"),
    "ext4": ({1080: b"\x53\xef"}, "sdz (ext4) cannot be mounted: its filesystem is damaged"),
    "BitLocker": ({3: b"-FVE-FS-"}, "sdz (BitLocker) cannot be read by this kernel"),
    "a text": ({0: b"dear diary\n"}, "sdz has no known filesystem"),
    "binary": ({70: b"\xff\x00\xfe"}, "sdz has no known filesystem"),
    # and a disk that must not be read
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
    """On the console, and at the login if the store was named."""
    pieces, said = CONTENTS[what]
    system.add(Disk("sdz", removable=1, size=100_000))
    fill(system, "sdz", pieces)
    assert look(system, line) == "none"
    log = (system.top / "run/initramfs/cowfs/log").read_text()
    assert ("sdz" in log) == bool(said)
    assert said in log
    assert ("sdz" in system.warnings()) == bool(said and line)


def test_what_is_no_disk_to_be_read_is_not_told_of(system: System) -> None:
    """A partitioned disk, a small partition of unknown type, and one that was removed meanwhile."""
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
    """Versions 0.90 and 1.0, whose metadata is at the end: the disk could be mounted alone."""
    system.add(Disk("sdz", size=2048, parts=(1,)))
    fill(system, "sdz", {sector * 512: b"\xfc\x4e\x2b\xa9"})
    assert system.shell("is_raid_member sdz && echo yes || echo no") == [expected]
    assert system.shell("is_raid_member sdz1 && echo yes || echo no") == ["no"]


def test_a_medium_that_is_changed_is_looked_at(system: System) -> None:
    """The drive keeps its name; disks_now shows the change. It opens drives, to notice a new medium."""
    system.add(Disk("sr0", removable=1, size=0))
    (system.top / "sys/block/sr0/diskseq").write_text("4\n")
    autoclose = system.top / "proc/sys/dev/cdrom/autoclose"
    autoclose.parent.mkdir(parents=True)
    autoclose.write_text("1\n")
    os.mkfifo(system.top / "dev/sr0")
    put_in = f"until grep -q 0 {autoclose}; do usleep 1000; done; : >{system.top}/dev/sr0; echo opened"
    assert system.shell(f"( {put_in} ) & disks_now; look_into_drives; wait") == ["sr0 4 0", "opened"]
    assert autoclose.read_text() == "1\n", "a drive that is open did not close, and may again"
    before = system.shell("disks_now")
    (system.top / "sys/block/sr0/diskseq").write_text("5\n")
    now = system.shell("disks_now")
    assert now != before
    system.add(Disk("loop0"))
    assert system.shell("disks_now") == now, "it is used while stores are tried"


# --- disks that disappear during the search

GOING = """
. {library}/cowfs-boot.sh
mount_disk() {{
    case $1:$2 in
    {gone}) return 1 ;;
    esac
    mkdir -p "$disks" && [ -e {top}/disks/"$1" ] && ln -s {top}/disks/"$1" "$disks/$1" && mounted_as=$2
}}
unmount_disk() {{ rm "$disks/$1"; }}
serve() {{ echo "$1"; }}
bind_into_world() {{ :; }}
world=/nowhere patience=0
{command}
"""


def test_an_image_on_a_disk_that_vanishes_is_looked_for_on_others(disks: System) -> None:
    put(disks, "sdb/sysrcd.dat", "sdc/sysrcd.dat")
    command = 'find_image; echo "$image_device $image_mode $(ls "$disks")"'
    script = GOING.format(library=LIBRARY, top=disks.top, gone="sdb:ro", command=command)
    assert disks.shell(script) == ["sdc ro sdc"]


def test_a_store_on_a_disk_that_vanishes_is_told_of(disks: System) -> None:
    put(disks, "sdb/sysrcd.bs", "sdc/sysrcd.bs")
    (disks.top / "proc/mounts").write_text(f"/dev/sdc {disks.top}/run/initramfs/cowfs/disk/sdc vfat rw 0 0\n")
    command = "image_device=none image_mode=look path=/sysrcd.bs; use_store"
    script = GOING.format(library=LIBRARY, top=disks.top, gone="sdb:rw | sdb:ro", command=command)
    assert disks.shell(script) == [f"{disks.top}/run/initramfs/cowfs/disk/sdc/sysrcd.bs"]
    assert "sdb cannot be mounted any more: the store on it is not used" in disks.warnings()


def test_a_stick_that_comes_after_one_was_refused_is_tried_as_well(disks: System) -> None:
    put(disks, "sdb/sysrcd.bs", "sdc/sysrcd.bs")
    block = disks.top / "sys/block"
    (block / "sdc").rename(disks.top / "sdc")
    command = f"""
        serve() {{
            echo "$1"
            case $1 in */sdb/*) mv {disks.top}/sdc {block}; return 1 ;; esac
        }}
        sleep() {{ :; }}
        image_device=none image_mode=look path=/sysrcd.bs patience=3; use_store"""
    script = GOING.format(library=LIBRARY, top=disks.top, gone="-", command=command)
    served = [Path(line).parent.name for line in disks.shell(script)]
    assert served == ["sdb", "sdc"]
    assert "the store /sysrcd.bs on sdb is not used" in disks.warnings()


# --- disks that appear during the search

COMING = """
. {library}/cowfs-boot.sh
mount_disk() {{ mkdir -p "$disks" && [ -e {top}/disks/"$1" ] && ln -s {top}/disks/"$1" "$disks/$1"; }}
unmount_disk() {{ rm "$disks/$1"; }}
open_disk() {{ mount_disk "$1" && store_mode=rw; }}
close_disk() {{ rm -f "$disks/$1"; }}
bind_into_world() {{ :; }}
serve() {{ : >"$top/refused"; grep -q good "$1" || {{ echo bad >"$top/refused"; return 1; }}; }}
disk_is_coming() {{ {coming}; }}
sleep() {{ [ $waited != 2 ] || [ -e "$COWFS_SYS/block/sda" ] || mv {top}/sda "$COWFS_SYS/block/"; }}
image_device=none
path=/sysrcd.bs image_mode=look
use_store && echo "$device $waited" || echo "none $waited"
"""


@pytest.mark.parametrize(
    ("early", "coming", "expected"),
    [
        ("bad", "false", "sda 3"),  # it is refused, and the good one comes in time
        ("good", "false", "sdb 0"),
        ("good", "! [ -e $COWFS_SYS/block/sda ]", "sda 3"),  # the kernel already knows of a new disk
        ("good", "true", "sda 3"),  # it waits no longer than its limit
    ],
)
def test_a_disk_that_comes_later(disks: System, early: str, coming: str, expected: str) -> None:
    disks.add(Disk("sda", removable=1))
    (disks.top / "sys/block/sda").rename(disks.top / "sda")
    put(disks, "sda/sysrcd.bs", "sdb/sysrcd.bs")
    (disks.top / "disks/sda/sysrcd.bs").write_text("good")
    (disks.top / "disks/sdb/sysrcd.bs").write_text(early)
    script = COMING.format(library=LIBRARY, top=disks.top, coming=coming)
    assert disks.shell(script) == [expected]
    assert ("the store /sysrcd.bs on sdb is not used: bad" in disks.warnings()) == (early == "bad")


def test_a_store_that_is_refused_is_not_waited_for_for_ever(disks: System) -> None:
    put(disks, "sdb/sysrcd.bs")
    (disks.top / "sda").mkdir()
    script = COMING.format(library=LIBRARY, top=disks.top, coming="false").replace("sda", "sdq")
    assert disks.shell(script.replace("mv ", "true ")) == ["none 3"]
    assert "no store" not in (disks.top / "run/initramfs/cowfs/log").read_text()
