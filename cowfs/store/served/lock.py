"""Lock a store for one user at a time, or tell who has it."""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import socket
import stat
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cowfs.errors import StoreBusy
from cowfs.linux import fuse, locks, mount_table, namespaces, safe_paths, sockets

_PATIENCE = 2.0
"""Seconds that the lock of a dead process may remain, while the kernel still unmounts for it."""
_RELEASE = 60.0
"""Seconds that a daemon may take to release a store that is not mounted any more."""
_UNTOLD = 1.0
"""Seconds of waiting after which a message says what for."""
_PAUSE = 0.01
_DOUBT = 1.0
"""Seconds after mounting within which a daemon answers on its socket."""

_FLOCK = struct.Struct("@hhqqi4x")  # struct flock: l_type, l_whence, l_start, l_len, l_pid
_MARK = 1 << 62
"""The offset in a file from which on locked bytes show the mount: one byte for each device number."""
_DEVICES = 1 << 32


def lock(fd: int, path: str, *, shared: bool = False, progress: Callable[[str], None] | None = None) -> None:
    """Take the lock (flock(2)) of a store. *fd* is its image or its lock file.

    StoreBusy names the holder. Waits at most two seconds for a holder that is already dead, and at most a
    minute for a daemon whose mount has ended, because it is about to release the store. Calls *progress*
    after a second.
    """
    begun = time.monotonic()
    while not try_lock(fd, shared=shared):
        waited = time.monotonic() - begun
        pid = locks.who_locks(f"/proc/self/fd/{fd}")
        if pid is not None and _is_alive(pid):
            serves = _serves(fd, pid)
            if serves or (serves is None and waited > _DOUBT):
                raise _busy(path, fd, pid)
            if waited > _RELEASE:
                raise StoreBusy(
                    f"{path}: {_process(pid)} was unmounted but did not release it within {_RELEASE:g} s",
                    "it is still writing, or a process still uses the lazily unmounted tree",
                )
            if progress is not None and waited > _UNTOLD:
                progress(f"{path}: waiting for {_process(pid)} to release it; its mount is gone")
                progress = None
        elif waited > _PATIENCE:
            raise StoreBusy(f"{path}: in use by a process that you cannot see", f"as root: fuser -v {path}")
        time.sleep(_PAUSE)


def _busy(path: str, fd: int, pid: int) -> StoreBusy:
    dev = _marked(fd)
    found = [mount for mount in mount_table.mountinfo() if (mount.dev, mount.fstype) == (dev, fuse.FSTYPE)]
    if found:
        where = os.fsdecode(found[0].mountpoint)
        return StoreBusy(f"{path}: in use by process {pid}, mounted at {where}", f"cowfs umount {where}")
    hint = "unmount it first: cowfs umount MOUNTPOINT" if dev else "if it is a mount, unmount it; else wait"
    return StoreBusy(f"{path}: in use by {_process(pid)}", hint)


def mark_mounted(fd: int, dev: str) -> None:
    """Show others who want the lock that its holder serves the mount *dev* (``major:minor``).

    A lock on a byte whose offset is that number shows it, until *fd* is closed for good. Does nothing on a
    filesystem whose locks are on a server.
    """
    major, minor = map(int, dev.split(":"))
    request = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, _MARK + (major << 20 | minor), 1, 0)
    with suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)


def _marked(fd: int) -> str | None:
    """Return the mount (``major:minor``) that the holder of the lock marked as served; None if none."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _MARK, _DEVICES, 0)
    try:
        kind, _, start, _, _ = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))
    except OSError:
        return None
    if kind == fcntl.F_UNLCK:
        return None
    number = start - _MARK
    return f"{number >> 20}:{number & 0xFFFFF}"


def _serves(fd: int, pid: int) -> bool | None:
    """Whether the process *pid* holds the lock for something other than a mount that has ended.

    None if unknown: the mount may be its own, or another with the same number whose daemon does not listen
    yet.
    """
    dev = _marked(fd)
    if dev is None:
        return True
    try:
        owner = os.stat(f"/proc/{pid}").st_uid
    except FileNotFoundError:
        return False
    everywhere = itertools.chain([(0, mount_table.mountinfo())], namespaces.mounted_elsewhere())
    if not any(_may_be(mount, dev, owner) for _, table in everywhere for mount in table):
        return False if namespaces.is_seen(pid) else None
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_DOUBT / 2)
        if sockets.connect_control(connection, dev, owner) not in {0, pid}:
            return False  # a later mount has that number
        connection.sendall(b'{"command":"info"}\n')
        return bool(connection.recv(1)) or None
    return None


def _may_be(mount: mount_table.MountInfo, dev: str, owner: int) -> bool:
    """Whether *mount* may be the mount *dev* of a user's cowfs: numbers of ended mounts are reused."""
    users = {f"user_id={owner}", "user_id=0"}  # 0 in a user namespace of their own
    return mount.dev == dev and mount.fstype == fuse.FSTYPE and not users.isdisjoint(mount.super_words)


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Take the lock if nobody has it; return whether it was taken."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def refuse_mounted_image(fd: int, path: str) -> None:
    """Raise StoreBusy, naming device and mountpoint, if the image open as *fd* is mounted by others."""
    deadline = time.monotonic() + _PATIENCE
    while devices := safe_paths.loop_users(f"/proc/self/fd/{fd}"):
        where = _mountpoint_of(devices[0])
        if where or time.monotonic() > deadline:
            at = f", mounted on {where}" if where else ""
            hint = f"umount {where}" if where else f"losetup -d {devices[0]}"
            raise StoreBusy(f"{path}: in use by the loop device {devices[0]}{at}", hint)
        time.sleep(_PAUSE)  # of a dead cowfs: the kernel detaches it itself
    info = os.fstat(fd)
    here = f"{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}" if stat.S_ISBLK(info.st_mode) else ""
    for mount in mount_table.mountinfo():  # fuse2fs and the like give the image as the source
        if mount.dev == here or (mount.fstype.startswith("fuse") and _leads_to(fd, mount.source)):
            where = os.fsdecode(mount.mountpoint)
            if mount.fstype == fuse.FSTYPE:
                hint = f"give that mountpoint, or unmount it first: cowfs umount {where}"
                raise StoreBusy(f"{path}: in use as a lower of the mount at {where}", hint)
            raise StoreBusy(f"{path}: mounted on {where} as {mount.fstype}", f"umount {where}")


def refuse_mounted_directory(fd: int, path: str) -> None:
    """Raise StoreBusy, naming the mountpoint, if the kernel's overlayfs uses the directory open as *fd*."""
    try:
        upper = os.open("upper", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
    except FileNotFoundError:
        return
    try:
        refuse_mounted_upper(upper, path)
    finally:
        os.close(upper)


def refuse_mounted_upper(upper: int, path: str) -> None:
    """Raise StoreBusy, naming the mountpoint, if the kernel's overlayfs uses the directory *upper*."""
    for mount in mount_table.mountinfo():
        if mount.fstype != "overlay":
            continue
        for option in mount.super_words:
            key, _, value = option.partition("=")
            # As passed to mount(2), where overlayfs understands the backslash.
            names = {os.fsencode(value), os.fsencode(_plain(value))}
            if key == "upperdir" and any(_leads_to(upper, name) for name in names):
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
    found = [mount.mountpoint for mount in mount_table.mountinfo() if mount.dev == name]
    return os.fsdecode(found[-1]) if found else ""


def _leads_to(fd: int, path: bytes) -> bool:
    with suppress(OSError):
        return path.startswith(b"/") and safe_paths.is_same_file(path, os.fstat(fd))
    return False


def holder(path: str) -> str | None:
    """Return a text that names the user of the store with the image or lock file *path*; None if unused."""
    pid = locks.who_locks(path)
    if pid is not None:
        return _process(pid)
    devices = safe_paths.loop_users(path)
    return f"the loop device {devices[0]}" if devices else None


def _is_alive(pid: int) -> bool:
    try:
        stat_line = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat_line.rpartition(") ")[2][:1] not in {"Z", "X"}  # the name in brackets may contain anything


def _process(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    except OSError:
        words = []
    command = " ".join(b" ".join(words).decode(errors="replace").split())
    command = command if len(command) <= 80 else command[:77] + "..."
    return f"process {pid} ({command})" if command else f"process {pid}"
