"""A live disc boots with its own boot loader after `cowfs` has replaced its root image."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.boot.conftest import Parts
from tests.boot.machine import disc
from tests.boot.test_boot import GUEST, PLAIN, Boot, changed_store
from tests.support.mounts import cowfs
from tests.support.system import needs_root, run

pytestmark = [needs_root, pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(2700)]

LOADER = Path("/usr/lib/ISOLINUX/isolinux.bin")
MODULE = Path("/usr/lib/syslinux/modules/bios/ldlinux.c32")
CONFIGURATION = f"""SERIAL 0
DEFAULT live
LABEL live
  KERNEL linux
  INITRD initrd
  APPEND console=ttyS0 quiet panic=1 no_timer_check {PLAIN}
"""


def live_disc(top: Path, parts: Parts) -> Path:
    """Make a disc with a boot loader, kernel, initramfs and root image."""
    files = top / "files"
    (files / "isolinux").mkdir(parents=True)
    os.link(parts.image, files / "sysrcd.dat")
    digest = run("sha512sum", parts.image).stdout.partition(" ")[0]
    (files / "sysrcd.sha512").write_text(f"{digest}  sysrcd.dat\n")
    assert parts.kernel is not None
    for source, name in ((LOADER, "isolinux.bin"), (MODULE, "ldlinux.c32"), (parts.kernel, "linux")):
        shutil.copy(source, files / "isolinux" / name)
    shutil.copy(parts.initramfs, files / "isolinux/initrd")
    (files / "isolinux/isolinux.cfg").write_text(CONFIGURATION)
    boot = ["-b", "isolinux/isolinux.bin", "-c", "isolinux/boot.cat", "-no-emul-boot"]
    boot += ["-boot-load-size", "4", "-boot-info-table"]
    run("xorriso", "-as", "mkisofs", "-quiet", "-R", "-V", "LIVE", *boot, "-o", top / "old.iso", files)
    return top / "old.iso"


def test_a_disc_with_the_changed_root_boots(boot: Boot, parts: Parts, tmp_path: Path) -> None:
    if not LOADER.exists() or not MODULE.exists():
        pytest.skip("needs isolinux and syslinux-common, the boot loader of the disc")
    old = live_disc(tmp_path, parts)
    changes = {"root/mine": "mine", "etc/motd": None}
    store = changed_store(tmp_path / "sysrcd.bs", parts.image, changes)
    for name in ("new.iso", "again.iso"):
        done = cowfs("export", store, "--to", "iso", "--base", old, tmp_path / name, timeout=300)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "new.iso").read_bytes() == (tmp_path / "again.iso").read_bytes()
    out = tmp_path / "out"
    run("xorriso", "-osirrox", "on", "-indev", tmp_path / "new.iso", "-extract", "/", out)
    run("sha512sum", "-c", "sysrcd.sha512", cwd=out)
    test = f"""{GUEST}
        tell_root
        out "mine: $(cat /root/mine)"
        out "motd: $(ls /etc/motd 2>/dev/null || echo none)"
    """
    with boot(test=test, kernel=None, devices=disc(tmp_path / "new.iso", "cd")).wait(1800) as machine:
        assert machine.said("root") == "fuse.cowfs"
        assert machine.said("lower").partition(" ")[0].endswith("sr0/sysrcd.dat")
        assert machine.said("mine") == "mine"
        assert machine.said("store") == "in memory (lost at the unmount)"
