"""Translate between the owners that a mount shows and those in its store.

The options for a map (``uidmapping=``, ``squash_to_root`` …) are those of fuse-overlayfs: files in the layers
have the numbers that users have inside a container, and the mount shows the numbers that these users have
outside. A number that is not in the map is shown as the overflow user or group.

The kernel only accepts numbers of the user namespace in which the mount is made. If the owner has no number
there, nobody could change or remove the file (HAS_UNMAPPED_ID() in include/linux/fs.h). So the mount shows
the file as root's; in the store, the owner stays the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from cowfs.layers import acl
from cowfs.linux import user_namespace
from cowfs.linux.user_namespace import Range
from cowfs.types import Attr


@dataclass(frozen=True, slots=True)
class OwnerMap:
    """The owners that a mount shows instead of those that its files have."""

    users: tuple[Range, ...] = ()
    """Ranges: the first number in the layers, the first shown, and how many. Empty: all as they are."""
    groups: tuple[Range, ...] = ()
    user: int | None = None
    """The user that all files are shown to belong to."""
    group: int | None = None


class Owners:
    """The owners in one namespace, translated by a map if there is one."""

    def __init__(
        self, mapped: OwnerMap, users: Sequence[Range] | None, groups: Sequence[Range] | None
    ) -> None:
        self._map = mapped
        self._users = users
        self._groups = groups

    def user(self, number: int) -> int:
        """Return the user that the mount shows for a file's user in the store."""
        given = self._map
        if given.user is not None:
            number = given.user
        elif given.users:
            number = _mapped(number, given.users, 0, "uid")
        return number if self._users is None else _known(number, self._users)

    def group(self, number: int) -> int:
        """Return the group that the mount shows for a file's group in the store."""
        given = self._map
        if given.group is not None:
            number = given.group
        elif given.groups:
            number = _mapped(number, given.groups, 0, "gid")
        return number if self._groups is None else _known(number, self._groups)

    def shown(self, attr: Attr) -> tuple[int, int]:
        """Return the user and the group that the mount shows for a file."""
        return self.user(attr.st_uid), self.group(attr.st_gid)

    def stored_user(self, number: int) -> int:
        """Return the user in the store for a user that the mount shows."""
        return _mapped(number, self._map.users, 1, "uid") if self._map.users else number

    def stored_group(self, number: int) -> int:
        """Return the group in the store for a group that the mount shows."""
        return _mapped(number, self._map.groups, 1, "gid") if self._map.groups else number

    def shown_acl(self, value: bytes) -> bytes:
        """Return an ACL as the mount shows it."""
        return acl.renamed(value, self.user, self.group)

    def stored_acl(self, value: bytes) -> bytes:
        """Return an ACL as the store has it. EINVAL, EOPNOTSUPP as for setxattr(2)."""
        return acl.renamed(value, self.stored_user, self.stored_group)


def _known(number: int, ranges: Sequence[Range]) -> int:
    return number if any(first <= number < first + count for first, _, count in ranges) else 0


def _mapped(number: int, ranges: Sequence[Range], side: int, kind: str) -> int:
    """Translate a number from one *side* of the ranges to the other."""
    for both in ranges:
        if 0 <= number - both[side] < both[2]:
            return number - both[side] + both[1 - side]
    return _overflow(kind)


_overflow = cache(user_namespace.overflow)


def owners(given: OwnerMap | None = None) -> Owners | None:
    """Return the owners of this process's namespace, with a map; None if nothing is translated."""
    for kind in ("uid", "gid"):
        _overflow(kind)  # read it now, while /proc is accessible
    if user_namespace.has_all("uid") and user_namespace.has_all("gid"):
        return None if given is None else Owners(given, None, None)
    users, groups = user_namespace.ranges("uid"), user_namespace.ranges("gid")
    return Owners(given or OwnerMap(), users, groups)
