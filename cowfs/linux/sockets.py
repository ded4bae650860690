"""The daemon's control socket, the identity of a socket's peer, and systemd's readiness protocol.

The socket of the mount ``major:minor`` has that name, in a directory that only the owner of the mount can
write to. So no other user can take the name, or answer in place of the daemon.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from cowfs.linux.fuse import FSTYPE
from cowfs.linux.mount_table import mountinfo
from cowfs.linux.namespaces import mounted_elsewhere
from cowfs.linux.user_namespace import number_outside, ranges

_UCRED = struct.Struct("=iII")  # struct ucred: pid, uid, gid


_CLIENTS = 128
"""How many clients may wait to be accepted."""
_OF_THE_ROOT = "/run/initramfs/cowfs/world/run/cowfs"
"""Where the booted system sees /run/cowfs of the daemon that serves its root filesystem."""


def control_directories(uid: int) -> list[str]:
    """Return the directories that daemons of the user *uid* use for their sockets, the preferred first.

    In a user namespace their names have the number outside: many users are root of theirs, and share /tmp.
    """
    own = os.environ.get("XDG_RUNTIME_DIR") if uid == os.geteuid() else None
    outside = number_outside(uid, ranges("uid"))
    number = uid if outside is None else outside
    parents = dict.fromkeys(["/run"] * (uid == 0) + [own] * bool(own) + [f"/run/user/{number}"])
    return [*(f"{parent}/cowfs" for parent in parents), f"/tmp/cowfs-{number}"]


def open_control_directory() -> int:
    """Return a descriptor of the directory for this user's sockets; create it if necessary.

    Raises what mkdir(2) and open(2) raise if none can be used. PermissionError, with the directory's name, if
    another user owns the last candidate, or may write to it.
    """
    failure = OSError(errno.ENOENT, "no directory for sockets")
    for directory in control_directories(os.geteuid()):
        try:
            with suppress(FileExistsError):
                os.mkdir(directory, 0o700)
            fd = _open_if_private(directory, os.geteuid())
            if os.access(directory, os.W_OK):
                return fd
            os.close(fd)
        except OSError as error:
            failure = error
    raise failure


def remove_dead() -> None:
    """Remove this user's sockets that no daemon listens on, as after daemons were killed.

    Sockets of visible mounts stay, so that a client learns that the daemon is dead.
    """
    with suppress(OSError):  # there is no directory for them
        directory = open_control_directory()
        try:
            _sweep(directory)
        finally:
            os.close(directory)


def _sweep(directory: int) -> None:
    here = {mount.dev for mount in mountinfo() if mount.fstype == FSTYPE}
    left = {}
    for name in filter(_NAME.fullmatch, os.listdir(directory)):
        with suppress(OSError):
            seen = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if name not in here and _is_ours_and_dead(directory, name, seen):
                left[name] = seen
    if not left:  # what follows reads a file of each process
        return
    for _, mounts in mounted_elsewhere():
        for mount in mounts:
            if mount.fstype == FSTYPE:
                left.pop(mount.dev, None)
    for name, seen in left.items():
        with suppress(OSError):
            _remove(directory, name, seen)


_NAME = re.compile(r"[0-9]+:[0-9]+")


def _is_ours_and_dead(directory: int, name: str, seen: os.stat_result) -> bool:
    if not stat.S_ISSOCK(seen.st_mode) or seen.st_uid != os.geteuid():
        return False
    # Of another type than the daemons' sockets: a living one answers EPROTOTYPE, and notices nothing.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
        try:
            connection.connect(_beneath(directory, name))
        except ConnectionRefusedError:
            return True
    return False


def _remove(directory: int, name: str, seen: os.stat_result) -> None:
    """Remove a socket, unless another has the name by now: a new mount may have received that number."""
    aside = f"dead-{os.getpid()}"
    os.rename(name, aside, src_dir_fd=directory, dst_dir_fd=directory)
    if os.path.samestat(seen, os.stat(aside, dir_fd=directory, follow_symlinks=False)):
        os.unlink(aside, dir_fd=directory)
    else:
        os.rename(aside, name, src_dir_fd=directory, dst_dir_fd=directory)


def _open_if_private(directory: str, uid: int) -> int:
    """Open a directory that only *uid* (or root) can write to. PermissionError for any other."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    info = os.fstat(fd)
    if info.st_uid not in {0, uid} or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        os.close(fd)
        raise PermissionError(errno.EPERM, "another user may write to it", directory)
    return fd


@contextmanager
def control_listener(directory: int, dev: str) -> Iterator[socket.socket]:
    """Listen on the control socket of the mount *dev*, in the open *directory*; remove it at the end.

    It replaces an existing socket: two mounts never share a number, so that one belongs to an earlier mount,
    whose daemon was killed or is about to end. So a daemon listens on a socket of this name, or is dead.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener:
        new = f"new-{os.getpid()}"
        with suppress(FileNotFoundError):
            os.unlink(new, dir_fd=directory)
        listener.bind(_beneath(directory, new))
        os.chmod(new, 0o600, dir_fd=directory)
        listener.listen(_CLIENTS)
        ours = os.stat(new, dir_fd=directory, follow_symlinks=False).st_ino
        os.rename(new, dev, src_dir_fd=directory, dst_dir_fd=directory)
        try:
            yield listener
        finally:
            with suppress(OSError):
                if os.stat(dev, dir_fd=directory, follow_symlinks=False).st_ino == ours:
                    os.unlink(dev, dir_fd=directory)


def _beneath(directory: int, name: str) -> str:
    return f"/proc/self/fd/{directory}/{name}"  # the path of a socket has at most 107 bytes (unix(7))


def connect_control(connection: socket.socket, dev: str, uid: int) -> int:
    """Connect to the daemon of the mount *dev* of the user *uid*; return its pid.

    The pid is 0 if the daemon is in a PID namespace that this process does not see. OSError; PermissionError
    if another user answers, or can write to the directory.
    """
    failure: OSError = FileNotFoundError(errno.ENOENT, "no daemon listens")
    refused = False  # a socket that refuses explains more than a directory without one
    for directory in [*control_directories(uid), *([_OF_THE_ROOT] if uid == 0 else [])]:
        try:
            fd = _open_if_private(directory, uid)
        except FileNotFoundError:
            continue
        except OSError as error:
            failure = failure if refused else error
            continue
        try:
            connection.connect(_beneath(fd, dev))
        except OSError as error:
            failure = failure if refused else error
            refused = isinstance(failure, ConnectionRefusedError)
            continue
        finally:
            os.close(fd)
        pid, peer = peer_of(connection)
        if peer != uid:
            raise PermissionError(errno.EPERM, "another user answers in its place")
        return pid
    raise failure


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Return the pid and uid of the process at the other end of a Unix socket (SO_PEERCRED)."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(raw)
    return pid, uid


SYSLOG = "/dev/log"

_manager: socket.socket | None = None


def connect_manager() -> bool:
    """Connect to the service manager for :func:`sd_notify`, while its path is reachable; False if none is."""
    global _manager  # noqa: PLW0603 - a process has one
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        sender.connect(address)
    except OSError:
        sender.close()
        return False
    _manager = sender
    return True


def sd_notify(message: str) -> bool:
    """Tell the service manager a state such as ``READY=1`` (sd_notify(3)); False if none listens."""
    if _manager is None and not connect_manager():
        return False
    try:
        assert _manager is not None
        _manager.sendall(message.encode())
    except OSError:
        return False
    return True
