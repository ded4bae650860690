"""Who makes a request, beyond what the kernel tells a filesystem's daemon: user, group and process.

A thread that waits for our answer exists, and /proc describes it. If it is killed meanwhile and another gets
its number, nobody receives the answer.
"""

from __future__ import annotations

from typing import NamedTuple

from cowfs.linux.privileges import CAPABILITIES

_proc = "/proc"


def found_at(proc: str) -> None:
    """Look for callers in the proc filesystem at this place from now on."""
    global _proc  # noqa: PLW0603 - a process has one
    _proc = proc


def place() -> str:
    """Return where that is."""
    return _proc


_EVERYBODY = "0 0 4294967295"
"""The users of the first user namespace, in user_namespaces(7)'s words."""
_MAPS = ("uid_map", "gid_map", "projid_map")


class Caller(NamedTuple):
    """A thread that waits for an answer."""

    groups: frozenset[int]
    """All that it is in."""
    capabilities: int
    """The effective ones, in the initial user namespace: 0 for a process in another one."""

    def has(self, capability: str) -> bool:
        """Whether it has one of those that a daemon knows of."""
        return bool(self.capabilities >> CAPABILITIES[capability] & 1)


def look_at(pid: int) -> Caller | None:
    """Return what can be known of a caller; None if nothing: it is outside our PID namespace (then *pid* is
    0), or /proc hides it.
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
    """Whether a process has all users or groups, as in the first user namespace; another one seldom has."""
    with open(f"{_proc}/{pid}/{name}", encoding="ascii", errors="replace") as text:
        return " ".join(text.read().split()) == _EVERYBODY


def may_see_trusted(pid: int, uid: int) -> bool:
    """Whether a caller may see trusted.* attributes (xattr(7)): it has CAP_SYS_ADMIN.

    If nothing is known of it, only root may (*uid* 0).
    """
    caller = look_at(pid)
    return caller.has("CAP_SYS_ADMIN") if caller is not None else uid == 0
