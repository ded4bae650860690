"""Convert POSIX ACLs between xattrs and the text in archives (SCHILY.acl).

The text is that of acl(5), "ACL TEXT FORMS", with star's fourth field for the number of a user or group. The
value of the xattr is that of linux/posix_acl_xattr.h.
"""

from __future__ import annotations

import grp
import pwd
import re
import struct
from functools import lru_cache

_VERSION, _ENTRY = struct.Struct("<I"), struct.Struct("<HHI")
_VERSION_2 = 2
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_NAMES = {
    _USER_OBJ: "user", _USER: "user", _GROUP_OBJ: "group", _GROUP: "group", _MASK: "mask", _OTHER: "other",
}  # fmt: skip
_NOBODY = 0xFFFFFFFF  # ACL_UNDEFINED_ID
_BASE = {_USER_OBJ, _GROUP_OBJ, _OTHER}
_LINE = re.compile(r"(u|user|g|group|m|mask|o|other):([^:]*):([r-]?[w-]?[x-]?)(?::([0-9]{1,10}))?")
_NUMBER = re.compile(r"[0-9]{1,10}")


def to_text(value: bytes) -> bytes | None:
    """Return the text of an xattr's value, with numbers in place of names; None if it is not an ACL."""
    count, rest = divmod(len(value) - _VERSION.size, _ENTRY.size)
    if count < len(_BASE) or rest or _VERSION.unpack_from(value)[0] != _VERSION_2:
        return None
    lines = []
    for tag, perm, who in _ENTRY.iter_unpack(value[_VERSION.size :]):
        if tag not in _NAMES or perm & ~7:
            return None
        name = who if tag in {_USER, _GROUP} else ""
        bits = "".join(letter if perm & bit else "-" for letter, bit in (("r", 4), ("w", 2), ("x", 1)))
        lines.append(f"{_NAMES[tag]}:{name}:{bits}\n")
    return "".join(lines).encode()


def from_text(text: str) -> bytes | None:
    """Return an xattr's value; None if the text is not an ACL.

    Looks up users and groups without a number by name, which may block. Leaves out unknown ones.
    """
    entries: dict[tuple[int, int], int] = {}
    for line in re.split(r"[,\n]", text):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        found = _LINE.fullmatch(line)
        if found is None:
            return None
        kind, name, letters, number = found.groups()
        perm = sum(bit for letter, bit in (("r", 4), ("w", 2), ("x", 1)) if letter in letters)
        is_user = kind[0] == "u"
        if kind[0] in "mo":
            key: tuple[int, int] = (_MASK if kind[0] == "m" else _OTHER, _NOBODY)
        elif not name:
            key = (_USER_OBJ if is_user else _GROUP_OBJ, _NOBODY)
        else:
            who = int(number) if number else _number_of(name, is_user=is_user)
            if who is None:
                continue
            key = (_USER if is_user else _GROUP, who)
            if not 0 <= who < _NOBODY:
                return None
        if key in entries:
            return None
        entries[key] = perm
    tags = {tag for tag, _ in entries}
    if not tags >= _BASE or (tags & {_USER, _GROUP} and _MASK not in tags):
        return None
    return _VERSION.pack(_VERSION_2) + b"".join(
        _ENTRY.pack(tag, perm, who) for (tag, who), perm in sorted(entries.items())
    )


@lru_cache(1024)
def _number_of(name: str, *, is_user: bool) -> int | None:
    if _NUMBER.fullmatch(name):
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid if is_user else grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):
        return None
