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

PACKAGES = ("udev", "python3", "e2fsprogs", "fuse3", "busybox-static", "kmod", "zstd")
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
    """Make the tree of a small Debian with systemd and cowfs."""
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
    """Return the unit that runs the machine's script."""
    (tree / "usr/sbin/selftest").write_text(_SELFTEST)
    (tree / "usr/sbin/selftest").chmod(0o755)


@pytest.fixture(scope="module")
def initramfs(debian: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Make an initramfs with the named program of the tree."""
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
            else:  # with systemd, which is dracut's default, or without
                modules = ("--add", "cowfs")
                if kind == "dracut without systemd":
                    modules = ("--modules", "dash base udev-rules fs-lib cowfs")
                run(
                    "chroot", debian, "dracut", "--force", "--no-hostonly", "--gzip", *modules,
                    "/tmp/out", version, timeout=900,
                )  # fmt: skip
        shutil.move(debian / "tmp/out", out)
        return out

    yield make
    shutil.rmtree(where)


def ready_to_boot(debian: Path, tree: Path) -> Path:
    """Copy the tree, with the one module that the test itself needs."""
    _, root, version = images.kernel()
    run("cp", "-a", debian, tree, timeout=300)
    modules = tree / "lib/modules" / version
    shutil.rmtree(modules, ignore_errors=True)
    wanted = "kernel/drivers/firmware/qemu_fw_cfg.ko"
    (modules / wanted).parent.mkdir(parents=True)
    shutil.copy(root / "lib/modules" / version / wanted, modules / wanted)
    run("depmod", "-b", tree, version)
    return tree


@pytest.fixture(scope="module")
def image(debian: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make its root image."""
    place = tmp_path_factory.mktemp("image")
    return images.root_image(ready_to_boot(debian, place / "tree"), place / "sysrcd.dat")


@pytest.mark.parametrize("kind", ["initramfs-tools", "dracut", "dracut without systemd"])
def test_systemd_starts_and_ends_clean(
    kind: str, image: Path, initramfs: Callable[[str], Path], tmp_path: Path
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
        log = LOGS / f"systemd-{kind.replace(' ', '-')}.{boots}.log"
        line = "boot=cowfs rd.shell=0 systemd.mask=serial-getty@ttyS0.service"
        with Machine(kernel, made, log, options=line, test=TEST, devices=devices, memory=768) as machine:
            machine.wait(_PATIENCE)
            assert machine.said("root") == "fuse.cowfs"
            assert machine.said("init").endswith("systemd")
            assert machine.said("store") == "/run/initramfs/cowfs/disk/sda1/sysrcd.bs"
            assert machine.said("boots") == boots
            machine.shows("the root filesystem and its store are unmounted cleanly")
    assert images.is_clean(images.from_fat(mine, "/sysrcd.bs", tmp_path / "after.bs")) == ""
    assert images.fat_is_clean(mine) == ""


# --- a system that boots from another root, and has merged trees mounted

_OPTIONS = "store=/img/b.bs,nofail,x-systemd.requires-mounts-for=/img,x-systemd.mount-timeout=30"
_FSTAB = f"""\
/dev/vda / ext4 defaults 0 1
/dev/vdb /img ext4 defaults 0 2
/img/lower.sqfs /mnt/b cowfs {_OPTIONS} 0 0
"""
_CONF = """\
LOWER=/img/lower.sqfs
STORE=/img/a.bs
MOUNTPOINT=/mnt/a
OPTIONS=rw
"""
_READER = """\
[Unit]
Requires=cowfs@a.service
After=cowfs@a.service
[Service]
Type=oneshot
ExecStart=/bin/cp /mnt/a/file /run/seen
[Install]
WantedBy=multi-user.target
"""
_ORDER = """\
[Unit]
After=reader.service cowfs@a.service
RequiresMountsFor=/mnt/b
"""
# Uses both trees, one of them for writing, while systemd unmounts them and until it kills all processes.
_HOLD = """
    systemd-run --quiet --unit=holder --property=DefaultDependencies=no \\
        sh -c 'cd /mnt/b; exec >>/mnt/a/held; echo x >/run/held; while :; do sleep 1; done'
    while [ ! -s /run/held ]; do sleep 0.1; done
"""
_SLOW = "throttling.bps-write=700000"
TEST_DESKTOP = """
    out "root: $(awk '$2 == "/" { print $3 }' /proc/mounts | tail -n 1)"
    out "reader: $(cat /run/seen)"
    out "units: $(systemctl is-active cowfs@a.service mnt-b.mount | tr '\\n' ' ')"
    out "kept: $(cat /mnt/a/kept /mnt/b/kept 2>/dev/null | tr '\\n' ' ')"
    for tree in /mnt/a /mnt/b; do
        echo $tree >$tree/kept
        python3 -Ic 'import mmap, sys
with open(sys.argv[1] + "/mapped", "w+b") as file:
    file.truncate(24 << 20)
    with mmap.mmap(file.fileno(), 24 << 20) as mapped: mapped.write(b"0123456789abcdef" * (24 << 16))' $tree
    done
    out "daemon: $(cat /proc/$(pidof -x mount.cowfs cowfs | cut -d ' ' -f 1)/cgroup)"
"""


@pytest.fixture(scope="module")
def desktop(debian: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a disk with a Debian with systemd, which mounts two merged trees at boot."""
    tree = ready_to_boot(debian, tmp_path_factory.mktemp("desktop") / "tree")
    (tree / "etc/fstab").write_text(_FSTAB)
    (tree / "etc/cowfs").mkdir()
    (tree / "etc/cowfs/a.conf").write_text(_CONF)
    for name in ("img", "mnt/a", "mnt/b"):
        (tree / name).mkdir()
    for name in ("mount.cowfs", "umount.cowfs"):  # see docs/rescue-system.md
        run("install", "-m", "755", images.HELPERS / name, tree / "sbin")
    (tree / "sbin/umount.fuse.cowfs").symlink_to("umount.cowfs")
    units = tree / "etc/systemd/system"
    (units / "reader.service").write_text(_READER)
    (units / "selftest.service.d").mkdir()
    (units / "selftest.service.d/order.conf").write_text(_ORDER)
    run("chroot", tree, "systemctl", "enable", "cowfs@a.service", "reader.service")
    size = int(run("du", "-sm", tree).stdout.split()[0])
    return images.ext4_disk(tree.parent / "root.img", tree, size * 5 // 4 + 64)


def test_systemd_mounts_at_boot_and_unmounts_clean(
    desktop: Path, initramfs: Callable[[str], Path], tmp_path: Path
) -> None:
    """One by the unit, one by fstab: there for who waits for them, and written back at the end.

    Also if they are in use then, and if it takes longer than systemd waits for an unmount.
    """
    lower, content = tmp_path / "lower", tmp_path / "content"
    for place in (lower, content):
        place.mkdir()
    (lower / "file").write_text("from the lower\n")
    run("mksquashfs", lower, content / "lower.sqfs", "-quiet", "-no-progress")
    for name in ("a.bs", "b.bs"):
        cowfs("create", content / name, "64", check=True)
    data = images.ext4_disk(tmp_path / "data.img", content, 192)
    made, kernel = initramfs("initramfs-tools"), images.kernel()[0]
    LOGS.mkdir(parents=True, exist_ok=True)
    line = "root=/dev/vda rw systemd.mask=serial-getty@ttyS0.service"
    line += " systemd.log_target=console systemd.log_level=notice"
    for number, (kept, more, disk) in enumerate((("", _HOLD, ()), ("/mnt/a /mnt/b", "", (_SLOW,))), 1):
        log, test = LOGS / f"desktop.{number}.log", TEST_DESKTOP + more
        devices = [*hard_disk(desktop, "root"), *hard_disk(data, "data", *disk)]
        with Machine(kernel, made, log, options=line, test=test, devices=devices, memory=768) as machine:
            machine.wait(_PATIENCE)
            assert machine.said("root") == "ext4"
            assert machine.said("reader") == "from the lower"
            assert machine.said("units").split() == ["active", "active"]
            assert machine.said("kept").strip() == kept
            machine.shows(
                r"mnt-b.mount: Unmounting timed out"
                if disk
                else r"mnt-b.mount: .*exited, code=exited, status=32"
            )
        assert images.is_clean(data) == ""
        for name in ("a", "b"):
            store = images.from_ext4(data, f"/{name}.bs", tmp_path / f"{name}.after")
            assert images.is_clean(store) == ""
            assert run("debugfs", "-R", "cat /upper/kept", store).stdout == f"/mnt/{name}\n"
            assert run("debugfs", "-R", "cat /upper/mapped", store).stdout == "0123456789abcdef" * (24 << 16)


# --- sysvinit


@pytest.fixture(scope="module")
def sysvinit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the root image of a small Debian with sysvinit, with debootstrap and mkrescue."""
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
    """The daemon survives the programs that end all processes, and everything is written at the end."""
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
