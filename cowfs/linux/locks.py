"""Find the process that holds a lock on a file, and lock single bytes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import struct
from contextlib import suppress
from pathlib import Path

from cowfs.linux.files import matching
from cowfs.linux.mount_table import mount_id, mountinfo


def who_locks(path: str | bytes | os.PathLike[str]) -> int | None:
    """Return the pid of the process that holds a flock(2) on *path*; None if none is visible.

    /proc/locks names the process that took the lock. If it has ended (it was a daemon's parent; a PID
    namespace then shows no line at all), search for the process that has the file open. For other users'
    processes only root can do that.
    """
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        inode = os.fstat(fd).st_ino
        device = _device_of(fd)
    finally:
        os.close(fd)
    pids = []
    # 1: FLOCK  ADVISORY  WRITE 1234 fe:00:123456 0 EOF     ("1: -> FLOCK" waits for it)
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if len(fields) < 6 or fields[1] != "FLOCK":
            continue
        major, minor, number = fields[5].split(":")
        if (int(major, 16), int(minor, 16), int(number)) == (*device, inode):
            pids.append(int(fields[4]))
    for pid in pids:
        if pid > 0 and os.path.exists(f"/proc/{pid}"):
            return pid
    return _who_has_locked(inode, device)


_FLOCK = struct.Struct("hhqqi4x")
"""struct flock: type, whence, start, length, pid."""


def place_of(dev: int, ino: int) -> int:
    """Return the offset of the byte that represents an inode in a lock file."""
    return int.from_bytes(hashlib.blake2b(b"%d:%d" % (dev, ino), digest_size=7).digest())


def take_place(fd: int, place: int) -> bool:
    """Lock one byte of a file (F_OFD_SETLK) until *fd* is closed; False if another process holds it."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0))
    except OSError as error:
        if error.errno in {errno.EAGAIN, errno.EACCES}:
            return False
        raise
    return True


def who_has_place(fd: int, place: int) -> int | None:
    """Return the pid of the process that has locked this byte; None if none is visible."""
    return _who_has_locked(os.fstat(fd).st_ino, _device_of(fd), f"{place} ")


def _device_of(fd: int) -> tuple[int, int]:
    """Return the device of the filesystem of *fd*. It is not st_dev, which on btrfs differs by subvolume."""
    at = mount_id(fd)
    for mount in mountinfo():
        if mount.id == at:
            major, minor = mount.dev.split(":")
            return int(major), int(minor)
    device = os.fstat(fd).st_dev
    return os.major(device), os.minor(device)


def _who_has_locked(inode: int, device: tuple[int, int], start: str = "") -> int | None:
    lock = f"{device[0]:02x}:{device[1]:02x}:{inode} {start}"
    for entry in matching("/proc", "[0-9]*/fdinfo/*"):
        with suppress(OSError):
            if any(line.startswith("lock:") and lock in line for line in entry.read_text().splitlines()):
                return int(entry.parts[2])
    return None
