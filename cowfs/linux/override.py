"""Read this user's files whatever their mode, as root of a user namespace.

The owner of a file of mode 000 could change its mode, but cowfs never writes to a lower. A process in a user
namespace that contains only this user has CAP_DAC_OVERRIDE for the files of this user and group
(capable_wrt_inode_uidgid() in kernel/capability.c). The daemon itself cannot run there, because all other
users' files would belong to nobody. So it forks a helper when it first needs one, which opens files for it.
"""

from __future__ import annotations

import array
import errno
import json
import os
import signal
import socket
import threading
import warnings
from contextlib import suppress
from typing import Any, NoReturn

from cowfs.errors import os_error
from cowfs.linux import files, mounts

_LONGEST = 1 << 17
_MAY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOATIME | os.O_CLOEXEC
"""The flags that the helper accepts: it opens nothing for writing."""


class _Helper:
    """The daemon's end of the helper process."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        user, group = os.geteuid(), os.getegid()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the child only makes system calls, and takes no lock
            self._pid = os.fork()
        if self._pid == 0:
            _serve(theirs, user, group)
        theirs.close()
        self._connection = ours
        self._lock = threading.Lock()

    def ask(self, fd: int, **request: Any) -> tuple[Any, int]:
        with self._lock:
            socket.send_fds(self._connection, [json.dumps(request).encode()], [fd])
            answer, fds, _, _ = socket.recv_fds(self._connection, _LONGEST, 1, socket.MSG_CMSG_CLOEXEC)
        if not answer:
            raise os_error(errno.EACCES)
        reply = json.loads(answer)
        if isinstance(reply, dict):
            raise os_error(reply["errno"])
        return reply, fds[0] if fds else -1


_helper: _Helper | None = None
_cannot = False


def _ask(fd: int, **request: Any) -> tuple[Any, int]:
    """Let the helper make a call; EACCES if there can be no helper."""
    global _helper, _cannot  # noqa: PLW0603 - a process has one
    try:
        if _cannot or os.geteuid() == 0:
            raise os_error(errno.EACCES)
        if _helper is None:
            _helper = _Helper()
        return _helper.ask(fd, **request)
    except (BrokenPipeError, ConnectionError):  # no user namespaces here
        _cannot = True
        raise os_error(errno.EACCES) from None


def open_at(directory: int, name: bytes, flags: int, *, beneath: bool) -> int:
    """Do openat(2), or :func:`cowfs.linux.files.open_beneath` if *beneath*, read-only or O_PATH. OSError."""
    return _ask(directory, call="at", name=name.decode("latin-1"), flags=flags, beneath=beneath)[1]


def reopen(fd: int, flags: int) -> int:
    """Open the file of a descriptor again, for reading. OSError."""
    return _ask(fd, call="reopen", flags=flags)[1]


def listxattr(fd: int) -> list[bytes]:
    """Return the names of the xattrs of a descriptor's file. OSError."""
    return [name.encode("latin-1") for name in _ask(fd, call="list")[0]]


def getxattr(fd: int, name: bytes) -> bytes:
    """Return an xattr of a descriptor's file. OSError."""
    value: str = _ask(fd, call="get", name=name.decode("latin-1"))[0]
    return value.encode("latin-1")


# --- in the helper process


def _serve(connection: socket.socket, user: int, group: int) -> NoReturn:
    """Make calls until the daemon has ended."""
    try:
        signal.set_wakeup_fd(-1)
        os.setsid()
        for fd in map(int, os.listdir("/proc/self/fd")):
            if fd != connection.fileno():
                with suppress(OSError):  # the descriptor of this listing, closed by now
                    os.close(fd)
        mounts.enter_user_namespace(user, group)
        while True:
            message, fds, _, _ = socket.recv_fds(connection, _LONGEST, 1, socket.MSG_CMSG_CLOEXEC)
            if not message:
                break
            _answer(connection, json.loads(message), fds[0])
    except BaseException:
        os._exit(1)
    os._exit(0)


def _answer(connection: socket.socket, request: dict[str, Any], fd: int) -> None:
    made = -1
    try:
        said: Any = None
        if request["call"] in {"at", "reopen"}:
            made = _open(request, fd)
        elif request["call"] == "list":
            names = os.listxattr(b"/proc/self/fd/%d" % fd)
            said = [os.fsencode(name).decode("latin-1") for name in names]
        else:
            value = os.getxattr(b"/proc/self/fd/%d" % fd, request["name"].encode("latin-1"))
            said = value.decode("latin-1")
    except OSError as error:
        said = {"errno": error.errno}
    finally:
        os.close(fd)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [made]))] if made >= 0 else []
    connection.sendmsg([json.dumps(said).encode()], rights)
    if made >= 0:
        os.close(made)


def _open(request: dict[str, Any], fd: int) -> int:
    flags = request["flags"] & _MAY | os.O_CLOEXEC
    if request["call"] == "reopen":
        return os.open(b"/proc/self/fd/%d" % fd, flags)
    name = request["name"].encode("latin-1")
    if request["beneath"]:
        return files.open_beneath(fd, name, flags)
    return os.open(name, flags, dir_fd=fd)
