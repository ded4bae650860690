"""Encrypted stores, in user-mode Linux, because this kernel may lack a device mapper."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.boot import images, usermode
from tests.boot.conftest import Parts
from tests.boot.machine import Machine
from tests.boot.test_boot import CARRIER, GUEST, PLAIN
from tests.boot.usermode import UserMode
from tests.support.system import needs_root

pytestmark = [needs_root, pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(10_000)]

Boot = Callable[..., Machine]
MODULES = "aes_generic cbc ecb xts hmac sha256_generic encrypted_keys dm_mod dm_crypt algif_skcipher"
QUICKLY = "--pbkdf pbkdf2 --pbkdf-force-iterations 1000"
"""A quick key derivation: the usual one takes minutes on a busy machine."""


BEGIN = f"""{GUEST}
        said() {{ told=$1; shift; out "$told: $("$@" 2>&1 </dev/null | tr '\\n' ' ')"; }}
        volumes() {{ cat /sys/block/dm-*/dm/name 2>/dev/null; ls /sys/block/loop*/loop/backing_file; }}
        gone() {{
            for _ in $(seq 100); do volumes | grep -q -e cowfs- -e loop1 || break; usleep 50000; done
            volumes
        }}
        real=$(command -v cryptsetup); mv $real $real.real
        {{
            echo '#!/bin/sh'
            echo '[ $1 != luksFormat ] || {{ shift; set -- luksFormat {QUICKLY} "$@"; }}'
            echo "exec $real.real \\"\\$@\\""
        }} >$real
        chmod 755 $real
        cd /run; mkdir low m m2; echo lower >low/file; printf secret >key; printf wrong >bad
        disk={CARRIER}/ubda1
        mount -o remount,rw $disk
"""
MAKE = f"""{BEGIN}
        said created cowfs create --luks $disk/sysrcd.bs 40 --key-file key
        said after gone
        said grow cowfs grow $disk/sysrcd.bs 48 --key-file key
        said info cowfs info $disk/sysrcd.bs --key-file key
        said left gone
"""
"""Creates an encrypted store and makes it larger."""
USE = f"""{BEGIN}
        said made cowfs create --luks $disk/my.bs 40 --key-file key
        said device cowfs create --luks /dev/ubdb --key-file key
        said wrong cowfs mount low m --store $disk/my.bs --key-file bad
        said unasked setsid cowfs mount low m --store $disk/my.bs
        for place in $disk/my.bs /dev/ubdb; do
            name=${{place##*/}} engine=process
            [ $place != /dev/ubdb ] || engine=kernel
            said "mount $name" cowfs mount low m -o engine=$engine,store=$place,key_file=key
            echo the-secret >m/new; rm -f m/file
            said "busy $name" cowfs mount low m2 --store $place --key-file key
            said "shows $name" cowfs info m
            said "umount $name" cowfs umount m
            said "closed $name" gone
        done
        cowfs mount low m --store $disk/my.bs --key-file key
        echo more >m/more; sync
        kill -9 $(cowfs info m | sed -n 's/^daemon: *pid \\([0-9]*\\).*/\\1/p')
        said "dead" cowfs umount m
        said "closed after death" gone
        said grow cowfs grow $disk/my.bs 48 --key-file key
        said check cowfs check $disk/my.bs --key-file key
        said diff cowfs diff $disk/my.bs --lower low --key-file key
        said plain grep -c the-secret $disk/my.bs /dev/ubdb
        said left gone
"""
"""Uses encrypted stores, in a file and on a disk, in each way, and prints the results."""


@pytest.fixture(scope="module")
def initramfs(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cryptsetup", path="/usr/sbin:/sbin") is None:
        pytest.skip("needs cryptsetup (scripts/setup --boot)")
    return usermode.initramfs(tmp_path_factory.mktemp("luks") / "initramfs", MODULES)


@pytest.fixture
def boot(initramfs: Path, tmp_path: Path) -> Boot:
    program, _, _ = usermode.kernel()
    return partial(UserMode, program, initramfs, memory=900)


def was_used(machine: Machine) -> None:
    """Fail unless USE printed the right results."""
    assert machine.said("device") == "/dev/ubdb: created an empty encrypted store in 64 MiB "
    assert "wrong passphrase, or wrong key file" in machine.said("wrong")
    assert "no terminal to ask for the passphrase" in machine.said("unasked")
    for name in ("my.bs", "ubdb"):
        assert "in use by process" in machine.said(f"busy {name}")
        assert "store:      /dev/dm-0" in machine.said(f"shows {name}")
        assert machine.said(f"umount {name}").strip() == ""
        assert "cowfs-" not in machine.said(f"closed {name}")
    assert "cowfs-" not in machine.said("closed after death")
    assert "resized to 32 MiB" in machine.said("grow")
    assert machine.said("check").strip().endswith("clean")
    assert "D  file A  more A  new" in machine.said("diff")
    assert re.findall(r":(\d+)", machine.said("plain")) == ["0", "0"]


def was_made(machine: Machine) -> None:
    """Fail unless MAKE printed the right results."""
    assert machine.said("created").endswith("sysrcd.bs: created an empty encrypted store in 40 MiB ")
    assert "cowfs-" not in machine.said("after")
    assert "resized to 32 MiB" in machine.said("grow")
    assert "size:       32 MiB used:" in machine.said("info")
    assert "cowfs-" not in machine.said("left")


def test_an_encrypted_store_is_made_grown_and_booted_from(boot: Boot, parts: Parts, tmp_path: Path) -> None:
    """Made with a key file, opened with the typed passphrase."""
    mine = images.fat_stick(tmp_path / "stick.img", {"/sysrcd.dat": parts.image}, 200)
    plugged = [str(mine)]
    with boot(tmp_path / "1.log", options=f"{PLAIN} backstore=off", test=MAKE, devices=plugged) as machine:
        machine.wait()
        was_made(machine)
        machine.shows("are unmounted cleanly")

    test = f"""{GUEST}
        tell_root
        out "volume: $(cat /sys/block/dm-0/dm/name)"
        echo kept >/root/kept
    """
    for options, lines in ((PLAIN, ("wrong", "secret")), (f"{PLAIN} cowfs.engine=kernel", ("secret",))):
        with boot(
            tmp_path / f"{len(lines)}.log", options=f"{options} backstore=alldev", test=test, devices=plugged
        ) as machine:
            for number, line in enumerate(lines):
                asked = "wrong passphrase; again: " if number else "passphrase for .*sysrcd.bs"
                machine.wait_for(asked)
                machine.type(line)
            machine.wait()
            assert machine.said("store") == "/dev/dm-0"
            assert machine.said("volume") == "cowfs-sysrcd.bs"
            assert "secret" not in machine.text
            machine.shows("are unmounted cleanly")
            test = test.replace("echo kept >/root/kept", 'out "kept: $(cat /root/kept)"')
    assert machine.said("kept") == "kept"


def test_encrypted_stores_are_used(boot: Boot, parts: Parts, tmp_path: Path) -> None:
    """In a file and on a whole disk, by both engines."""
    mine = images.fat_stick(tmp_path / "stick.img", {"/sysrcd.dat": parts.image}, 160)
    disk = tmp_path / "disk.img"
    with disk.open("wb") as out:
        out.truncate(64 << 20)
    devices = [str(mine), str(disk)]
    with boot(tmp_path / "log", options=f"{PLAIN} backstore=off", test=USE, devices=devices) as machine:
        machine.wait()
        was_used(machine)
        machine.shows("are unmounted cleanly")
