"""The mark of a store: a sample of everything that an incomplete copy may lose.

A store contains more than names and data: deleted files are device nodes, and an extended attribute makes a
directory hide the lowers. A copy without them can be mounted, but shows other files. So a store has a
directory with a sample of each, and its header records which samples the filesystem kept when they were made.
If a copy lacks one of these, it lacks the same kind of thing everywhere.

::

    cowfs/mark.0123456789abcdef/
        file        of owner 1:2, mode 1640, last written in 2001, with an attribute; has a second name
        link        the second name
        acl         has an ACL
        whiteout    character device 0:0
        symlink     leads to file

Whenever a directory store is opened for writing, the directory gets a new name. So if a copy is updated with
another program than the one that made it, the samples under the new name show what that program loses.
"""

from __future__ import annotations

import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from cowfs.layers import acl
from cowfs.layers.base import Key, UpperLayer

PREFIX = b"mark."
NAME = re.compile(r"mark\.[0-9a-f]{16}")

_NAMES = _FILE, _LINK, _ACL, _WHITEOUT, _SYMLINK = b"file", b"link", b"acl", b"whiteout", b"symlink"
_ATTRIBUTE = b"cowfs.mark"
"""An attribute of the directory and of the file; the prefix is that of the overlay's."""
_OWNER = (1, 2)
_MODE = 0o1640
_TIME = 981_173_106
"""The mtime: 2001-02-03 04:05:06 UTC."""
_ENTRIES = [(1, 6, 0xFFFFFFFF), (2, 4, 1), (4, 4, 0xFFFFFFFF), (16, 4, 0xFFFFFFFF), (32, 0, 0xFFFFFFFF)]
"""The ACL u::rw,u:1:r,g::r,m::r,o::- in the numbers of linux/posix_acl.h."""

CALLED = {
    "xattrs": "extended attributes",
    "whiteouts": "device nodes",
    "links": "hard links",
    "symlinks": "symbolic links",
    "owners": "owners",
    "modes": "modes",
    "times": "times",
    "acls": "ACLs",
}
"""The header's word for each sample, to the word for it in messages."""


@dataclass(frozen=True, slots=True)
class Mark:
    """The header's record of the mark: the name of its directory, and the samples that the original kept."""

    name: str
    keeps: tuple[str, ...]


def make(layer: UpperLayer, private: Key, xattrs: str, owner: tuple[int, int]) -> Mark:
    """Make a mark in the directory *private*; return which samples the filesystem has kept. Blocks.

    *xattrs* is the prefix of the overlay's attributes. With ``trusted.``, files can be given to other users.
    Never fails: a sample that cannot be made is not in the mark.
    """
    name = PREFIX + secrets.token_hex(8).encode()
    with suppress(OSError):
        directory = layer.mkdir(private, name, 0o755, *owner)
        for step in _steps(layer, directory, xattrs.encode(), owner):
            with suppress(OSError):
                step()
    kept = held(layer, private, name.decode(), xattrs)
    if not xattrs.startswith("trusted."):
        kept.discard("owners")  # a user namespace shows other owners
    return Mark(name.decode(), tuple(what for what in CALLED if what in kept))


def _steps(
    layer: UpperLayer, directory: Key, prefix: bytes, owner: tuple[int, int]
) -> Iterator[Callable[[], object]]:
    file, opened = layer.create(directory, _FILE, 0o600, *owner)
    opened.close()
    with_acl, opened = layer.create(directory, _ACL, 0o600, *owner)
    opened.close()
    yield lambda: layer.setxattr(directory, prefix + _ATTRIBUTE, b"y")
    yield lambda: layer.setxattr(file, prefix + _ATTRIBUTE, b"y")
    yield lambda: layer.setxattr(with_acl, acl.ACCESS, acl.build(_ENTRIES))
    yield lambda: layer.link(file, directory, _LINK)
    yield lambda: layer.symlink(directory, _SYMLINK, _FILE, *owner)
    yield lambda: layer.mknod(directory, _WHITEOUT, stat.S_IFCHR | 0o600, 0, *owner)
    if prefix.startswith(b"trusted."):
        yield lambda: layer.chown(file, *_OWNER)
    yield lambda: layer.chmod(file, _MODE)
    yield lambda: layer.utimens(file, _TIME * 10**9, _TIME * 10**9)


def held(layer: UpperLayer, private: Key, name: str, xattrs: str) -> set[str]:
    """Return the samples of a mark that exist, in the words of the header. Blocks."""
    try:
        there = layer.lookup(private, name.encode())
        directory = there[0] if there is not None else None
        if directory is None:
            return set()
        entries = {entry: layer.lookup(directory, entry) for entry in _NAMES}
    except PermissionError:
        return set(CALLED)  # unknown
    except OSError:
        return set()
    keys = {entry: found[0] for entry, found in entries.items() if found is not None}
    attrs = {entry: found[1] for entry, found in entries.items() if found is not None}
    file, link, whiteout = attrs.get(_FILE), attrs.get(_LINK), attrs.get(_WHITEOUT)
    attribute = xattrs.encode() + _ATTRIBUTE
    have = {
        "xattrs": all(attribute in _xattrs(layer, key) for key in (directory, keys.get(_FILE))),
        "whiteouts": whiteout and stat.S_ISCHR(whiteout.st_mode) and whiteout.st_rdev == 0,
        "links": file and link and file.st_ino == link.st_ino,
        "symlinks": _SYMLINK in attrs and stat.S_ISLNK(attrs[_SYMLINK].st_mode),
        "owners": file and (file.st_uid, file.st_gid) == _OWNER,
        "modes": file and stat.S_IMODE(file.st_mode) == _MODE,
        "times": file and file.st_mtime_ns // 10**9 == _TIME,
        "acls": acl.ACCESS in _xattrs(layer, keys.get(_ACL)),
    }
    return {what for what, is_there in have.items() if is_there}


def _xattrs(layer: UpperLayer, key: Key | None) -> list[bytes]:
    try:
        return layer.listxattr(key) if key is not None else []
    except OSError:
        return []
