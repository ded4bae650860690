"""``cowfs persist`` to a disk by its name: it is mounted where nobody sees it, and is clean afterwards."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cowfs.cli.main import main
from cowfs.errors import StoreError
from cowfs.linux.loop_devices import attach_loop, loop_backing
from cowfs.linux.mount_table import mountinfo
from cowfs.store.disks import block_device, find
from tests.mount.test_persist import MIB, in_memory, info, refused
from tests.support.mounts import Mounted, cowfs, eventually, mounted
from tests.support.system import needs_fuse, needs_root, run
from tests.support.worker import script

DEV_FUSE_AT_NIGHT = True

pytestmark = [needs_fuse, needs_root]


class Disks:
    """Loop devices, which go away by themselves with their last user."""

    def __init__(self, place: Path) -> None:
        self._place, self._count = place, 0
        self._fds: dict[str, int] = {}

    def attach(self, file: Path, **how: Any) -> str:
        fd, device = attach_loop(file, **how)
        self._fds[device] = fd
        return device

    def detach(self, device: str) -> None:
        os.close(self._fds.pop(device))

    def detach_all(self) -> None:
        for device in list(self._fds):
            self.detach(device)

    def make(self, kind: str = "ext4", megabytes: int = 256, **how: Any) -> tuple[str, Path]:
        """A device with a filesystem on it, and its file."""
        self._count += 1
        file = self._place / f"disk{self._count}"
        with file.open("wb") as out:
            out.truncate(megabytes * MIB)
        if kind != "nothing":
            run("mke2fs", "-q", "-F", "-t", kind, file)
        return self.attach(file, **how), file


@pytest.fixture
def home(nobody_path: Path) -> Path:
    """A lower, and a directory to mount disks at."""
    for name in ("lower", "kept"):
        (nobody_path / name).mkdir()
    return nobody_path


@pytest.fixture
def disks(home: Path) -> Iterator[Disks]:
    made = Disks(home)
    yield made
    made.detach_all()


def released(device: str, file: Path) -> None:
    """The kernel lets go of a disk whose filesystem nobody has mounted any more; it is clean then."""
    eventually(lambda: loop_backing(device) is None, f"{device} is free")
    run("e2fsck", "-fn", file)
    state = run("dumpe2fs", "-h", file).stdout
    assert "needs_recovery" not in state
    assert "clean" in next(line for line in state.splitlines() if line.startswith("Filesystem state"))


def fds_on(here: Mounted, device: str) -> list[os.stat_result]:
    """What the daemon has open on a disk."""
    number = os.stat(device).st_rdev
    found = []
    for fd in Path(f"/proc/{here.pid()}/fd").iterdir():
        with suppress(OSError):
            if (there := fd.stat()).st_dev == number:
                found.append(there)
    return found


@pytest.mark.parametrize(
    ("kind", "named"), [("ext4", ""), ("ext2", "/sysrcd.bs"), ("ext3", "/my/stores/ö .bs")]
)
def test_a_disk_that_is_not_mounted(
    home: Path,
    disks: Disks,
    kind: str,
    named: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the disk alone, and by a path on it. At the end the disk is clean, and a boot finds the store."""
    device, file = disks.make(kind)
    if named.count("/") > 1:
        for name in ("/my", "/my/stores"):
            run("debugfs", "-w", "-R", f"mkdir {name}", file)
    before = len(mountinfo())
    with in_memory(home, nobody=False) as here:
        script("echo x > x", here)
        done = cowfs("persist", here.path, device + named, "160")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.endswith(f"kept in {device}{named or '/sysrcd.bs'} (160 MiB)\n")
        shown = info(here.path)["store"]
        assert (shown["kind"], shown["path"]) == ("image", f"{device}{named or '/sysrcd.bs'}")
        assert len(mountinfo()) == before + 1, "nobody else sees the disk mounted"
        opened = fds_on(here, device)
        assert opened and all(stat.S_ISREG(there.st_mode) for there in opened), "the image alone keeps it"
        script("echo later > later", here)
        disks.detach(device)
        assert loop_backing(device) is not None
        done = cowfs("grow", here.path, "180")
        assert (done.returncode, done.stderr) == (0, "")
        assert info(here.path)["store"]["size"] > 165 * MIB
        script("echo larger > larger", here)
    released(device, file)
    again = disks.attach(file)
    monkeypatch.setattr(find, "devices", lambda scope: iter([os.path.basename(again)]))
    (found,) = find.find_stores(find.Wanted(named or "/sysrcd.bs"))
    assert found.taken and found.facts["state"] == "clean"
    at = home / "kept"
    run("mount", again, at)
    try:
        with mounted(home / "lower", home / "mnt", at / (named or "sysrcd.bs").lstrip("/")) as here:
            assert script("cat x later larger", here) == "x\nlater\nlarger\n"
    finally:
        run("umount", at)


def test_a_disk_that_is_mounted_already(home: Path, disks: Disks) -> None:
    """The store is there for all to see, and the disk is in use."""
    device, file = disks.make()
    at = home / "kept"
    run("mount", device, at)
    try:
        with in_memory(home, nobody=False) as here:
            cowfs("persist", here.path, f"{device}/s", check=True)
            assert (at / "s").stat().st_size == 128 * MIB
            assert "busy" in run("umount", at, check=False).stderr
    finally:
        run("umount", at)
    disks.detach(device)
    released(device, file)


def test_a_disk_whose_place_is_hidden_by_another_mount(home: Path, disks: Disks) -> None:
    device, file = disks.make()
    at = home / "kept"
    run("mount", device, at)
    run("mount", "-t", "tmpfs", "tmpfs", at)
    try:
        with in_memory(home, nobody=False) as here:
            cowfs("persist", here.path, f"{device}/s", check=True)
            assert os.listdir(at) == []
    finally:
        run("umount", at)
        assert (at / "s").stat().st_size == 128 * MIB
        run("umount", at)
    disks.detach(device)
    released(device, file)


def test_what_a_boot_has_mounted_is_made_writable(
    home: Path, disks: Disks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk of the root image; it is read-only again if nothing came of it."""
    device, file = disks.make()
    at = home / "kept"
    run("mount", "-o", "ro", device, at)

    def mode() -> str:
        return next(mount.options for mount in mountinfo() if mount.mountpoint == os.fsencode(at))[:2]

    try:
        with in_memory(home, nobody=False) as here:
            refused(
                cowfs("persist", here.path, device),
                f"{device}: is mounted read-only on {at} (mount -o remount,rw",
            )
            monkeypatch.setattr(block_device, "_BOOT_DISKS", os.fsencode(home) + b"/")
            run("umount", at)
            run("mount", "-o", "ro,noload", device, at)
            assert main(["persist", str(here.path), device]) == 32
            assert f"{device}: its journal could not be replayed" in capsys.readouterr().err
            run("umount", at)
            run("mount", "-o", "ro", device, at)
            assert main(["persist", str(here.path), device, "15T"]) == 32
            assert mode() == "ro"
            assert main(["persist", str(here.path), device]) == 0
            assert mode() == "rw"
    finally:
        run("umount", at)
    disks.detach(device)
    released(device, file)


def test_what_is_no_place_for_a_store_is_refused(home: Path, disks: Disks) -> None:
    """In one line each; and no file is made in /dev, which is in memory as well."""
    good, file = disks.make()
    run("debugfs", "-w", "-R", "symlink /out /tmp", file)
    small, _ = disks.make(megabytes=64)
    protected, _ = disks.make(readonly=True)
    empty, _ = disks.make("nothing", 8)
    foreign, other = disks.make("nothing", 8)
    with other.open("r+b") as out:
        out.write(b"\xeb\x52\x90NTFS    ")
    mirrored, half = disks.make()
    with half.open("r+b") as out:
        out.seek(256 * MIB - 8192)
        out.write(b"\xfc\x4e\x2b\xa9")
    names = set(os.listdir("/dev"))
    with in_memory(home, nobody=False) as here:
        for place, said in (
            ("/dev/null", "/dev/null: not a block device"),
            ("/dev/null/s", "/dev/null: not a block device"),
            ("/dev/nosuch1", "/dev/nosuch1: no such device"),
            ("/dev/nosuch1/sysrcd.bs", "/dev/nosuch1: no such device"),
            (small, f"{small}/sysrcd.bs: needs 128 MiB more"),
            (protected, f"{protected}: is write-protected"),
            (empty, f"{empty}: contains no filesystem"),
            (foreign, f"{foreign}: holds an NTFS filesystem, which this kernel cannot"),
            (mirrored, f"{mirrored}: is one disk of a RAID"),
            (f"{good}/no/s", f"{good}/no/s: No such file or directory"),
            (f"{good}/out/s", f"{good}/out/s: leads to another filesystem"),
        ):
            refused(cowfs("persist", here.path, place), said)
        refused(cowfs("persist", here.path, good, nobody=True), f"{good}: only root can mount a disk", 2)
        fd = os.open(good, os.O_RDONLY | os.O_EXCL)
        try:
            refused(cowfs("persist", here.path, good), f"{good}: is in use")
        finally:
            os.close(fd)
        assert set(os.listdir("/dev")) - names == set()
        assert info(here.path)["store"]["kind"] == "memory"
        cowfs("persist", here.path, good, check=True)
    disks.detach(good)
    released(good, file)


def test_a_disk_that_others_stand_on(disks: Disks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says who; and which are the partitions of a disk that has no filesystem of its own."""
    device, _ = disks.make("nothing", 8)
    monkeypatch.setattr(block_device, "_facts", lambda _: tmp_path)
    (tmp_path / "holders/dm-3").mkdir(parents=True)
    held = pytest.raises(StoreError, match=rf"{device}: is in use by dm-3 \(try /dev/dm-3\)")
    with held, block_device.directory_of(device):
        pass
    (tmp_path / "holders/dm-3").rmdir()
    (tmp_path / "ro").write_text("0\n")
    for part in ("sdb1", "sdb2"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "partition").touch()
    with pytest.raises(StoreError, match="has the partitions sdb1, sdb2"), block_device.directory_of(device):
        pass
