"""The commands of the guides, run as they stand there, one after the other, where the guides run them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.guides import ROOT, Command, run, section
from tests.support.system import needs_root

AGED = "-exec touch -hd 2024-01-01 {} +"
DEV_FUSE_AT_NIGHT = True


def check(prepare: str, wanted: list[Command]) -> None:
    """Run commands, and compare how they end and what they answer."""
    for command, (status, said) in zip(wanted, run(prepare, wanted), strict=True):
        told = f"{command.line}: exit {status}:\n" + "\n".join(said)
        assert (status != 0) == command.fails, told
        assert command.is_answered_by(said), told + "\nthe guide says:\n" + "\n".join(command.answer)


@needs_root
def test_the_quickstart(tmp_path: Path) -> None:
    wanted = section("docs/quickstart.md", "mksquashfs /etc", "umount kernel")
    # The parameter is the machine's, and the tests' own matter; top runs until Ctrl-C.
    wanted = [c for c in wanted if "enable_uring" not in c.line and not c.line.startswith("cowfs top")]
    assert len(wanted) >= 22
    etc = "passwd group nsswitch.conf ld.so.cache mke2fs.conf fuse.conf"
    prepare = (
        f"cd {tmp_path}; mkdir etc srv; for name in {etc}; do cp /etc/$name etc/ 2>/dev/null || :; done; "
        "mkdir etc/apt etc/cron.daily; echo old >etc/hostname; echo motd >etc/motd; echo deb >etc/apt/list; "
        f"touch etc/services etc/cron.daily/job; find etc {AGED}; "
        "mount --bind etc /etc; mount --bind srv /srv; cd /srv"
    )
    check(prepare, wanted)


@needs_root
def test_the_quickstart_as_an_ordinary_user(tmp_path: Path) -> None:
    wanted = section(
        "docs/quickstart.md", "mkdir -p root/etc", "cowfs mount root.sqsh merged --store changes.bs"
    )
    assert len(wanted) >= 12 and not any(command.is_root for command in wanted)
    prepare = f"mount --bind {tmp_path} /srv; cd /srv; chown 65534:65534 ."
    check(prepare, wanted)


@needs_root
@pytest.mark.parametrize("first, last", [("cowfs create", "cowfs check"), ("cowfs mount", "cowfs persist")])
def test_the_readme(tmp_path: Path, first: str, last: str) -> None:
    wanted = section("README.md", first, last)
    if first == "cowfs mount":  # the second session
        wanted = section("README.md", "cowfs persist", "cowfs persist")
        wanted = [Command("cowfs mount sysrcd.dat /mnt/merged", is_root=True), *wanted]
    prepare = (
        f"mount --bind {tmp_path} /mnt; cd /mnt; mkdir -p merged root/etc/apt root/usr/doc/bash; "
        f"cd root; touch etc/resolv.conf etc/hostname etc/apt/list usr/doc/bash/README; find . {AGED}; "
        "cd ..; mksquashfs root sysrcd.dat -quiet -no-progress"
    )
    check(prepare, wanted)


@needs_root
@pytest.mark.nightly  # the helpers are looked for in /sbin alone: all of that is copied
def test_the_guide_for_rescue_systems(tmp_path: Path) -> None:
    wanted = section(
        "docs/rescue-system.md", "install -m 755 mount-helpers/mount.cowfs", "umount /mnt/system"
    )
    wanted += section("docs/rescue-system.md", "truncate", "cowfs check -n")
    # The sizes that ls prints depend on the filesystem below; the time is that of the guide.
    wanted = [command for command in wanted if not command.line.startswith("ls -lsh")]
    assert len(wanted) >= 12
    prepare = (
        f"cd {tmp_path}; mkdir -p media/stick media/cdrom mnt/system root/etc; cp -a /usr/sbin sbin; "
        f"cp -a /usr/local/bin local; ln -s {Path(sys.executable).parent}/cowfs local/; "
        f"touch root/etc/hostname; find root {AGED}; "
        "mksquashfs root media/cdrom/sysrcd.dat -quiet -no-progress; mount --bind sbin /usr/sbin; "
        f"mount --bind local /usr/local/bin; mount --bind media /media; mount --bind mnt /mnt; cd {ROOT}"
    )
    check(prepare, wanted)
