"""Talking to the daemon of a mount."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from cowfs.errors import CowfsError, MountFailure
from cowfs.linux.mounts import MountInfo, mount_of, mountinfo
from cowfs.linux.sockets import connect_control

FSTYPE = "fuse.cowfs"
_MOST_LINKS = 40
"""As many symbolic links as the kernel follows (path_resolution(7))."""
VIEW_FSTYPE = "fuse.cowfs-store"
"""Of a store that is shown by the daemon that has it (cowfs.fuse.view)."""


def find_mount(path: str) -> MountInfo | None:
    """Return the cowfs mount whose mountpoint is *path*; None when there is none."""
    # The last component is not looked at: it may be the root of a mount whose daemon is dead, or hangs.
    for _ in range(_MOST_LINKS):
        directory, name = os.path.split(os.path.abspath(path))
        directory = os.path.realpath(directory)
        found = mount_of(os.path.join(directory, name))
        if found is not None:
            return found if found.fstype == FSTYPE else None
        try:
            path = os.path.join(directory, os.readlink(os.path.join(directory, name)))
        except OSError:
            break
    return None


def mount_with_store(path: str) -> MountInfo | None:
    """Return the mount at *path*, or the one whose store *path* is; None when there is none that answers."""
    found = find_mount(path)
    if found is not None or not os.path.isfile(path):
        return found
    for mount in mountinfo():
        if mount.fstype == FSTYPE:
            try:
                store = facts_of(mount.dev, timeout=5.0)["store"]
                if store["kind"] == "image" and os.path.samefile(store["path"], path):
                    return mount
            except (CowfsError, OSError):
                continue
    return None


def facts_of(dev: str, timeout: float | None = 60.0) -> dict[str, Any]:
    """Return what the daemon of the mount ``major:minor`` tells of itself: its ``pid``, which is the kernel's
    word, ``mountpoint``, ``store`` with ``kind`` and ``path``, and what else it says.

    Raises MountFailure when it does not answer, or what it says makes no sense.
    """
    facts = next(ask(dev, "info", timeout=timeout), {})
    store = facts.get("store")
    named = [facts.get("mountpoint"), *map(store.get, ("kind", "path"))] if isinstance(store, dict) else [0]
    if type(facts.get("pid")) is not int or not all(isinstance(name, str) for name in named):
        raise _senseless()
    return facts


def ask(
    dev: str, command: str, timeout: float | None = 60.0, fd: int = -1, **arguments: Any
) -> Iterator[dict[str, Any]]:
    """Send a command to the daemon of the mount ``major:minor`` and yield its replies.

    *timeout* is in seconds, for each reply; *fd* goes with the command. A pid in a reply is that of who
    answers.

    Raises MountFailure when no daemon answers, CowfsError with what it says when it fails.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(timeout)
        owner = owner_of(dev)
        _refuse_strangers(owner, fd)
        try:
            pid = connect_control(connection, dev, owner)
        except OSError as error:
            raise MountFailure(f"the daemon of this mount does not answer: {error.strerror}") from None
        request = json.dumps({"command": command, **arguments}).encode() + b"\n"
        with suppress(BrokenPipeError, ConnectionResetError):  # it has said why, and left
            socket.send_fds(connection, [request], [fd] if fd >= 0 else [])
        yield from replies(connection, pid)


def replies(connection: socket.socket, pid: int) -> Iterator[dict[str, Any]]:
    """Yield what the daemon *pid* (0: not known) answers on a connection. Raises as :func:`ask` does."""
    with connection.makefile("rb") as lines, suppress(ConnectionResetError):
        while line := lines.readline(_LONGEST_REPLY):
            reply = _parse(line)
            if reply.get("end"):
                return
            if "error" in reply:
                raise _failure(reply)
            if pid and "pid" in reply:
                reply["pid"] = pid
            yield reply
    raise MountFailure("the daemon of this mount ended in the middle of its answer")


_LONGEST_REPLY = 16 << 20
"""Bytes of a line: another user's daemon does not fill our memory."""


def _parse(line: bytes) -> dict[str, Any]:
    try:
        reply = json.loads(line)
    except (ValueError, RecursionError):
        raise _senseless() from None
    if not isinstance(reply, dict):
        raise _senseless()
    return reply


def _failure(reply: dict[str, Any]) -> CowfsError:
    """Return what a daemon says has failed: never a success."""
    failure = CowfsError(str(reply["error"]), str(reply.get("hint", "")))
    code = reply.get("exit_code")
    if type(code) is int and 0 < code < 128:
        failure.exit_code = code
    return failure


@contextmanager
def sensible() -> Iterator[None]:
    """Raise MountFailure for an answer that is not made as it should be: another user's may say anything."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise _senseless() from None


def _senseless() -> MountFailure:
    return MountFailure("what the daemon of this mount answers makes no sense")


def owner_of(dev: str) -> int:
    """Return the user who mounted *dev*, as the kernel tells it (fuse_show_options in fs/fuse/inode.c)."""
    for mount in mountinfo():
        if mount.dev == dev:
            for option in mount.super_options.split(","):
                if option.startswith("user_id="):
                    return int(option.removeprefix("user_id="))
    raise MountFailure("this mount is gone")


def _refuse_strangers(owner: int, fd: int) -> None:
    """MountFailure unless we may talk to the daemon of *owner*, and hand it *fd* where there is one."""
    me = os.geteuid()
    if me not in {0, owner}:
        raise MountFailure(
            f"this mount belongs to another user (uid {owner})", "ask as that user, or as root"
        )
    if fd >= 0 and me != owner:
        raise MountFailure(
            f"this mount belongs to another user (uid {owner}), who is not given files of yours",
            "do it as that user",
        )


def resident(pid: int) -> int:
    """Return the resident memory of a process in bytes; 0 when it may not be seen."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * 4096
    except OSError:
        return 0
