"""Become root of a user namespace, with the users that programs expect.

The calling user is root inside. If /etc/subuid and /etc/subgid give it a range, and newuidmap(1) is
installed, that many other users exist inside; otherwise only root does.
"""

from __future__ import annotations

import os
import pwd
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cowfs.linux import mounts, programs

_WHOLE = (0, 0, 4294967295)
_OVERFLOW = 65534
Range = tuple[int, int, int]
"""The first number inside, its number outside, and the count (user_namespaces(7))."""


@dataclass(frozen=True, slots=True)
class IdMap:
    """The users and the groups that a user namespace maps."""

    users: tuple[Range, ...]
    groups: tuple[Range, ...]


def id_map() -> IdMap:
    """Return the map of this process's user namespace."""
    return IdMap(tuple(ranges("uid")), tuple(ranges("gid")))


def has_everybody(known: IdMap) -> bool:
    """Whether all users and groups have the same number inside as outside."""
    return known == IdMap((_WHOLE,), (_WHOLE,))


def is_outside(known: IdMap) -> bool:
    """Whether the numbers outside of a namespace with this map can be those of this process's namespace.

    All of them exist here, as they do in the initial namespace.
    """
    here = id_map()
    return all(map(_contains, (here.users, here.groups), (known.users, known.groups)))


def _contains(here: tuple[Range, ...], inside: tuple[Range, ...]) -> bool:
    return all(
        any(first <= outside and outside + count <= first + most for first, _, most in here)
        for _, outside, count in inside
    )


def number_in(number: int, ranges: Sequence[Range]) -> int | None:
    """Return the number inside of the user, or group, with *number* outside; None if it has none."""
    return next((number - there + first for first, there, most in ranges if 0 <= number - there < most), None)


def number_outside(number: int, ranges: Sequence[Range]) -> int | None:
    """Return the number outside of the user, or group, with *number* inside; None if there is none."""
    return next((number - first + there for first, there, most in ranges if 0 <= number - first < most), None)


def overflow(kind: str) -> int:
    """Return what stat(2) shows for a user, or a group, that has no number here (proc_sys_kernel(5))."""
    try:
        return int(Path(f"/proc/sys/kernel/overflow{kind}").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return _OVERFLOW


def nobody() -> tuple[int, int]:
    """Return the user and the group that stat(2) shows for those that have no number here."""
    return overflow("uid"), overflow("gid")


def ranges(kind: str) -> list[Range]:
    """Return the users, or groups, that this process's user namespace maps; *kind* is ``uid`` or ``gid``."""
    lines = Path(f"/proc/self/{kind}_map").read_text(encoding="ascii").splitlines()
    return [tuple(map(int, line.split())) for line in lines]  # type: ignore[misc]


def has_all(kind: str) -> bool:
    """Whether the user namespace maps all users, or groups."""
    return ranges(kind) == [_WHOLE]


def has_one_user() -> bool:
    """Whether one user alone has a number here, as after ``unshare --map-root-user``."""
    return sum(count for _, _, count in ranges("uid")) == 1


def lacks(user: int, group: int) -> bool:
    """Whether an owner that stat(2) returned may have no number in this user namespace.

    The number that it shows then may also be that of somebody here, if there is a large range in
    /etc/subuid: nobody can tell.
    """
    return any(
        number == overflow(kind) and not has_all(kind) for kind, number in (("uid", user), ("gid", group))
    )


def become_root() -> None:
    """Enter a user namespace, and a mount namespace in it, as root. For a process with one thread.

    OSError if users may not create user namespaces.
    """
    user, group = os.geteuid(), os.getegid()
    name = ""
    with suppress(KeyError):
        name = pwd.getpwuid(user).pw_name
    wanted = {kind: _subordinate(kind, name, user) for kind in ("uid", "gid")}
    ready, go = os.pipe()
    helper = os.fork()
    if helper == 0:  # it stays outside, because newuidmap(1) must run there
        os.close(go)
        done = bool(os.read(ready, 1)) and _map_range(os.getppid(), user, group, wanted)
        os._exit(0 if done else 1)
    os.close(ready)
    try:
        mounts.unshare_users()
        os.write(go, b"x")
    finally:
        os.close(go)
        _, status = os.waitpid(helper, 0)
    if status:
        mounts.map_user(user, group, inside=0)
    else:
        with suppress(OSError):
            os.setgroups([])
    mounts.unshare_slave()


def _subordinate(kind: str, name: str, user: int) -> tuple[int, int] | None:
    """Return the first subordinate uid or gid of a user, and their count (subuid(5)); None if none."""
    with suppress(OSError, ValueError):
        for line in Path(f"/etc/sub{kind}").read_text(errors="replace").splitlines():
            who, _, rest = line.partition(":")
            if who and who in {name, str(user)}:
                first, _, count = rest.partition(":")
                return int(first), int(count)
    return None


def _map_range(pid: int, user: int, group: int, wanted: dict[str, tuple[int, int] | None]) -> bool:
    """Map the subordinate users and groups into the user namespace of *pid*; return whether that worked."""
    for kind, own in (("gid", group), ("uid", user)):
        program, others = programs.find(f"new{kind}map"), wanted[kind]
        if program is None or others is None:
            return False
        command = [program, str(pid), "0", str(own), "1", "1", *map(str, others)]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            return False
    return True
