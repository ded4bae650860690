"""Virtual machines that boot from cowfs find the store, lose nothing, and shut down cleanly."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.boot import images
from tests.boot.conftest import Parts
from tests.boot.machine import Machine, disc, hard_disk, plug, stick
from tests.support.mounts import cowfs, eventually, mounted
from tests.support.system import needs_root, run

pytestmark = [needs_root, pytest.mark.slow, pytest.mark.timeout(900)]

Boot = Callable[..., Machine]
GUEST = Path(__file__).with_name("guest.sh").read_text()
CARRIER = "/run/initramfs/cowfs/disk"
PLAIN = "init=/sbin/testinit"
"""Process 1 is the test itself, and hands over to the shutdown like systemd."""


def make_store(path: Path, megabytes: int = 32) -> Path:
    cowfs("create", path, str(megabytes), check=True)
    return path


def changed_store(path: Path, lower: Path, changes: Mapping[str, str | None]) -> Path:
    """Make a store that was used on this machine: some files were written, others deleted."""
    make_store(path)
    with mounted(lower, path.with_suffix(".mnt"), path) as here:
        for name, content in changes.items():
            if content is None:
                (here.path / name).unlink()
            else:
                (here.path / name).write_text(content)
    return path


def content(store: Path, name: str) -> str:
    """Return the content of a file in an unmounted store."""
    return run("debugfs", "-R", f"cat /upper/{name}", store).stdout


def store_is_shown(machine: Machine, written: str, fstype: str = "fuse.cowfs-store") -> None:
    """Fail unless the guest has checked its store (look_at_store)."""
    assert machine.said("memory") == f"{fstype} ro"
    assert machine.said("looked") == written
    assert "Read-only file system" in machine.said("refused")
    assert machine.said("apart") == "yes"


def has_its_root(machine: Machine) -> None:
    """Fail unless the root is a mount of the stick's image and store."""
    assert machine.said("root") == "fuse.cowfs"
    assert machine.said("store") == f"{CARRIER}/sda1/sysrcd.bs"
    assert machine.said("lower").startswith(f"{CARRIER}/sda1/sysrcd.dat (squashfs")
    assert "usr" in machine.said("view")
    store_is_shown(machine, "after")


def worked_without_memory(machine: Machine) -> None:
    """Fail unless the root served all requests while memory was full, with the daemon never swapped out."""
    assert machine.said("eater") == "137", "the one who took the memory was to be ended"
    assert machine.said("ballast") == "2c7ab85a"  # 16 MiB of zeros
    assert int(machine.said("read")) > 3_000_000
    assert machine.said("swap file") == "swapon: /root/swap: Invalid argument"
    assert machine.said("swapped") == "written meanwhile"
    assert machine.said("daemon in swap") == "0 kB"


def is_a_root(machine: Machine) -> None:
    """Fail unless modes, devices, programs and mappings work as in a root, and nothing kills the daemon."""
    assert machine.said("shadow") == "13"
    assert machine.said("suid") == "101"
    assert [machine.said(key) for key in ("device", "exec", "mmap")] == ["1", "7", "abcd"]
    assert [machine.said(key) for key in ("name", "oom", "locked")] == ["@", "-1000", "True"]
    assert machine.said("signals") == "still writable"


@pytest.mark.parametrize("pressed", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_changes_survive_a_power_cut_and_the_next_boots(
    boot: Boot, parts: Parts, tmp_path: Path, pressed: bool
) -> None:
    """Image and store are on one stick, as users have them; a store on a hard disk is left alone.

    *pressed*: the memory runs out, and a swap device is used, before the power is cut.
    """
    store = make_store(tmp_path / "sysrcd.bs", 64)
    mine = images.fat_stick(tmp_path / "stick.img", {"/sysrcd.dat": parts.image, "/sysrcd.bs": store}, 160)
    other = tmp_path / "other"
    other.mkdir()
    make_store(other / "sysrcd.bs")
    disk = images.ext4_disk(tmp_path / "disk.img", other, 48)
    untouched = disk.read_bytes()
    swap = tmp_path / "swap.img"
    with swap.open("wb") as out:
        out.truncate(96 << 20)
    devices = [*stick(mine, "stick"), *hard_disk(disk, "disk"), *hard_disk(swap, "swap")]

    test = f"""{GUEST}
        tell_root
        look_at_store before
        {"press_memory" if pressed else ""}
        look_at_store after
        {"use_swap /dev/vdb" if pressed else ""}
        echo first >/root/first; rm /etc/motd
        python3 -Ic 'import os
directory = os.open("/root", os.O_RDONLY)
file = os.open("/root/synced", os.O_CREAT | os.O_WRONLY)
os.write(file, b"0123456789" * 10000)
os.fsync(file); os.fsync(directory)'
        out "ready: now"
        sleep 1000
    """
    with boot(PLAIN, test=test, devices=devices, memory=320) as machine:
        machine.wait_for("TEST ready: now")
        machine.cut_power()
        has_its_root(machine)
        if pressed:
            worked_without_memory(machine)
    assert disk.read_bytes() == untouched

    test = f"""{GUEST}
        out "synced: $(md5sum </root/synced | cut -c1-8) $(wc -c </root/synced)"
        out "first: $(cat /root/first) $(ls /etc/motd 2>/dev/null)"
        checks
        tell_root
        look_at_store again
        read_anew /root /usr/sbin /usr/lib/cowfs
        echo second >/root/second
    """
    with boot(PLAIN, test=test, devices=devices).wait() as machine:
        machine.shows(r"needs recovery: e2fsck checks", r"repaired by e2fsck", "are unmounted cleanly")
        expected = run("sh", "-c", "for i in $(seq 10000); do printf 0123456789; done | md5sum").stdout[:8]
        assert machine.said("synced") == f"{expected} 100000"
        assert machine.said("first").strip() == "first"
        is_a_root(machine)
        store_is_shown(machine, "again")
        assert machine.said("read anew") == machine.said("read before")
    after = images.from_fat(mine, "/sysrcd.bs", tmp_path / "after.bs")
    assert images.is_clean(after) == ""
    assert content(after, "root/second") == "second\n"
    assert "clean" in cowfs("check", "-n", after, check=True).stdout
    assert disk.read_bytes() == untouched
    # The stick's FAT stays marked as not unmounted until fsck.vfat checks it.


@pytest.mark.nightly
def test_named_store_on_a_hard_disk_is_repaired(
    boot: Boot, image_disk: Path, parts: Parts, tmp_path: Path
) -> None:
    """A damaged store with spaces and non-ASCII letters in its name; busybox's init; and a reboot."""
    files = tmp_path / "files"
    (files / "my stores").mkdir(parents=True)
    store = changed_store(files / "my stores/größe 日本.bs", parts.image, {"root/before": "kept"})
    shutil.rmtree(store.with_suffix(".mnt"), ignore_errors=True)
    store.with_suffix(".log").unlink(missing_ok=True)
    for damage in ("ssv free_blocks_count 7", "ssv state 2"):
        run("debugfs", "-w", "-R", damage, store)
    disk = images.ext4_disk(tmp_path / "disk.img", files, 48)
    test = f"""{GUEST}
        tell_root
        out "before: $(cat /root/before)"
        out "init: $(tr '\\0' ' ' </proc/1/cmdline)"
        echo after >/root/after
        look_at_store kernel
        finish reboot
    """
    with boot(
        'backstore=alldev,"/my stores/größe 日本.bs" cowfs.engine=kernel',
        test=test,
        devices=[*hard_disk(image_disk, "image"), *hard_disk(disk, "disk")],
    ).wait() as machine:
        assert machine.said("store") == f"{CARRIER}/vdb/my stores/größe 日本.bs"
        machine.shows("has errors: e2fsck checks", "repaired by e2fsck", "are unmounted cleanly")
        assert machine.said("before") == "kept"
        store_is_shown(machine, "kernel", "ext3")
        assert machine.said("init").startswith(("init", "/sbin/init"))
        assert machine.said("motd") == ""
    after = images.from_ext4(disk, "/my stores/größe 日本.bs", tmp_path / "after.bs")
    assert images.is_clean(after) == ""
    assert content(after, "root/after") == "after\n"
    assert images.is_clean(disk) == ""


@pytest.mark.nightly
def test_waits_for_a_stick_that_comes_late(boot: Boot, image_disk: Path, tmp_path: Path) -> None:
    """Process 1 is busybox's init, and receives a poweroff."""
    store = make_store(tmp_path / "s.bs")
    late = images.fat_stick(tmp_path / "stick.img", {"/late/my.bs": store}, 64)
    test = f"{GUEST}\n tell_root\n poweroff\n sleep 1000"
    devices = [*hard_disk(image_disk, "image"), *stick(late, "late", plugged=False)]
    with boot("backstore=/late/my.bs", test=test, devices=devices) as machine:
        machine.wait_for("waiting for a disk with the store /late/my.bs")
        plug(machine, "late")
        machine.wait()
        assert machine.said("store") == f"{CARRIER}/sda1/late/my.bs"
        assert machine.said("memory") == "fuse.cowfs-store ro"
        machine.shows("are unmounted cleanly")
    assert images.fat_is_clean(late) == ""
    assert images.is_clean(images.from_fat(late, "/late/my.bs", tmp_path / "after.bs")) == ""


@pytest.mark.nightly
def test_unusable_stores_are_reported_and_changes_are_in_memory(
    boot: Boot, image_disk: Path, tmp_path: Path
) -> None:
    """A store of another system, and a file that is no store; the warning is also at the login."""
    lower = tmp_path / "lower"
    lower.mkdir()
    foreign = changed_store(tmp_path / "foreign.bs", lower, {"x": "y"})
    text = tmp_path / "text"
    text.write_text("dear diary\n" * 1000)
    sticks = [
        images.fat_stick(tmp_path / "one.img", {"/sysrcd.bs": foreign}, 64),
        images.fat_stick(tmp_path / "two.img", {"/sysrcd.bs": text}, 64),
        images.fat_stick(tmp_path / "three.img", {"/sysrcd.bs/not/a/file": text}, 64),
    ]
    test = f'{GUEST}\n tell_root\n echo x >/root/x && out "writable: $(cat /root/x)"\n'
    devices = [*hard_disk(image_disk, "image")]
    for number, image in enumerate(sticks):
        devices += stick(image, f"s{number}")
    with boot(PLAIN, test=test, devices=devices).wait() as machine:
        assert machine.said("store") == "in memory (lost at the unmount)"
        assert machine.said("writable") == "x"
        assert machine.said("memory") == "fuse.cowfs-store ro"
        motd = machine.said("motd")
        assert re.search(r"foreign|belongs to \S+lower", motd), motd
        assert "not a store but a text file" in motd
        assert "is a directory, not a store" in motd
        assert "changes are kept in memory, and lost" in motd
        machine.shows("WARNING: the store /sysrcd.bs on sd", "are unmounted cleanly")
    assert [images.fat_is_clean(image) for image in sticks] == ["", "", ""]
    for image, file in zip(sticks, (foreign, text), strict=False):
        after = images.from_fat(image, "/sysrcd.bs", image.with_suffix(".bs"))
        assert after.read_bytes() == file.read_bytes(), "what is refused is not to be touched"


@pytest.mark.nightly
def test_store_on_a_disc_is_a_layer_below_memory_and_what_is_kept(
    boot: Boot, parts: Parts, tmp_path: Path
) -> None:
    """Image and store are on a CD: old changes are visible; new ones are lost unless they are saved."""
    files = tmp_path / "cd"
    files.mkdir()
    os.link(parts.image, files / "sysrcd.dat")
    changes = {
        "root/before": "kept",
        "etc/motd": None,
        "etc/passwd": "root:x:0:0::/root:/bin/sh\nx:x:9:9:::\n",
    }
    store = changed_store(tmp_path / "sysrcd.bs", parts.image, changes)
    shutil.copy(store, files / "sysrcd.bs")
    cd = images.iso(tmp_path / "cd.iso", files)
    mine = images.fat_stick(tmp_path / "stick.img", {}, 192)
    devices = [*disc(cd, "cd"), *stick(mine, "stick")]
    test = f"""{GUEST}
        tell_root
        out "before: $(cat /root/before) $(ls /etc/motd 2>/dev/null) $(grep -c x:9 /etc/passwd)"
        echo new >/root/before && out "now: $(cat /root/before)"
        mkdir /mnt/stick && mount -t vfat /dev/sda1 /mnt/stick
        cowfs persist / /mnt/stick/sysrcd.bs 128 && out "persist: done"
        echo also >/root/also
    """
    with boot(PLAIN, test=test, devices=devices).wait() as machine:
        assert machine.said("before").split() == ["kept", "1"]
        assert machine.said("now") == "new"
        assert machine.said("store") == "in memory (lost at the unmount)"
        assert machine.said("memory") == "ext3 ro"
        assert "cannot be written to (read-only media): changes are kept in memory" in machine.said("motd")
        assert machine.said("persist") == "done"
        machine.shows("are unmounted cleanly")
    assert images.is_clean(images.from_fat(mine, "/sysrcd.bs", tmp_path / "after.bs")) == ""

    test = f"""{GUEST}
        tell_root
        out "files: $(cat /root/before /root/also | tr '\\n' ' ') $(ls /etc/motd 2>/dev/null)"
        out "passwd: $(grep -c x:9 /etc/passwd)"
        cowfs find >/run/found; out "found: $(tr '\\n' ' ' </run/found)"
        echo again >/root/again
    """
    with boot(PLAIN, test=test, devices=devices).wait() as machine:
        assert machine.said("store") == f"{CARRIER}/sda1/sysrcd.bs"
        assert machine.said("files").split() == ["new", "also"]
        assert machine.said("passwd") == "1"
        assert machine.said("motd") == ""
        assert re.search(r"/dev/sda1 .* SELECTED.*/dev/sr0 .* not selected", machine.said("found"))
        machine.shows(r"is based on \S+/sr0/sysrcd.bs", "are unmounted cleanly")
    after = images.from_fat(mine, "/sysrcd.bs", tmp_path / "again.bs")
    assert images.is_clean(after) == ""
    assert content(after, "root/again") == "again\n"
    assert images.fat_is_clean(mine) == ""


@pytest.mark.nightly
def test_no_store_is_used_until_one_is_created_later(boot: Boot, image_disk: Path, tmp_path: Path) -> None:
    """The user chooses changes in memory, then creates a store; `cowfs find` shows the next boot."""
    mine = images.fat_stick(tmp_path / "stick.img", {"/sysrcd.bs": make_store(tmp_path / "s.bs")}, 192)
    devices = [*hard_disk(image_disk, "image"), *stick(mine, "stick")]
    test = f"""{GUEST}
        tell_root
        out "found: $(cowfs find | tr '\\n' ' ')"
        echo kept >/root/kept
        mkdir /mnt/stick && mount -t vfat /dev/sda1 /mnt/stick
        cowfs persist / /mnt/stick/kept.bs 128
        out "persist: $?"
        echo also >/root/also
        look_at_store kept
    """
    with boot(f"{PLAIN} backstore=off", test=test, devices=devices).wait() as machine:
        assert machine.said("store") == "in memory (lost at the unmount)"
        assert machine.said("motd") == ""
        assert "/dev/sda1 /sysrcd.bs" in machine.said("found").replace("  ", " ")
        assert "SELECTED: the first usable store" in machine.said("found")
        assert machine.said("persist") == "0"
        store_is_shown(machine, "kept")
        machine.shows(r"changes are kept in memory \(backstore=off\)", "are unmounted cleanly")
    after = images.from_fat(mine, "/kept.bs", tmp_path / "kept.bs")
    assert images.is_clean(after) == ""
    assert (content(after, "root/kept"), content(after, "root/also")) == ("kept\n", "also\n")
    assert images.fat_is_clean(mine) == ""


@pytest.mark.nightly
def test_missing_store_asks_in_a_shell(boot: Boot, image_disk: Path) -> None:
    """The named store does not exist: the boot opens a shell, and then follows the user's choice."""
    options = f"{PLAIN} backstore=alldev,/nowhere.bs backstore.wait=1"
    with boot(options, test=f"{GUEST}\n tell_root", devices=hard_disk(image_disk, "image")) as machine:
        machine.wait_for("starting a shell to fix this")
        machine.type("exit")
        machine.wait_for("(?s)starting a shell to fix this.*starting a shell to fix this")
        machine.type("echo in the $((40 + 2)) shell; exit 1")
        machine.wait()
        machine.shows("no disk that was looked at has the store /nowhere.bs", "in the 42 shell")
        assert machine.said("store") == "in memory (lost at the unmount)"
        assert machine.said("motd").count("no disk that was looked at has the store /nowhere.bs") == 1


@pytest.mark.nightly
def test_missing_store_ends_the_boot_if_an_option_says_so(boot: Boot, image_disk: Path) -> None:
    options = f"{PLAIN} backstore=/nowhere.bs backstore.wait=0 backstore.fallback=fail"
    with boot(options, test="out 'up: yes'", devices=hard_disk(image_disk, "image")).wait() as machine:
        machine.shows("FAILED: no store, and backstore.fallback=fail")
        assert "TEST up" not in machine.text


@pytest.mark.nightly
def test_wakes_from_sleep(boot: Boot, image_disk: Path, tmp_path: Path) -> None:
    """After suspend to memory with the store on a stick, the root can be read and written."""
    mine = images.fat_stick(tmp_path / "stick.img", {"/sysrcd.bs": make_store(tmp_path / "s.bs")}, 64)
    devices = [*hard_disk(image_disk, "image"), *stick(mine, "stick")]
    test = f"""{GUEST}
        echo before >/root/before
        read_anew /usr /root
        echo 3 >/proc/sys/vm/drop_caches
        out "asleep: now"
        echo mem >/sys/power/state
        out "woken: $? $(cat /sys/power/suspend_stats/success)"
        out "anew: $(checksum /usr /root)"
        python3 -Ic 'import os
file = os.open("/root/after", os.O_CREAT | os.O_WRONLY)
os.write(file, b"after")
os.fsync(file)'
        out "fsync: $?"
        finish reboot  # after suspend, qemu's machine does not power off
    """
    with boot(PLAIN, test=test, devices=devices) as machine:
        machine.wait_for("TEST asleep: now")
        eventually(lambda: "suspended" in machine.monitor("info status"), "it sleeps", 60)
        machine.monitor("system_wakeup")
        machine.wait()
        assert machine.said("woken") == "0 1"
        assert machine.said("read before") == machine.said("read anew") == machine.said("anew")
        assert machine.said("fsync") == "0"
        machine.shows("are unmounted cleanly")
    after = images.from_fat(mine, "/sysrcd.bs", tmp_path / "after.bs")
    assert images.is_clean(after) == ""
    assert content(after, "root/after") == "after"
    assert images.fat_is_clean(mine) == ""
