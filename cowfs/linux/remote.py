"""Find out whether a filesystem may wait for another machine or a program (NFS, FUSE), perhaps for ever.

Other filesystems wait only for the disks of this machine.
"""

from __future__ import annotations

import os
import re
import stat

from cowfs.linux import filesystems
from cowfs.linux.files import fs_magic

_OWN = {
    *(filesystems.EXT, filesystems.XFS, filesystems.BTRFS, filesystems.F2FS, filesystems.BCACHEFS),
    *(filesystems.TMPFS, filesystems.RAMFS, filesystems.SYSFS, filesystems.PROC, filesystems.OVERLAYFS),
    *(filesystems.SQUASHFS, filesystems.EROFS, filesystems.CRAMFS, filesystems.CRAMFS_SWAPPED),
    *(filesystems.ROMFS, filesystems.ISOFS, filesystems.UDF, filesystems.FAT, filesystems.EXFAT),
    *(filesystems.NTFS, filesystems.NTFS3, filesystems.ZFS, filesystems.JFS, filesystems.REISERFS),
    *(filesystems.NILFS, filesystems.UFS, filesystems.HFS, filesystems.HFSPLUS, *filesystems.MINIX),
    *(filesystems.ZONEFS, filesystems.UBIFS, filesystems.JFFS2),
}
"""The f_type of filesystems that do not wait. All others may: FUSE, network filesystems, unknown ones."""
_FAR_DISKS = re.compile(r"(nbd|rbd|drbd|ublkb|etherd)")
_DEEPEST = 8
"""How many nested filesystems and devices are examined."""


def may_wait(fd: int, depth: int = 0) -> bool:
    """Whether the filesystem of *fd*, or the device or file that holds it, may wait for others.

    The kernel's overlayfs counts as one that does not. The call asks the filesystem, so it may block.
    OSError.
    """
    if fs_magic(fd) not in _OWN:
        return True
    info = os.fstat(fd)
    device = info.st_rdev if stat.S_ISBLK(info.st_mode) else info.st_dev
    return _device_waits(f"{os.major(device)}:{os.minor(device)}", depth)


def _device_waits(number: str, depth: int) -> bool:
    """Whether a block device may wait for others; False if sysfs does not have it."""
    place = os.path.realpath(f"/sys/dev/block/{number}")
    if not os.path.isdir(place) or depth >= _DEEPEST:
        return False
    if os.path.exists(f"{place}/partition"):
        place = os.path.dirname(place)
    if _FAR_DISKS.match(os.path.basename(place)):
        return True
    if os.path.exists(f"{place}/loop/backing_file"):
        return _loop_waits(f"{place}/loop/backing_file", depth)
    try:
        parts = os.listdir(f"{place}/slaves")
        numbers = [_read(f"{place}/slaves/{part}/dev") for part in parts]
    except OSError:
        return False
    return any(_device_waits(one, depth + 1) for one in numbers)


def _loop_waits(attribute: str, depth: int) -> bool:
    try:
        fd = os.open(_read(attribute), os.O_PATH)
    except OSError:  # removed, or in another mount namespace
        return False
    try:
        return may_wait(fd, depth + 1)
    finally:
        os.close(fd)


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return file.read().rstrip("\n")
