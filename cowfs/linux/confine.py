"""Confine the daemon to a mount namespace of its own, with only the files that it has open.

Before the daemon opens the layers, :func:`unshare` gives it a copy of its mounts. After it has opened
everything, :func:`confine` removes them all. This affects every thread, including those that an engine has
started meanwhile, because pivot_root(2) changes the root that they share.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

from cowfs.linux import callers, mount_table, mounts
from cowfs.linux.seccomp import refuse_for_good

_libc = ctypes.CDLL(None, use_errno=True)
_ZONE = "/etc/localtime"
_CALLERS = "/callers"
"""Mountpoint of a proc filesystem that shows processes, but gives no access to their files."""


def is_possible() -> bool:
    """Whether the root can be exchanged. It cannot in an initramfs, or in a chroot that is not a mount."""
    return any(mount.mountpoint == b"/" and mount.fstype != "rootfs" for mount in mount_table.mountinfo())


def unshare() -> None:
    """Give this process its own mount namespace. From now on, no other process sees what it mounts.

    If another process unmounts a shared mount, it disappears here too. Call it while the process has one
    thread. OSError.
    """
    mounts.unshare_slave()


def confine() -> None:
    """Leave this process and all its threads only two paths: ``/proc/self``, and callers in /proc.

    Each open directory becomes a mount of its own, so that ``..`` does not lead out of it. Then a filter
    refuses system calls that mount or run anything. OSError; then only the directories have changed.
    """
    os.environ.setdefault("TZ", f":{_ZONE}")  # reads the file now, and not again at each strftime(3)
    time.tzset()
    root = mounts.detached_mount("tmpfs", "cowfs", {"mode": "555", "size": "16k"})
    try:
        own, others = mounts.private_clone_of("/proc/self"), mounts.processes()
        for place in ("proc/self", _CALLERS[1:]):
            os.makedirs(f"/proc/self/fd/{root}/{place}", mode=0o555)
        for measured in _measured():
            os.makedirs(f"/proc/self/fd/{root}{measured}", exist_ok=True)
        given = {fd: _enclosed(fd) for fd in set(_open_directories())}
        bound = [
            (own, "proc/self"),
            (others, _CALLERS[1:]),
            *((mounts.private_clone_of(path), path[1:]) for path in _measured()),
        ]
        for fd, enclosed in given.items():
            os.dup2(enclosed, fd, inheritable=False)
            os.close(enclosed)
        mounts.exchange_root(root, bound)
        callers.set_proc(_CALLERS)
    finally:
        os.close(root)
    with suppress(OSError):  # without libseccomp, a warning is in the log already
        refuse_for_good()


def _open_directories() -> Iterator[int]:
    """Yield the descriptors of directories in attached mounts: ``..`` leads out of those."""
    attached = {mount.id for mount in mount_table.mountinfo()}
    for fd in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # the descriptor of this listing, closed by now
            if stat.S_ISDIR(os.fstat(fd).st_mode) and mount_table.mount_id(fd) in attached:
                yield fd


def _enclosed(fd: int) -> int:
    """Return a descriptor of the same directory in a mount of its own, O_PATH if *fd* is."""
    clone = mounts.private_clone(fd)
    if _is_o_path(fd):
        return clone
    try:
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=clone)
    finally:
        os.close(clone)


def _is_o_path(fd: int) -> bool:
    try:
        os.listdir(fd)
    except OSError as error:
        return error.errno == errno.EBADF
    return False


def _measured() -> list[str]:
    """Return the directory to which the tests' coverage tool writes; an empty list if none measures."""
    tool = sys.modules.get("coverage") if "COVERAGE_PROCESS_CONFIG" in os.environ else None
    running = tool.Coverage.current() if tool is not None else None
    return [os.path.dirname(os.path.abspath(running.config.data_file))] if running is not None else []
