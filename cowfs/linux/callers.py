"""The groups and capabilities of a caller. A FUSE request carries only its user, group and thread.

A thread that waits for the daemon's answer exists, and /proc describes it. If it is killed meanwhile and
another thread gets its number, nobody receives the answer.
"""

from __future__ import annotations

from typing import NamedTuple

from cowfs.linux.privileges import CAPABILITIES

_proc = "/proc"


def set_proc(proc: str) -> None:
    """From now on, read about callers in the proc filesystem at *proc*."""
    global _proc  # noqa: PLW0603 - a process has one
    _proc = proc


def proc() -> str:
    """Return where the proc filesystem is."""
    return _proc


_EVERYBODY = "0 0 4294967295"
"""The ``uid_map`` of the initial user namespace (user_namespaces(7))."""
_MAPS = ("uid_map", "gid_map", "projid_map")
_GETXATTR = frozenset(b"%d" % number for number in (191, 192, 193, 229, 230, 231, 8, 9, 10))
"""The numbers of getxattr(2), lgetxattr(2) and fgetxattr(2): on x86-64, on i386, and on all newer machines.
Nothing else that has one of these numbers waits for the value of an extended attribute."""

_WRITES = frozenset(
    b"%d" % number for number in (1, 18, 20, 296, 328, 4, 181, 146, 334, 379, 64, 66, 68, 70, 287)
) | {b"running"}
"""The numbers of write(2), pwrite64(2), writev(2), pwritev(2) and pwritev2(2) on the same machines, and what
/proc shows of a thread of io_uring(7). Nothing else that has one of these numbers removes an attribute."""


class Caller(NamedTuple):
    """What /proc shows of a thread that waits for an answer."""

    groups: frozenset[int]
    """Its group (fsgid) and supplementary groups."""
    capabilities: int
    """Its effective capabilities in the initial user namespace, as bits; 0 in any other namespace."""

    def has(self, capability: str) -> bool:
        """Whether it has *capability*, a name in :data:`cowfs.linux.privileges.CAPABILITIES`."""
        return bool(self.capabilities >> CAPABILITIES[capability] & 1)


def look_at(pid: int) -> Caller | None:
    """Return what /proc shows of a caller. None if it is outside this PID namespace (then *pid* is 0), or
    hidden.
    """
    try:
        with open(f"{_proc}/{pid}/status", encoding="ascii", errors="replace") as status:
            facts = dict(line.split(":", 1) for line in status)
        groups = frozenset(map(int, [*facts["Groups"].split(), facts["Gid"].split()[3]]))
        capabilities = int(facts["CapEff"], 16)
        if capabilities and not all(_is_everybody(pid, name) for name in _MAPS):
            capabilities = 0
    except (OSError, KeyError, ValueError, IndexError):
        return None
    return Caller(groups, capabilities)


def _is_everybody(pid: int, name: str) -> bool:
    """Whether a map of a process is that of the initial user namespace. Others seldom have the same."""
    with open(f"{_proc}/{pid}/{name}", encoding="ascii", errors="replace") as text:
        return " ".join(text.read().split()) == _EVERYBODY


def may_see_trusted(pid: int, uid: int) -> bool:
    """Whether a caller may see trusted.* attributes (xattr(7)): it has CAP_SYS_ADMIN.

    If /proc shows nothing of it, only root may (*uid* 0).
    """
    caller = look_at(pid)
    return caller.has("CAP_SYS_ADMIN") if caller is not None else uid == 0


def asks_for_a_size(tid: int) -> bool:
    """Whether a thread that waits for the value of an extended attribute passes no buffer for it.

    It then only learns how long the value is. False if /proc does not show its system call
    (PTRACE_MODE_ATTACH in ptrace(2)), or if the thread does not sleep yet.
    """
    call = _system_call(tid)
    return len(call) > 4 and call[0] in _GETXATTR and int(call[4], 16) == 0


def may_be_in_write(tid: int) -> bool:
    """Whether a thread that waits for the removal of an extended attribute writes to a file.

    True if /proc does not show its system call, as it does not to a daemon with fewer capabilities.
    """
    call = _system_call(tid)
    return not call or call[0] in _WRITES


def _system_call(tid: int) -> list[bytes]:
    """Return the number, six arguments and two registers of a system call; an empty list if hidden."""
    try:
        with open(f"{_proc}/{tid}/syscall", "rb", buffering=0) as file:
            return file.read(256).split()
    except OSError:
        return []
