"""Which program makes a request: what /proc says of a thread that waits for our answer.

A number may be another process's tomorrow, and a process another program's. So a descriptor of its command
line is kept: reading it fails once that process is gone, and gives something else after execve(2). That takes
half a microsecond.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from typing import Any, NamedTuple

from cowfs.jsontext import raw, text
from cowfs.linux import callers

_MOST = 64
"""How many are remembered at a time."""
_LONGEST = 4096
"""Bytes of a command line, of a program's name or of a cgroup's that are kept."""


class Process(NamedTuple):
    """Who made a request."""

    pid: int
    """Of the process, not of the thread."""
    uid: int
    """As whom it made the request (fsuid)."""
    program: str
    """The path of what it runs. Where the kernel does not let us see that, its name (proc_pid_comm(5)), which
    it may have given to itself; "" if nothing is known."""
    command: tuple[str, ...]
    """Its arguments, the first 4096 bytes of them. It may have changed them."""
    cgroup: str
    """Of cgroup v2, or else that which systemd has it in; "" where there is none."""


class _Known(NamedTuple):
    fd: int
    command: bytes
    process: Process


class Processes:
    """Those that have made requests of late."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[int, int], _Known] = OrderedDict()

    def look_at(self, tid: int, uid: int) -> Process | None:
        """Return whose thread *tid* waits for an answer now, as the user *uid*. None if nobody can know.

        The same object as long as it is the same process with the same command line.
        """
        known = self._known.get((tid, uid))
        if known is not None:
            try:
                if os.pread(known.fd, _LONGEST, 0) == known.command:
                    return known.process
            except OSError:  # it is gone, and another has its number
                pass
            del self._known[tid, uid]
            os.close(known.fd)
        return self._look(tid, uid) if tid > 0 else None

    def known_by(self, tid: int, uid: int) -> tuple[int, bytes]:
        """Return by what one is known to be yet what :meth:`look_at` has found: a descriptor of its command
        line, and that; -1 if by nothing."""
        known = self._known.get((tid, uid))
        return (-1, b"") if known is None else (known.fd, known.command)

    def _look(self, tid: int, uid: int) -> Process:
        try:
            fd = os.open(f"{callers.place()}/{tid}/cmdline", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # hidden from us (hidepid), or a lack of descriptors
            return Process(tid, uid, "", (), "")
        try:
            command = os.pread(fd, _LONGEST, 0)
            found = _read(tid, uid, command)
        except (OSError, ValueError):
            os.close(fd)
            return Process(tid, uid, "", (), "")
        if len(self._known) >= _MOST:
            os.close(self._known.popitem(last=False)[1].fd)
        self._known[tid, uid] = _Known(fd, command, found)
        return found

    def close(self) -> None:
        """Forget them all."""
        while self._known:
            os.close(self._known.popitem()[1].fd)


def _read(tid: int, uid: int, command: bytes) -> Process:
    """Return what is known of a thread. OSError, ValueError."""
    status = _content(f"{tid}/status")
    pid = next(int(line[5:]) for line in status.splitlines() if line.startswith(b"Tgid:"))
    try:
        program = os.readlink(os.fsencode(f"{callers.place()}/{tid}/exe"))
    except OSError:  # it has more capabilities than we, or is another user's
        program = _content(f"{pid}/comm").removesuffix(b"\n")
    arguments = command.removesuffix(b"\0").split(b"\0") if command else []
    return Process(
        pid,
        uid,
        text(program[:_LONGEST]),
        tuple(map(text, arguments)),
        _cgroup(_content(f"{tid}/cgroup")),
    )


def _content(path: str) -> bytes:
    with open(f"{callers.place()}/{path}", "rb", buffering=0) as file:
        return file.read(1 << 16) or b""


def _cgroup(content: bytes) -> str:
    """Return the cgroup that cgroups(7) describes: ``hierarchy:controllers:path``."""
    found = {}
    for line in content.splitlines():
        _, _, rest = line.partition(b":")
        controllers, _, path = rest.partition(b":")
        found[controllers] = path
    path = found.get(b"name=systemd") or found.get(b"", b"")
    return text(path[:_LONGEST])


_CONTAINER = re.compile(
    r"(?:^|[-/:])([0-9a-f]{64})(?:\.scope)?$|^(?:lxc\.payload\.|machine-)([^/]+?)(?:\.scope)?$"
)
"""What Docker, Podman, CRI-O and containerd name a cgroup by, and LXC and systemd-nspawn."""


def unit(cgroup: str) -> str:
    """Return the systemd unit that a cgroup is in, as far as its path tells: the innermost; "" if none."""
    parts = [part for part in cgroup.split("/") if part.endswith((".service", ".scope"))]
    return parts[-1] if parts else ""


def container(cgroup: str) -> str:
    """Return the container that a cgroup is in, as its path tells; "" if none."""
    for part in cgroup.split("/"):
        match = _CONTAINER.search(part)
        if match:
            return match[1] or match[2]
    return ""


def described(process: Process) -> dict[str, Any]:
    """Return a process as an object for JSON. What is not UTF-8 is U+FFFD."""
    return {
        "pid": process.pid,
        "uid": process.uid,
        "program": _readable(process.program),
        "command": [_readable(word) for word in process.command],
        "cgroup": _readable(process.cgroup),
        "unit": _readable(unit(process.cgroup)),
        "container": _readable(container(process.cgroup)),
    }


def _readable(said: str) -> str:
    return raw(said).decode(errors="replace")
