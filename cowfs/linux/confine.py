"""A mount namespace for the daemon alone, with only the files that it has open.

Before the layers are opened, :func:`step_aside` gives the daemon a copy of its mounts. When it has opened
everything, :func:`shut_in` removes them all. This affects every thread, even those that an engine has started
meanwhile: pivot_root(2) changes the root that they share.
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
"""Where the state of processes can be read, and their files cannot be reached."""


def is_possible() -> bool:
    """Say whether there is a root to be exchanged: not in an initramfs, nor in a chroot that is no mount."""
    return any(mount.mountpoint == b"/" and mount.fstype != "rootfs" for mount in mount_table.mountinfo())


def step_aside() -> None:
    """Give this process mounts of its own: from now on it mounts nothing that anybody else sees.

    What others unmount goes here too, where mounts are shared. To be called while there is one thread.
    Raises OSError.
    """
    mounts.unshare_slave()


def shut_in() -> None:
    """From now on let this process and all its threads reach by path only ``/proc/self`` and what /proc says
    of callers.

    Its open directories become mounts of their own, with no way out. Then system calls that mount or run
    anything are blocked. Raises OSError; then nothing has changed, but for the directories.
    """
    os.environ.setdefault("TZ", f":{_ZONE}")  # is read once, and not looked for again at each strftime(3)
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
        callers.found_at(_CALLERS)
    finally:
        os.close(root)
    with suppress(OSError):  # without libseccomp the log has said so
        refuse_for_good()


def _open_directories() -> Iterator[int]:
    """Yield the descriptors of directories in mounts that are attached: ``..`` leads out of those."""
    attached = {mount.id for mount in mount_table.mountinfo()}
    for fd in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # the listing's own
            if stat.S_ISDIR(os.fstat(fd).st_mode) and mount_table.mount_id(fd) in attached:
                yield fd


def _enclosed(fd: int) -> int:
    """Return a descriptor of the same directory, for the same use, in a mount of its own."""
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
    """Return the directory in which a coverage tool, which tests measure us with, keeps its data."""
    tool = sys.modules.get("coverage") if "COVERAGE_PROCESS_CONFIG" in os.environ else None
    running = tool.Coverage.current() if tool is not None else None
    return [os.path.dirname(os.path.abspath(running.config.data_file))] if running is not None else []
