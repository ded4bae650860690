"""Loop devices that the kernel detaches after their last user, however that process ends.

Needs Linux 5.8 (LOOP_CONFIGURE) and permission to open the devices.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from contextlib import closing, suppress
from pathlib import Path

from cowfs.linux.files import open_ordinary

# include/uapi/linux/loop.h
_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LOOP_GET_STATUS64 = 0x4C05
_LO_FLAGS_READ_ONLY, _LO_FLAGS_AUTOCLEAR = 1, 4
# struct loop_info64: device, inode, rdevice, offset, sizelimit; number, encrypt_type, key_size, flags;
# file_name[64], crypt_name[64], encrypt_key[32]; init[2]
_LOOP_INFO64 = struct.Struct("=5Q4I64s64s32s2Q")
_LOOP_CONFIG_HEAD = struct.Struct("=II")  # struct loop_config: fd, block_size; info; reserved[8]
_LOOP_CONFIG_RESERVED = bytes(64)
_LOOP_TRIES = 64


def attach_loop(
    image: str | bytes | os.PathLike[str] | int, *, readonly: bool = False, offset: int = 0
) -> tuple[int, str]:
    """Attach a file to a free loop device; return a descriptor of the device, and its path.

    *image* is a path or an open descriptor. The kernel keeps its open file description, and any flock(2) on
    it, until the device is detached: when its last user, at first the returned descriptor, closes it.
    *offset* is in bytes. OSError.
    """
    if not isinstance(image, int):
        flags = os.O_RDONLY if readonly else os.O_RDWR
        fd = open_ordinary(image, flags)  # it may have become a fifo
        try:
            return attach_loop(fd, readonly=readonly, offset=offset)
        finally:
            os.close(fd)
    for _ in range(_LOOP_TRIES):
        device = _free_loop()
        fd = os.open(device, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _LOOP_CONFIGURE, _loop_config(image, readonly, offset))
        except OSError as error:
            os.close(fd)
            if error.errno != errno.EBUSY:  # another process took it first: try the next one
                raise
        else:
            return fd, device
    raise OSError(errno.EBUSY, "no loop device available: other processes took each one first")


def _free_loop() -> str:
    """Return the path of a loop device that is free at the moment."""
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        # ioctl(2) returns the number, which is not an error.
        number = int(fcntl.ioctl(control, _LOOP_CTL_GET_FREE))
    finally:
        os.close(control)
    device = f"/dev/loop{number}"
    if not os.path.exists(device):  # no devtmpfs, or udev is late
        major, minor = Path(f"/sys/class/block/loop{number}/dev").read_text().split(":")
        with suppress(FileExistsError):
            os.mknod(device, stat.S_IFBLK | 0o600, os.makedev(int(major), int(minor)))
    return device


def _loop_config(image_fd: int, readonly: bool, offset: int) -> bytes:
    flags = _LO_FLAGS_AUTOCLEAR | (_LO_FLAGS_READ_ONLY if readonly else 0)
    name = os.readlink(b"/proc/self/fd/%d" % image_fd)[:63]
    info = _LOOP_INFO64.pack(0, 0, 0, offset, 0, 0, 0, 0, flags, name, b"", b"", 0, 0)
    return _LOOP_CONFIG_HEAD.pack(image_fd, 0) + info + _LOOP_CONFIG_RESERVED


def loop_backing(device: str) -> bytes | None:
    """Return the name of the file behind a loop device, as the kernel reports it; None if detached."""
    try:
        name = Path(f"/sys/block/{os.path.basename(device)}/loop/backing_file").read_bytes()
    except OSError:
        return None
    return name.rstrip(b"\n")


def loop_inode(device: str) -> tuple[int, int] | None:
    """Return device and inode number of the file behind a loop device; None if detached or not root."""
    buffer = bytearray(_LOOP_INFO64.size)
    try:
        with closing(open(device, "rb", buffering=0)) as file:
            fcntl.ioctl(file, _LOOP_GET_STATUS64, buffer, True)
    except OSError:
        return None
    device_number, inode = struct.unpack_from("=QQ", buffer)
    return device_number, inode
