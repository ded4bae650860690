"""Open files on block devices whose filesystems contain stores and root images.

The types of filesystems and their mount options are also in mount-helpers/boot/cowfs-boot.sh. The mounts made
here are not visible to other processes.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from cowfs.errors import StoreError, SystemFailure
from cowfs.linux import mount_table, mounts
from cowfs.linux.files import matching
from cowfs.linux.mount_table import MountInfo
from cowfs.linux.trust import who_can_redirect
from cowfs.store.format.sniff import what_is

DEFAULT = "/sysrcd.bs"
"""The path of the store on a block device, if none was given."""

_BOOT_DISKS = b"/run/initramfs/cowfs/disk/"
"""The directory in which a boot mounts the device of the root image: read-only unless it has the store
too."""

_DAEMONS_OWN = b"/run/initramfs/cowfs/world/"
"""The directory in which the root daemon sees the same mounts again."""

_JOURNAL_IS_LEFT = {"noload", "norecovery", "rescue=nologreplay"}

_MD_MAGIC = b"\xfc\x4e\x2b\xa9"

_Options = dict[str, str | None]


class _Kind(NamedTuple):
    fstype: str
    called: str
    """A part of the text that :func:`what_is` returns for it."""
    naming: _Options
    """Mount options for the encoding of names."""
    look: _Options
    """Mount options that, with ``ro``, prevent every write: no journal is replayed."""


_KINDS = (
    _Kind("ext4", "ext4", {}, {"noload": None}),  # also mounts ext2 and ext3
    _Kind("vfat", " FAT", {"utf8": None}, {}),
    _Kind("exfat", "exFAT", {"iocharset": "utf8"}, {}),
    _Kind("ntfs3", "NTFS", {"iocharset": "utf8"}, {}),
    _Kind("iso9660", "ISO 9660", {"utf8": None}, {}),
    _Kind("udf", "UDF", {}, {}),
    _Kind("btrfs", "btrfs", {}, {"rescue": "nologreplay"}),
    _Kind("xfs", "XFS", {}, {"norecovery": None}),
)
_OF_ANOTHER_KIND = {errno.EINVAL, errno.ENODEV}


def _likely(what: str) -> list[_Kind]:
    """Return all types, those that *what* names first: drivers log errors about foreign filesystems."""
    return sorted(_KINDS, key=lambda kind: kind.called not in what)


def _content(device: str) -> str:
    with open(device, "rb", buffering=0) as disk:
        return what_is(disk.fileno())


def look(device: str) -> tuple[int, str] | None:
    """Mount the filesystem of *device* without changing it; return its root (O_PATH) and its type.

    The type is the kernel's name for it. None if the kernel recognises no filesystem. Blocks; OSError.
    """
    try:
        kinds = _likely(_content(device))
    except OSError:  # no disc in the drive
        return None
    for kind in kinds:
        with suppress(OSError):
            options = {**kind.naming, **kind.look}
            return mounts.detached_mount(kind.fstype, device, options, readonly=True), kind.fstype
    return None


def mounts_of(device: str) -> list[MountInfo]:
    """Return the mounts of the whole filesystem of a block device, the newest last."""
    number = os.stat(device).st_rdev
    at = f"{os.major(number)}:{os.minor(number)}"
    return [
        mount
        for mount in mount_table.mountinfo()
        if mount.root == b"/"
        and not mount.mountpoint.startswith(_DAEMONS_OWN)
        and (mount.dev == at or (mount.fstype == "btrfs" and _is(mount.source, number)))
    ]


def _is(source: bytes, number: int) -> bool:
    """Whether *source* is the node of the device *number*: files on btrfs have another device number."""
    try:
        return os.stat(source).st_rdev == number
    except OSError:
        return False


def is_raid_member(device: str) -> bool:
    """Whether a disk belongs to a RAID whose superblock is at the end (versions 0.90 and 1.0 of md(4)).

    The filesystem on such a disk could be mounted as if there were no other disks. Needs root, else False.
    """
    with suppress(OSError), open(device, "rb", buffering=0) as disk:
        sectors = disk.seek(0, os.SEEK_END) // 512
        places = ((sectors & ~127) - 128, (sectors - 16) & ~7)
        return any(os.pread(disk.fileno(), 4, place * 512) == _MD_MAGIC for place in places if place > 0)
    return False


def split(path: str) -> tuple[str, str]:
    """Return the block device at the start of the absolute *path*, and the path on it; "" and *path* if none.

    StoreError if *path* names a disk that does not exist.
    """
    parts = path.strip("/").split("/")
    prefix = "/"
    for part in parts:
        above, prefix = prefix, os.path.join(prefix, part)
        try:
            mode = os.stat(prefix).st_mode
        except OSError:
            why = "no such device"
            break
        if stat.S_ISBLK(mode):
            return prefix, path[len(prefix) :] or DEFAULT
        if not stat.S_ISDIR(mode):
            why = "not a block device"
            break
    else:
        return "", path
    if prefix.startswith("/dev/") and os.stat(above).st_dev == os.stat("/dev").st_dev:
        # A file created in /dev would be in memory.
        raise StoreError(f"{prefix}: {why}", "lsblk lists the disks")
    return "", path


@contextmanager
def directory_of(path: str) -> Iterator[tuple[int, str]]:
    """Open the directory in which to create the file *path*; yield its descriptor, and the name.

    *path* may begin with a block device, or be one. Then its filesystem is mounted writable, invisible to
    other processes, until everything opened through the descriptor is closed. A filesystem that the boot
    mounted read-only is made writable, and read-only again if the block fails.

    Blocks. StoreError, also if another user's symbolic link leads there; SystemFailure if not root.
    """
    device, below = split(os.path.abspath(path))
    directory, name = os.path.split(below)
    with ExitStack() as stack:
        root = None
        if device:
            root = _open(device, stack)
            stack.callback(os.close, root)
            directory = "." + directory
        try:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
        except OSError as error:
            raise StoreError(
                f"{device}{below}: {error.strerror}", "name a directory of that disk" if device else ""
            ) from None
        stack.callback(os.close, fd)
        reason = who_can_redirect(device) if device else who_can_redirect(directory, fd)
        if reason is not None:
            raise StoreError(f"{device}{below}: {reason}", "give a name in the directory itself")
        if root is not None and mount_table.mount_id(fd) != mount_table.mount_id(root):
            raise StoreError(
                f"{device}{below}: leads to another filesystem, through a symbolic link or a mount",
                "name a directory of that disk",
            )
        yield fd, name


def _open(device: str, stack: ExitStack) -> int:
    """Return the root (O_PATH) of the filesystem on *device*, made writable. *stack* undoes this on
    failure."""
    if os.geteuid() != 0:
        raise SystemFailure(f"{device}: only root can mount a disk", "give a path on a mounted filesystem")
    if is_raid_member(device):
        raise StoreError(f"{device}: is one disk of a RAID", "give the RAID device itself")
    for mount in reversed(mounts_of(device)):
        if mount.super_options.split(",")[0] == "ro":
            _make_writable(device, mount, stack)
        elif "ro" in mount.options.split(","):
            continue
        fd = os.open(mount.mountpoint, os.O_PATH | os.O_CLOEXEC)
        if mount_table.mount_id(fd) == mount.id:  # nothing is mounted over it
            return fd
        os.close(fd)
    facts = _facts(device)
    with suppress(OSError):
        if holders := sorted(os.listdir(facts / "holders")):
            raise StoreError(f"{device}: is in use by {', '.join(holders)}", f"try /dev/{holders[0]}")
        if (facts / "ro").read_text().strip() == "1":
            raise StoreError(f"{device}: is write-protected", "unlock its switch, or use another disk")
    return _mount(device)


def _make_writable(device: str, mount: MountInfo, stack: ExitStack) -> None:
    where = os.fsdecode(mount.mountpoint)
    if not mount.mountpoint.startswith(_BOOT_DISKS):
        raise StoreError(f"{device}: is mounted read-only on {where}", f"mount -o remount,rw {where}")
    if _JOURNAL_IS_LEFT & set(mount.super_options.split(",")):
        raise StoreError(
            f"{device}: its journal could not be replayed", "check that filesystem first, with its own fsck"
        )
    try:
        mounts.remount(mount.mountpoint, readonly=False)
    except OSError as error:
        raise StoreError(
            f"{device}: cannot be made writable: {error.strerror}", "for details see dmesg"
        ) from None

    def undo(kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            with suppress(OSError):  # fails with EBUSY while a file there is open for writing
                mounts.remount(mount.mountpoint, readonly=True)

    stack.push(undo)


def _facts(device: str) -> Path:
    """Return the directory in /sys that describes a block device."""
    number = os.stat(device).st_rdev
    return Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")


def _mount(device: str) -> int:
    try:
        what = _content(device)
    except OSError as error:
        raise StoreError(f"{device}: cannot be read: {error.strerror}", "for details see dmesg") from None
    for kind in _likely(what):
        try:
            return mounts.detached_mount(kind.fstype, device, kind.naming)
        except OSError as error:
            if error.errno in _OF_ANOTHER_KIND:
                continue
            raise StoreError(
                f"{device}: {_why_not(kind.fstype, error)}", "use another disk, or see dmesg"
            ) from None
    if parts := sorted(place.parent.name for place in matching(_facts(device), "*/partition")):
        raise StoreError(
            f"{device}: has the partitions {', '.join(parts)}", f"give one of them: /dev/{parts[0]}"
        )
    if what.startswith("a file"):
        raise StoreError(f"{device}: contains no filesystem", "make one first, such as by mkfs.ext4")
    raise StoreError(f"{device}: holds {what}, which this kernel cannot mount", "use another disk")


def _why_not(fstype: str, error: OSError) -> str:
    if error.errno == errno.EBUSY:
        return "is in use"
    if error.errno in {errno.EACCES, errno.EROFS}:
        return f"holds a read-only {fstype} filesystem"
    return f"its {fstype} filesystem cannot be mounted: {error.strerror}"
