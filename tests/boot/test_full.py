"""Whole systems: Debian with systemd, by the initramfs of initramfs-tools and of dracut, and with sysvinit.

For the night.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.boot import images
from tests.boot.conftest import LOGS
from tests.boot.machine import Machine, hard_disk, stick
from tests.support.mounts import cowfs
from tests.support.system import needs_root, run

pytestmark = [needs_root, pytest.mark.nightly, pytest.mark.timeout(3600)]

PACKAGES = ("udev", "python3", "e2fsprogs", "libfuse3-3", "libext2fs2", "busybox-static", "kmod", "zstd")
_PATIENCE = 1800.0

_UNIT = """\
[Unit]
Description=The test of this machine
After=basic.target
[Service]
Type=oneshot
ExecStartPre=/sbin/modprobe qemu_fw_cfg
ExecStart=/usr/sbin/selftest
ExecStopPost=/bin/systemctl --no-block poweroff
StandardOutput=journal+console
"""
_SELFTEST = """\
#!/bin/sh
out() { echo "TEST $*" >/dev/console; }
. /sys/firmware/qemu_fw_cfg/by_name/opt/test/raw
"""
TEST = """
    out "init: $(readlink /proc/1/exe)"
    out "root: $(awk '$2 == "/" { print $3 }' /proc/mounts | tail -n 1)"
    cowfs info / >/run/info
    out "store: $(sed -n 's/^store: *//p' /run/info)"
    n=$(cat /root/boots 2>/dev/null || echo 0)
    echo $((n + 1)) >/root/boots
    out "boots: $(cat /root/boots)"
    out "failed: $(systemctl --failed --no-legend --plain | cut -d' ' -f1 | tr '\\n' ' ')"
"""


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree of a small Debian with systemd, with cowfs in it."""
    if shutil.which("debootstrap") is None:
        pytest.skip("needs debootstrap")
    tree = images.debian(
        tmp_path_factory.mktemp("debian") / "tree", "debian",
        ("systemd-sysv", "initramfs-tools", "dracut-core", *PACKAGES),
    )  # fmt: skip
    units = tree / "etc/systemd/system"
    (units / "selftest.service").write_text(_UNIT)
    (units / "multi-user.target.wants").mkdir(exist_ok=True)
    (units / "multi-user.target.wants/selftest.service").symlink_to("../selftest.service")
    put_selftest(tree)
    run(images.HELPERS / "mkrescue", tree, timeout=300)
    return tree


def put_selftest(tree: Path) -> None:
    """What runs the script that a machine was given."""
    (tree / "usr/sbin/selftest").write_text(_SELFTEST)
    (tree / "usr/sbin/selftest").chmod(0o755)


@pytest.fixture(scope="module")
def initramfs(debian: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Make an initramfs with the programs of the tree, by name: initramfs-tools or dracut."""
    _, root, version = images.kernel()
    where = debian / "lib/modules" / version
    where.parent.mkdir(exist_ok=True)
    run("cp", "-a", root / "lib/modules" / version, where, timeout=120)
    shutil.copy(root / f"boot/config-{version}", debian / "boot")
    place = tmp_path_factory.mktemp("initramfs")

    def make(kind: str) -> Path:
        out = place / kind
        with ExitStack() as stack:
            for name in ("proc", "dev", "sys"):
                run("mount", "--bind", f"/{name}", debian / name)
                stack.callback(run, "umount", debian / name)
            if kind == "initramfs-tools":
                (debian / "etc/initramfs-tools/conf.d/cowfs").write_text("MODULES=list\nCOMPRESS=gzip\n")
                run("chroot", debian, "mkinitramfs", "-o", "/tmp/out", version, timeout=600)
            else:
                run(
                    "chroot", debian, "dracut", "--force", "--no-hostonly", "--gzip", "--modules",
                    "dash base udev-rules fs-lib cowfs", "/tmp/out", version, timeout=900,
                )  # fmt: skip
        shutil.move(debian / "tmp/out", out)
        return out

    yield make
    shutil.rmtree(where)


@pytest.fixture(scope="module")
def image(debian: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root image of it, with the one module that the test itself needs."""
    _, root, version = images.kernel()
    tree = tmp_path_factory.mktemp("image") / "tree"
    run("cp", "-a", debian, tree, timeout=300)
    modules = tree / "lib/modules" / version
    shutil.rmtree(modules, ignore_errors=True)
    wanted = "kernel/drivers/firmware/qemu_fw_cfg.ko"
    (modules / wanted).parent.mkdir(parents=True)
    shutil.copy(root / "lib/modules" / version / wanted, modules / wanted)
    run("depmod", "-b", tree, version)
    return images.root_image(tree, tree.parent / "sysrcd.dat")


@pytest.mark.parametrize(
    ("kind", "options"), [("initramfs-tools", "boot=cowfs"), ("dracut", "root=cowfs rd.shell=0")]
)
def test_systemd_starts_and_ends_clean(
    kind: str, options: str, image: Path, initramfs: Callable[[str], Path], tmp_path: Path
) -> None:
    content = tmp_path / "content"
    content.mkdir()
    shutil.copy(image, content / "sysrcd.dat")
    disk = images.ext4_disk(tmp_path / "image.img", content, (image.stat().st_size >> 20) + 32)
    cowfs("create", tmp_path / "s.bs", "64", check=True)
    mine = images.fat_stick(tmp_path / "stick.img", {"/sysrcd.bs": tmp_path / "s.bs"}, 96)
    devices = [*hard_disk(disk, "image"), *stick(mine, "stick")]
    made, kernel = initramfs(kind), images.kernel()[0]
    LOGS.mkdir(parents=True, exist_ok=True)
    for boots in ("1", "2"):
        log = LOGS / f"systemd-{kind}.{boots}.log"
        line = f"{options} systemd.mask=serial-getty@ttyS0.service"
        with Machine(kernel, made, log, options=line, test=TEST, devices=devices, memory=768) as machine:
            machine.wait(_PATIENCE)
            assert machine.said("root") == "fuse.cowfs"
            assert machine.said("init").endswith("systemd")
            assert machine.said("store") == "/run/initramfs/cowfs/disk/sda1/sysrcd.bs"
            assert machine.said("boots") == boots
            machine.shows("the root filesystem and its store are unmounted cleanly")
    assert images.is_clean(images.from_fat(mine, "/sysrcd.bs", tmp_path / "after.bs")) == ""
    assert images.fat_is_clean(mine) == ""


# --- sysvinit


@pytest.fixture(scope="module")
def sysvinit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root image of a small Debian with sysvinit, as mkrescue makes it of what debootstrap has made."""
    if shutil.which("debootstrap") is None:
        pytest.skip("needs debootstrap")
    tree = images.debian(
        tmp_path_factory.mktemp("sysvinit") / "tree", "debian-sysvinit", ("sysvinit-core", *PACKAGES),
        "--exclude=systemd-sysv",
    )  # fmt: skip
    put_selftest(tree)
    with (tree / "etc/inittab").open("a") as inittab:
        inittab.write("test:2:once:/usr/sbin/selftest\n")
    image = images.root_image(tree, tree.parent / "sysrcd.dat")
    for level, last in (("0", "halt"), ("6", "reboot")):
        order = sorted(link.name for link in (tree / f"etc/rc{level}.d").glob("K*"))
        assert [name[3:] for name in order[-3:]] == ["umountroot", "cowfs-shutdown", last]
    return image


TEST_SYSVINIT = """
    out "init: $(readlink /proc/1/exe) $(runlevel)"
    out "root: $(awk '$2 == "/" { print $3 }' /proc/mounts | tail -n 1)"
    echo boot >>/root/boots
    out "boots: $(wc -l </root/boots)"
    rm -f /root/ended
    sh -c 'trap "echo cleanly >/root/ended; exit" TERM; echo $$ >/run/willing; while :; do sleep 1; done' &
    sh -c 'trap "" TERM; exec >>/root/log; echo $$ >/run/stubborn; while :; do sleep 1; done' &
    while [ ! -s /run/willing ] || [ ! -s /run/stubborn ]; do sleep 0.1; done
"""


def test_sysvinit_starts_and_ends_clean(sysvinit: Path, tmp_path: Path) -> None:
    """The daemon outlives those who ask all to end, and all is written at the end."""
    content = tmp_path / "content"
    content.mkdir()
    shutil.copy(sysvinit, content / "sysrcd.dat")
    disk = images.ext4_disk(tmp_path / "image.img", content, (sysvinit.stat().st_size >> 20) + 32)
    cowfs("create", tmp_path / "s.bs", "64", check=True)
    mine = images.fat_stick(tmp_path / "stick.img", {"/sysrcd.bs": tmp_path / "s.bs"}, 96)
    devices = [*hard_disk(disk, "image"), *stick(mine, "stick")]
    made, kernel = images.initramfs(tmp_path / "initramfs"), images.kernel()[0]
    LOGS.mkdir(parents=True, exist_ok=True)
    for boots, end in (("1", "reboot"), ("2", "poweroff")):
        log = LOGS / f"sysvinit.{boots}.log"
        test = f"{TEST_SYSVINIT}\n{end}\n"
        with Machine(kernel, made, log, test=test, devices=devices) as machine:
            machine.wait(_PATIENCE)
            assert machine.said("root") == "fuse.cowfs"
            assert machine.said("init") == "/usr/sbin/init N 2"
            assert machine.said("boots") == boots
            machine.shows(
                "Asking all remaining processes to terminate",
                "the root filesystem and its store are unmounted cleanly",
                {"reboot": "Restarting system", "poweroff": "Power down"}[end],
            )
            assert "cannot execute" not in machine.text, "init was to wait for us"
        after = images.from_fat(mine, "/sysrcd.bs", tmp_path / f"after.{boots}.bs")
        assert images.is_clean(after) == ""
        assert images.fat_is_clean(mine) == ""
        assert run("debugfs", "-R", "cat /upper/root/ended", after).stdout == "cleanly\n"
