"""POSIX ACLs, for layers without a kernel filesystem: how an ACL affects a mode, and a mode an ACL.

The rules are those of fs/posix_acl.c, the layout of an xattr's value that of linux/posix_acl_xattr.h.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterator

from cowfs.errors import os_error

DEFAULT = b"system.posix_acl_default"
ACCESS = b"system.posix_acl_access"

Entry = tuple[int, int, int]
"""A tag, permissions, and the user or group of the tags that have one."""

_VERSION = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")
_VERSION_2 = 2
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_WRITE = 2
_NOBODY = 0xFFFFFFFF  # ACL_UNDEFINED_ID
_FOLLOWS = {
    0: (_USER_OBJ,),
    _USER_OBJ: (_USER, _GROUP_OBJ),
    _USER: (_USER, _GROUP_OBJ),
    _GROUP_OBJ: (_GROUP, _MASK, _OTHER),
    _GROUP: (_GROUP, _MASK),
    _MASK: (_OTHER,),
    _OTHER: (),
}
"""The order of the tags; an ACL with named users or groups must have a mask."""


def parse(value: bytes) -> list[Entry]:
    """Return the entries; none if the value means *no ACL*. EINVAL, EOPNOTSUPP as for setxattr(2)."""
    if not value:
        return []
    if len(value) < _VERSION.size or (len(value) - _VERSION.size) % _ENTRY.size:
        raise os_error(errno.EINVAL)
    if _VERSION.unpack_from(value)[0] != _VERSION_2:
        raise os_error(errno.EOPNOTSUPP)
    entries = list(_ENTRY.iter_unpack(value[_VERSION.size :]))
    before = 0
    for tag, perm, _ in entries:
        if tag not in _FOLLOWS[before] or perm & ~7:
            raise os_error(errno.EINVAL)
        before = tag
    tags = {tag for tag, _, _ in entries}
    if entries and (before != _OTHER or (tags & {_USER, _GROUP} and _MASK not in tags)):
        raise os_error(errno.EINVAL)
    return entries


def of_mode(mode: int) -> list[Entry]:
    """Return the ACL that is equivalent to the nine bits of a mode."""
    tags = ((_USER_OBJ, 6), (_GROUP_OBJ, 3), (_OTHER, 0))
    return [(tag, mode >> shift & 7, _NOBODY) for tag, shift in tags]


def build(entries: list[Entry]) -> bytes:
    """Return the value of the xattr."""
    return _VERSION.pack(_VERSION_2) + b"".join(_ENTRY.pack(*entry) for entry in entries)


def mode_of(entries: list[Entry]) -> tuple[int, bool]:
    """Return the nine mode bits of an ACL, and whether they are equivalent to it."""
    perms = {tag: perm for tag, perm, _ in entries}
    group = perms.get(_MASK, perms.get(_GROUP_OBJ, 0))
    mode = perms.get(_USER_OBJ, 0) << 6 | group << 3 | perms.get(_OTHER, 0)
    return mode, perms.keys() <= {_USER_OBJ, _GROUP_OBJ, _OTHER}


def writers(entries: list[Entry]) -> Iterator[tuple[str, int]]:
    """Yield who may write besides the owner: ``user`` or ``group`` with a number, or ``others`` with -1.

    The file's own group has the number -1.
    """
    mask = next((perm for tag, perm, _ in entries if tag == _MASK), 7)
    for tag, perm, who in entries:
        if tag in {_USER, _GROUP, _GROUP_OBJ} and perm & mask & _WRITE:
            yield "user" if tag == _USER else "group", -1 if tag == _GROUP_OBJ else who
        elif tag == _OTHER and perm & _WRITE:
            yield "others", -1


def with_mode(entries: list[Entry], mode: int) -> list[Entry]:
    """Return the ACL after chmod(2) to *mode*."""
    allowed = _allowed(entries, mode)
    return [(tag, allowed.get(tag, perm), who) for tag, perm, who in entries]


def masked(entries: list[Entry], mode: int) -> list[Entry]:
    """Return the ACL of an inode that is created with *mode* under the default ACL *entries*."""
    allowed = _allowed(entries, mode)
    return [(tag, perm & allowed.get(tag, 7), who) for tag, perm, who in entries]


def renamed(value: bytes, user: Callable[[int], int], group: Callable[[int], int]) -> bytes:
    """Return the value of an xattr with other users and groups. EINVAL, EOPNOTSUPP as :func:`parse`."""
    entries = parse(value)
    name = {_USER: user, _GROUP: group}
    changed = [(tag, perm, name[tag](who) if tag in name else who) for tag, perm, who in entries]
    return build(changed) if value else value


def has_unknown(value: bytes) -> bool:
    """Whether an ACL, as getxattr(2) returns it, names a user or group that has no number here. EINVAL."""
    return any(_is_unknown(entry) for entry in parse(value))


def same_names(real: bytes, shown: bytes) -> bool:
    """Whether two ACLs name the same users and groups, with the same permissions.

    In *shown*, which a mount shows, root stands for those that have no number in *real*. EINVAL.
    """
    named = [
        (tag, perm, 0 if who == _NOBODY else who) for tag, perm, who in parse(real) if tag in {_USER, _GROUP}
    ]
    return sorted(named) == sorted(entry for entry in parse(shown) if entry[0] in {_USER, _GROUP})


def with_known(value: bytes, old: bytes, known: bytes) -> bytes:
    """Return an ACL with the users and groups of *known*, another view of *old*, where *old* lacks numbers.

    *value* is *old* with other permissions; if it is not, it is returned as it is. EINVAL.
    """
    entries, views = parse(value), list(zip(parse(old), parse(known), strict=True))
    names = [(tag, other[2]) for (tag, perm, who), other in views if _is_unknown((tag, perm, who))]
    unknown = [number for number, entry in enumerate(entries) if _is_unknown(entry)]
    if [entries[number][0] for number in unknown] != [tag for tag, _ in names]:
        return value
    for number, (tag, who) in zip(unknown, names, strict=True):
        entries[number] = tag, entries[number][1], who
    return build(entries) if entries else value


def _is_unknown(entry: Entry) -> bool:
    return entry[0] in {_USER, _GROUP} and entry[2] == _NOBODY


def _allowed(entries: list[Entry], mode: int) -> dict[int, int]:
    """Return the permissions that a mode gives to each tag that it concerns."""
    group = _MASK if any(tag == _MASK for tag, _, _ in entries) else _GROUP_OBJ
    return {_USER_OBJ: mode >> 6 & 7, group: mode >> 3 & 7, _OTHER: mode & 7}
