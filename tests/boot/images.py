"""Make what the virtual machines boot: a Debian kernel, a root image, disks. Nothing is mounted for it."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tests.support.debian import bootstrap, release
from tests.support.mounts import project_root
from tests.support.system import run

PROJECT = Path(project_root())
HELPERS = PROJECT / "mount-helpers"
CACHE = PROJECT / ".cache" / "boot"
KERNEL_PACKAGE = "linux-image-amd64"
NEWER_KERNEL = "linux-image-6.12-amd64"
"""This kernel reads and writes NTFS, which the other does not. Its modules are compressed."""
BUSYBOX = Path("/bin/busybox")
MODULES = """
    fuse squashfs loop ext4 crc32c_generic vfat nls_cp437 nls_ascii nls_utf8 isofs
    virtio_pci virtio_blk virtio_scsi sd_mod sr_mod xhci_pci usb_storage qemu_fw_cfg
"""
"""Only the modules that these machines need, which is faster; and those for the test itself."""
_MB = 1 << 20
_SECTOR = 512
_PARTITION = _MB
"""The start of a stick's partition, in bytes."""

# Runs the test of the machine as process 1. The test decides how it ends.
_TEST_INIT = """\
#!/bin/sh
PATH=/usr/sbin:/usr/bin:/sbin:/bin
export PATH
out() { echo "TEST $*" >/dev/console; }
finish() { cd / && exec /run/initramfs/shutdown "${1:-poweroff}"; }
script=/sys/firmware/qemu_fw_cfg/by_name/opt/test/raw
[ -e $script ] || script=/dev/ubdp # user-mode Linux has no firmware
. $script >/dev/console 2>&1
finish
"""
_INITTAB = """\
::once:/sbin/testinit
::shutdown:/run/initramfs/shutdown poweroff
"""


@contextmanager
def alone(what: str) -> Iterator[None]:
    """Keep other test processes from making the same thing at the same time."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{what}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def kernel(package: str = KERNEL_PACKAGE) -> tuple[Path, Path, str]:
    """Return a kernel, the directory with its lib/modules, and its version; it is unpacked, not installed.

    *package* is the one that depends on the newest of its kind; where there is none of that name, the usual
    kernel is as new (Debian 13).
    """
    if package != KERNEL_PACKAGE and not run("apt-cache", "depends", package, check=False).stdout:
        return kernel()
    name = "kernel" if package == KERNEL_PACKAGE else package
    place = CACHE / name
    with alone(name):
        if not list(place.glob("boot/vmlinuz-*")):
            partial = CACHE / f"{name}.new"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            shown = run("apt-cache", "depends", "--important", package).stdout
            match = re.search(r"Depends: (linux-image-[0-9]\S+)", shown)
            assert match, f"apt-cache names no kernel:\n{shown}"
            run("apt-get", "-o", "APT::Sandbox::User=root", "download", match[1], cwd=partial, timeout=300)
            (archive,) = partial.glob("*.deb")
            run("dpkg-deb", "-x", archive, partial, timeout=120)
            archive.unlink()
            if not (partial / "lib").exists():  # Debian 13 has everything in /usr
                (partial / "lib").symlink_to("usr/lib")
            (version,) = os.listdir(partial / "lib/modules")
            run("depmod", "-b", partial, version, timeout=120)
            partial.rename(place)
    (version,) = os.listdir(place / "lib/modules")
    return place / "boot" / f"vmlinuz-{version}", place, version


def initramfs(out: Path, modules: str = "", package: str = KERNEL_PACKAGE) -> Path:
    """Make the initramfs of mkinitramfs-busybox, with what the tests' own process 1 needs besides.

    *modules* are more of mount-helpers/boot/modules: some take seconds to load. *package* is the kernel's.
    """
    _, root, version = kernel(package)
    run(
        HELPERS / "mkinitramfs-busybox", out, version, root,
        env={**os.environ, "COWFS_MODULES": f"{MODULES} {modules}"}, timeout=120,
    )  # fmt: skip
    return out


def with_mapping(out: Path, initramfs: Path, disk: str) -> Path:
    """Add to an initramfs what makes a device-mapper device of a whole disk before anything else happens.

    The kernel unpacks any number of archives one after the other (early-userspace/buffer-format).
    """
    tree = out.with_suffix(".tree")
    (tree / "usr/sbin").mkdir(parents=True)
    for name in ("lib", "lib64"):  # the loader's directories
        (tree / "usr" / name).mkdir()
        (tree / name).symlink_to(f"usr/{name}")
    copy_program(tree, Path(shutil.which("dmsetup") or "/usr/sbin/dmsetup"))
    shutil.copy(HELPERS / "boot/init", tree / "init.cowfs")
    (tree / "init").write_text(_MAPPING_INIT.replace("DISK", disk))
    (tree / "init").chmod(0o755)
    run("sh", "-c", f"cd {tree} && find . | cpio --quiet -o -H newc | gzip -1 >{out}.added")
    out.write_bytes(initramfs.read_bytes() + Path(f"{out}.added").read_bytes())
    return out


_MAPPING_INIT = """\
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox --install -s /bin
PATH=/bin:/usr/sbin
export PATH
mount -t devtmpfs dev /dev && mount -t proc proc /proc && mount -t sysfs sys /sys
xargs modprobe -a </etc/modules 2>/dev/null
until [ -b /dev/DISK ]; do usleep 10000; done
dmsetup --noudevrules --noudevsync create mine --table "0 $(cat /sys/block/DISK/size) linear /dev/DISK 0"
umount /sys /proc /dev
exec /init.cowfs
"""


# --- the root image


def root_tree(tree: Path) -> Path:
    """Make a small root filesystem: busybox, this machine's Python and e2fsprogs, and cowfs by mkrescue."""
    for name in (
        "usr/bin",
        "usr/sbin",
        "usr/lib",
        "usr/lib64",
        "etc",
        "dev",
        "proc",
        "sys",
        "run",
        "tmp",
        "root",
        "var/lib",
    ):
        (tree / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (tree / name).symlink_to(f"usr/{name}")
    (tree / "tmp").chmod(0o1777)
    shutil.copy2(BUSYBOX, tree / "usr/bin/busybox")
    for applet in run(BUSYBOX, "--list").stdout.split():
        if applet != "busybox":
            (tree / "usr/bin" / applet).symlink_to("busybox")
    _python(tree)
    for program in ("e2fsck", "mke2fs", "resize2fs"):
        copy_program(
            tree,
            Path("/usr/sbin", program) if Path("/usr/sbin", program).exists() else Path("/sbin", program),
        )
    if cryptsetup := shutil.which("cryptsetup", path="/usr/sbin:/sbin"):
        copy_program(tree, Path(cryptsetup))
        unwinder = re.search(r"libgcc_s\.so\.1 .*=> (/\S+)", run("ldconfig", "-p").stdout)
        if unwinder:  # threads need it to exit
            copy = (
                tree
                / "usr"
                / Path(unwinder[1]).relative_to("/usr" if unwinder[1].startswith("/usr/") else "/")
            )
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(Path(unwinder[1]).resolve(), copy)
    _libraries(tree, _loaded_by_cowfs())
    (tree / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")
    (tree / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
    (tree / "etc/shadow").write_text("root:*:1::::::\n")
    (tree / "etc/shadow").chmod(0o600)
    (tree / "etc/mtab").symlink_to("/proc/mounts")
    (tree / "etc/motd").write_text("to be removed\n")
    (tree / "etc/inittab").write_text(_INITTAB)
    (tree / "usr/bin/init").unlink()
    (tree / "usr/sbin/init").symlink_to("../bin/busybox")
    (tree / "usr/sbin/testinit").write_text(_TEST_INIT)
    (tree / "usr/sbin/testinit").chmod(0o755)
    return tree


def _python(tree: Path) -> None:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    program = Path(f"/usr/bin/{version}")
    copy_program(tree, program)
    (tree / "usr/bin/python3").symlink_to(version)
    unwanted = shutil.ignore_patterns(
        "test", "tests", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtle*", "pydoc_data",
        "config-*", "dist-packages", "distutils", "*.opt-*.pyc",
    )  # fmt: skip
    library = Path(sysconfig.get_path("stdlib"))
    shutil.copytree(library, tree / library.relative_to("/"), ignore=unwanted, symlinks=True)
    _libraries(tree, (tree / library.relative_to("/")).glob("lib-dynload/*.so"))


def copy_program(tree: Path, program: Path) -> None:
    """Copy a program into a tree, with the libraries that it needs."""
    shutil.copy2(program.resolve(), tree / program.resolve().relative_to("/"))
    _libraries(tree, [program])


def _loaded_by_cowfs() -> list[Path]:
    """Return the compiled modules of cowfs and of its dependencies."""
    packages = Path(sysconfig.get_path("platlib"))
    found = [*PROJECT.glob("cowfs/**/*.so"), *packages.glob("_cffi_backend*.so")]
    for name in ("pyfuse3", "isal", "lz4", "zstandard"):
        found += packages.glob(f"{name}/**/*.so")
    return found


def _libraries(tree: Path, files: Iterable[Path]) -> None:
    """Copy the shared libraries of programs and modules to where the loader finds them."""
    for file in files:
        for match in re.finditer(r"(?:=> )?(/\S+) \(0x", run("ldd", file, check=False).stdout):
            library = Path(match[1])
            target = tree / (
                "usr" / library.relative_to("/") if library.parts[1] != "usr" else library.relative_to("/")
            )
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(library.resolve(), target)


def root_image(tree: Path, image: Path) -> Path:
    """Install cowfs in the tree and make the squashfs, both with mkrescue."""
    run(HELPERS / "mkrescue", tree, image, "-comp", "zstd", "-Xcompression-level", "3", timeout=180)
    return image


def debian(tree: Path, kind: str, packages: Iterable[str], *debootstrap: str) -> Path:
    """Make the tree of a small Debian with these packages. Kept by its *kind* in .cache: it takes minutes.

    What packages were fetched with is not in it, so that its image is small.
    """
    kept = CACHE / kind
    with alone(kind):
        if not kept.exists():
            bootstrap(release(), kept, packages, *debootstrap)  # with this machine's cowfs, so of its release
    run("cp", "-a", kept, tree, timeout=300)
    for name in ("var/cache/apt", "var/lib/apt/lists"):
        shutil.rmtree(tree / name, ignore_errors=True)
    return tree


# --- disks


def fat_stick(image: Path, files: Mapping[str, Path], megabytes: int) -> Path:
    """Make a stick as it is sold, with one FAT partition. File names may have any characters."""
    with image.open("wb") as out:
        out.truncate(_PARTITION + megabytes * _MB)
        out.write(_partition_table(0x0C, megabytes))
    run("mkfs.vfat", "-F", "32", "--offset", str(_PARTITION // _SECTOR), image, str(megabytes << 10))
    environment = {**os.environ, "MTOOLS_SKIP_CHECK": "1", "LC_ALL": "C.UTF-8"}
    for name, file in files.items():
        parts = name.strip("/").split("/")
        for depth in range(1, len(parts)):
            above = "/".join(parts[:depth])
            run("mmd", "-D", "s", "-i", f"{image}@@{_PARTITION}", f"::{above}", env=environment, check=False)
        run("mcopy", "-i", f"{image}@@{_PARTITION}", file, f"::{name}", env=environment)
    return image


def from_fat(image: Path, name: str, target: Path) -> Path:
    """Copy a file from a stick."""
    run(
        "mcopy",
        "-n",
        "-i",
        f"{image}@@{_PARTITION}",
        f"::{name}",
        target,
        env={**os.environ, "MTOOLS_SKIP_CHECK": "1"},
    )
    return target


def _partition_table(kind: int, megabytes: int) -> bytes:
    """Return an MBR with one partition, without cylinder addresses, as is usual today."""
    entry = struct.pack(
        "<B3sB3sII", 0, bytes(3), kind, bytes(3), _PARTITION // _SECTOR, megabytes * _MB // _SECTOR
    )
    return bytes(446) + entry + bytes(48) + b"\x55\xaa"


MAKERS = {
    "ext2": ("mke2fs", "-q", "-F", "-t", "ext2"),
    "ext3": ("mke2fs", "-q", "-F", "-t", "ext3"),
    "ext4": ("mke2fs", "-q", "-F", "-t", "ext4"),
    "vfat": ("mkfs.vfat", "-F", "32"),
    "exfat": ("mkfs.exfat",),
    "btrfs": ("mkfs.btrfs", "-q"),
    "xfs": ("mkfs.xfs", "-q"),
    "ntfs": ("mkntfs", "-q", "-Q", "-F"),
}
"""The programs that make each filesystem in a file."""


def carrier(image: Path, kind: str, megabytes: int, table: str = "") -> Path:
    """Make an empty disk: a whole disk, or the only partition in a *table*, ``mbr`` or ``gpt``."""
    part = image.with_suffix(".part") if table else image
    with part.open("wb") as out:
        out.truncate(megabytes * _MB)
    run(*MAKERS[kind], part)
    if table:
        with image.open("wb") as out:
            out.truncate(2 * _PARTITION + megabytes * _MB)
            if table == "gpt":
                _write_gpt(out, megabytes * _MB // _SECTOR)
            else:
                out.write(_partition_table(0x07 if kind in {"exfat", "ntfs"} else 0x83, megabytes))
        _copy(part, image, skip=0, seek=_PARTITION)
        part.unlink()
    return image


def carrier_of(image: Path, table: str) -> Path:
    """Copy the filesystem of such a disk to its own file."""
    if not table:
        return image
    image.with_suffix(".part").unlink(missing_ok=True)
    return _copy(image, image.with_suffix(".part"), skip=_PARTITION, seek=0)


def _copy(source: Path, target: Path, *, skip: int, seek: int) -> Path:
    run(
        "dd", f"if={source}", f"of={target}", "bs=1M", f"skip={skip // _MB}", f"seek={seek // _MB}",
        "conv=sparse,notrunc", "status=none",
    )  # fmt: skip
    return target


def carrier_complaints(part: Path, kind: str) -> str:
    """Return the errors that a checker finds, or that it was not unmounted; "" if it is clean."""
    if kind.startswith("ext"):
        return is_clean(part)
    checkers = {
        "vfat": ("fsck.vfat", "-n"),
        "exfat": ("fsck.exfat", "-n"),
        "btrfs": ("btrfs", "check", "--readonly"),
        "xfs": ("xfs_repair", "-n"),
        "ntfs": ("ntfsinfo", "-m"),
    }
    done = run(*checkers[kind], part, check=False)
    marks = {"vfat": "Dirty bit", "xfs": "valuable metadata changes", "ntfs": "DIRTY"}
    said = done.stdout + done.stderr
    dirty = marks.get(kind, "\0") in said
    if kind == "exfat":  # VolumeFlags: VolumeDirty
        dirty = bool(part.read_bytes()[106] & 2)
    if kind == "btrfs":
        dirty = not re.search(
            r"^log_root\s+0$", run("btrfs", "inspect-internal", "dump-super", part).stdout, re.M
        )
    return said if done.returncode or dirty else ""


def from_carrier(part: Path, kind: str, name: str, target: Path) -> Path | None:
    """Copy a file from an unmounted filesystem; return None if no tool can."""
    if kind.startswith("ext"):
        return from_ext4(part, name, target)
    if kind == "vfat":
        run("mcopy", "-n", "-i", part, f"::{name}", target, env={**os.environ, "MTOOLS_SKIP_CHECK": "1"})
        return target
    if kind == "btrfs":
        place = target.with_suffix(".restored")
        place.mkdir()
        run("btrfs", "restore", part, place)
        (place / name.lstrip("/")).rename(target)
        place.rmdir()
        return target
    if kind == "ntfs":
        with target.open("wb") as out:
            subprocess.run(["ntfscat", part, name], stdout=out, check=True, timeout=60)
        return target
    return None


def _write_gpt(out: IO[bytes], sectors: int) -> None:
    """Return a GPT with one partition, and its copy for the end of the disk (UEFI specification, 5.3)."""
    data = bytes.fromhex("af3dc60f838472478e793d69d8477de4")  # Linux filesystem data
    first, last = _PARTITION // _SECTOR, _PARTITION // _SECTOR + sectors - 1
    end = out.seek(0, os.SEEK_END) // _SECTOR
    entry = struct.pack("<16s16sQQQ72s", data, bytes(range(16)), first, last, 0, "cowfs".encode("utf-16-le"))
    entries = entry.ljust(128 * 128, b"\0")
    for here, other, table in ((1, end - 1, 2), (end - 1, 1, end - 33)):
        fields = (here, other, 34, end - 34, bytes(range(16, 32)), table, 128, 128, zlib.crc32(entries))
        header = struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, *fields)
        header = header[:16] + struct.pack("<I", zlib.crc32(header)) + header[20:]
        out.seek(here * _SECTOR)
        out.write(header)
        out.seek(table * _SECTOR)
        out.write(entries)
    out.seek(446)
    out.write(struct.pack("<B3sB3sII", 0, bytes(3), 0xEE, bytes(3), 1, end - 1))
    out.seek(510)
    out.write(b"\x55\xaa")


def ext4_disk(image: Path, content: Path, megabytes: int, *, kind: str = "ext4") -> Path:
    """Make a disk without partitions, with the files of a directory."""
    run("mke2fs", "-q", "-F", "-t", kind, "-d", content, image, f"{megabytes}M")
    return image


def iso(image: Path, content: Path) -> Path:
    """Make an ISO 9660 image with Rock Ridge names."""
    run("xorriso", "-as", "mkisofs", "-quiet", "-R", "-o", image, content)
    return image


def from_ext4(image: Path, name: str, target: Path) -> Path:
    """Copy a file from such a disk."""
    run("debugfs", "-R", f'dump "{name}" {target}', image)
    assert target.exists(), f"{image} has no {name}"
    return target


def is_clean(store: Path) -> str:
    """Return the errors that e2fsck -n finds; "" if the filesystem is clean."""
    done = run("e2fsck", "-f", "-n", store, check=False)
    state = run("dumpe2fs", "-h", store).stdout
    if done.returncode or not re.search(r"Filesystem state: +clean", state) or "needs_recovery" in state:
        return done.stdout + state
    return ""


def fat_is_clean(image: Path) -> str:
    """Return the errors that fsck.vfat finds on a stick; "" if it is clean."""
    partition = image.with_suffix(".part")
    with image.open("rb") as whole, partition.open("wb") as out:
        whole.seek(_PARTITION)
        shutil.copyfileobj(whole, out, _MB)
    done = run("fsck.vfat", "-n", partition, check=False)
    partition.unlink()
    return "" if done.returncode == 0 and "Dirty bit" not in done.stdout else done.stdout
