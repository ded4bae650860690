"""Find the program that makes a request, from what /proc shows of the waiting thread.

The kernel reuses the numbers of processes, and a process may execute another program. So this module keeps a
descriptor of each command line: reading it fails once the process has ended, and gives something else after
execve(2). A read takes half a microsecond.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from typing import Any, NamedTuple

from cowfs.jsontext import raw, text
from cowfs.linux import callers

_MOST = 64
"""How many processes are remembered at a time."""
_LONGEST = 4096
"""How many bytes of a command line, program name or cgroup name are kept."""


class Process(NamedTuple):
    """A process that made a request."""

    pid: int
    """The process, not the thread."""
    uid: int
    """The user of the request (fsuid)."""
    program: str
    """The path of its program. If the kernel does not show that, its name (proc_pid_comm(5)), which the
    process can change; "" if unknown."""
    command: tuple[str, ...]
    """The first 4096 bytes of its arguments. It may have changed them."""
    cgroup: str
    """Its cgroup in version 2, or else in systemd's hierarchy; "" if it has none."""


class _Known(NamedTuple):
    fd: int
    command: bytes
    process: Process


class Processes:
    """The processes that made the latest requests."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[int, int], _Known] = OrderedDict()

    def look_at(self, tid: int, uid: int) -> Process | None:
        """Return the process whose thread *tid* waits for an answer as the user *uid*; None if unknown.

        Returns the same object while it is the same process with the same command line.
        """
        known = self._known.get((tid, uid))
        if known is not None:
            try:
                if os.pread(known.fd, _LONGEST, 0) == known.command:
                    return known.process
            except OSError:  # it has ended, and another process has its number
                pass
            del self._known[tid, uid]
            os.close(known.fd)
        return self._look(tid, uid) if tid > 0 else None

    def known_by(self, tid: int, uid: int) -> tuple[int, bytes]:
        """Return how to check that :meth:`look_at` still holds for a process.

        The result is a descriptor of its command line, and the bytes that it must give; -1 if the process is
        not remembered.
        """
        known = self._known.get((tid, uid))
        return (-1, b"") if known is None else (known.fd, known.command)

    def _look(self, tid: int, uid: int) -> Process:
        try:
            fd = os.open(f"{callers.proc()}/{tid}/cmdline", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # hidden (hidepid), or no descriptor left
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
        """Forget all processes."""
        while self._known:
            os.close(self._known.popitem()[1].fd)


def _read(tid: int, uid: int, command: bytes) -> Process:
    """Return what /proc shows of a thread. OSError, ValueError."""
    status = _content(f"{tid}/status")
    pid = next(int(line[5:]) for line in status.splitlines() if line.startswith(b"Tgid:"))
    try:
        program = os.readlink(os.fsencode(f"{callers.proc()}/{tid}/exe"))
    except OSError:  # it has more capabilities than this process, or is another user's
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
    with open(f"{callers.proc()}/{path}", "rb", buffering=0) as file:
        return file.read(1 << 16) or b""


def _cgroup(content: bytes) -> str:
    """Return the cgroup from lines ``hierarchy:controllers:path`` (cgroups(7))."""
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
"""Cgroups of containers, as Docker, Podman, CRI-O, containerd, LXC and systemd-nspawn name them."""


def unit(cgroup: str) -> str:
    """Return the innermost systemd unit in the path of a cgroup; "" if none."""
    parts = [part for part in cgroup.split("/") if part.endswith((".service", ".scope"))]
    return parts[-1] if parts else ""


def container(cgroup: str) -> str:
    """Return the container that the path of a cgroup names; "" if none."""
    for part in cgroup.split("/"):
        match = _CONTAINER.search(part)
        if match:
            return match[1] or match[2]
    return ""


def described(process: Process) -> dict[str, Any]:
    """Return a process as an object for JSON. Bytes that are not UTF-8 become U+FFFD."""
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
