"""Owners as a mount shows them, and as its store has them.

A map (``uidmapping=``, ``squash_to_root`` …) is fuse-overlayfs's: the files of layers have the numbers that
they have inside a container, and are shown with those that the container's users have outside. What has no
number there is the overflow user's or group's.

The kernel knows only those of the user namespace that the mount is made in. A file of who has no number in
there would be nobody's to it: it could be neither changed nor removed (HAS_UNMAPPED_ID() in
include/linux/fs.h). It is shown as root's, and stays in the store what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cowfs.layers import acl
from cowfs.linux import user_namespace
from cowfs.linux.user_namespace import Range
from cowfs.types import Attr

_OVERFLOW = 65534


@dataclass(frozen=True, slots=True)
class OwnerMap:
    """Which owners a mount is to show in the place of those that its files have."""

    users: tuple[Range, ...] = ()
    """The first number of the files, the first that is shown for it, and how many; none: all as they are."""
    groups: tuple[Range, ...] = ()
    user: int | None = None
    """Whom all is shown to belong to."""
    group: int | None = None


class Owners:
    """Those of one namespace, by a map if there is one."""

    def __init__(
        self, mapped: OwnerMap, users: Sequence[Range] | None, groups: Sequence[Range] | None
    ) -> None:
        self._map = mapped
        self._users = users
        self._groups = groups

    def user(self, number: int) -> int:
        """Return the user that a user of a file is shown as."""
        given = self._map
        if given.user is not None:
            number = given.user
        elif given.users:
            number = _mapped(number, given.users, 0, "uid")
        return number if self._users is None else _known(number, self._users)

    def group(self, number: int) -> int:
        """The same for a group."""
        given = self._map
        if given.group is not None:
            number = given.group
        elif given.groups:
            number = _mapped(number, given.groups, 0, "gid")
        return number if self._groups is None else _known(number, self._groups)

    def shown(self, attr: Attr) -> tuple[int, int]:
        """Return the user and the group that a file is to be shown with."""
        return self.user(attr.st_uid), self.group(attr.st_gid)

    def stored_user(self, number: int) -> int:
        """Return the user that a file of this one, as the mount shows it, has in the store."""
        return _mapped(number, self._map.users, 1, "uid") if self._map.users else number

    def stored_group(self, number: int) -> int:
        """The same for a group."""
        return _mapped(number, self._map.groups, 1, "gid") if self._map.groups else number

    def shown_acl(self, value: bytes) -> bytes:
        """Return an ACL as it is to be shown."""
        return acl.renamed(value, self.user, self.group)

    def stored_acl(self, value: bytes) -> bytes:
        """Return an ACL as it is to be stored. EINVAL, EOPNOTSUPP as setxattr(2)."""
        return acl.renamed(value, self.stored_user, self.stored_group)


def _known(number: int, ranges: Sequence[Range]) -> int:
    return number if any(first <= number < first + count for first, _, count in ranges) else 0


def _mapped(number: int, ranges: Sequence[Range], side: int, kind: str) -> int:
    """Return what a number on the one *side* of the ranges is on the other."""
    for both in ranges:
        if 0 <= number - both[side] < both[2]:
            return number - both[side] + both[1 - side]
    return _overflow(kind)


@cache
def _overflow(kind: str) -> int:
    """Return who stands for those without a number (proc_sys_kernel(5))."""
    try:
        return int(Path(f"/proc/sys/kernel/overflow{kind}").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return _OVERFLOW


def owners(given: OwnerMap | None = None) -> Owners | None:
    """Return the owners of our namespace, by a map; None where all are shown as they are."""
    for kind in ("uid", "gid"):
        _overflow(kind)  # while we have a way there
    if user_namespace.has_all("uid") and user_namespace.has_all("gid"):
        return None if given is None else Owners(given, None, None)
    users, groups = user_namespace.ranges("uid"), user_namespace.ranges("gid")
    return Owners(given or OwnerMap(), users, groups)
