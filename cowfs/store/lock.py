"""One user at a time: lock a store, or say who has it."""

from __future__ import annotations

import fcntl
import os
import re
import time
from pathlib import Path

from cowfs.errors import StoreBusy
from cowfs.linux import mounts

_PATIENCE = 2.0
"""Seconds that a lock may stay behind its dead holder: the kernel is still unmounting for it."""
_PAUSE = 0.01


def lock(fd: int, path: str, *, shared: bool = False) -> None:
    """Take the lock (flock(2)) of a store, *fd* being its image or its lock file.

    Raises StoreBusy, naming the holder. Waits, at most two seconds, for a holder that is dead already.
    """
    deadline = time.monotonic() + _PATIENCE
    while not try_lock(fd, shared=shared):
        pid = mounts.who_locks(f"/proc/self/fd/{fd}")
        if pid is not None and _is_alive(pid):
            raise StoreBusy(f"{path}: in use by {_process(pid)}", "unmount it first: cowfs umount MOUNTPOINT")
        if time.monotonic() > deadline:
            raise StoreBusy(f"{path}: in use by somebody whom we cannot see", "sudo fuser -v names them")
        time.sleep(_PAUSE)


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Take the lock if nobody has it; say whether."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def refuse_mounted_image(fd: int, path: str) -> None:
    """Raise StoreBusy, naming device and mountpoint, if the image open as *fd* is mounted by others."""
    deadline = time.monotonic() + _PATIENCE
    while devices := mounts.loop_users(f"/proc/self/fd/{fd}"):
        where = _mountpoint_of(devices[0])
        if where or time.monotonic() > deadline:
            at = f", mounted on {where}" if where else ""
            hint = f"umount {where}" if where else f"losetup -d {devices[0]}"
            raise StoreBusy(f"{path}: in use by the loop device {devices[0]}{at}", hint)
        time.sleep(_PAUSE)  # a dead cowfs's: the kernel detaches it by itself
    for mount in mounts.mountinfo():  # fuse2fs and its like: they give the image as the source
        if mount.fstype.startswith("fuse") and mount.source.startswith(b"/") and _same(fd, mount.source):
            where = os.fsdecode(mount.mountpoint)
            raise StoreBusy(f"{path}: mounted on {where} as {mount.fstype}", f"umount {where}")


def refuse_mounted_directory(fd: int, path: str) -> None:
    """Raise StoreBusy, naming the mountpoint, if the kernel's overlayfs uses the directory open as *fd*."""
    upper = f"/proc/self/fd/{fd}/upper"
    for mount in mounts.mountinfo():
        if mount.fstype != "overlay":
            continue
        for option in mount.super_words:
            key, _, value = option.partition("=")
            # As it was written for mount(2), where overlayfs knows the backslash.
            if key == "upperdir" and (_same_path(value, upper) or _same_path(_plain(value), upper)):
                where = os.fsdecode(mount.mountpoint)
                raise StoreBusy(f"{path}: in use by the overlay mounted on {where}", f"umount {where}")


def _plain(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)


def _mountpoint_of(device: str) -> str:
    try:
        number = os.stat(device).st_rdev
    except OSError:
        return ""
    name = f"{os.major(number)}:{os.minor(number)}"
    found = [mount.mountpoint for mount in mounts.mountinfo() if mount.dev == name]
    return os.fsdecode(found[-1]) if found else ""


def _same(fd: int, path: bytes) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False


def _same_path(one: str, two: str) -> bool:
    try:
        return os.path.samefile(one, two)
    except OSError:
        return False


def holder(path: str) -> str | None:
    """Say, for people, who uses the store whose image or lock file is *path*; None if nobody does."""
    pid = mounts.who_locks(path)
    if pid is not None:
        return _process(pid)
    devices = mounts.loop_users(path)
    return f"the loop device {devices[0]}" if devices else None


def _is_alive(pid: int) -> bool:
    try:
        stat_line = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat_line.rpartition(") ")[2][:1] not in {"Z", "X"}  # the name in brackets may hold anything


def _process(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    except OSError:
        words = []
    command = " ".join(b" ".join(words).decode(errors="replace").split())
    command = command if len(command) <= 80 else command[:77] + "..."
    return f"process {pid} ({command})" if command else f"process {pid}"
