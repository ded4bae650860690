"""Redirects: the note, on a renamed inode, of where the layers below have it.

It is a name, of the same directory, or a path from the root of the layers. A layer that somebody else made
may say anything: what is valid, and what is answered to the rest, is what the kernel's overlayfs does
(ovl_get_redirect_xattr() in fs/overlayfs/namei.c).
"""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cowfs.overlay.node import Node

log = logging.getLogger(__name__)

_MOST_TOLD = 200
NAME_MAX = 255
_NO_NAMES = {b"", b".", b".."}
_told: set[bytes] = set()


def parse(value: bytes) -> bytes:
    """Return the redirect in an xattr. EINVAL for one that is empty, has empty parts, or a slash in a name.

    As to the kernel, it ends before the first NUL.
    """
    redirect = value.partition(b"\0")[0]
    parts = redirect[1:].split(b"/") if redirect.startswith(b"/") else [redirect]
    if not value or (b"" in parts and redirect) or (parts == [redirect] and b"/" in redirect):
        raise refused(errno.EINVAL, value)
    return redirect


def names(redirect: bytes) -> tuple[bytes, ...]:
    """Return the names that a redirect consists of; it begins at the root if it begins with a slash."""
    return tuple(redirect[1:].split(b"/")) if redirect.startswith(b"/") else (redirect,)


def of(node: Node, *, same_directory: bool) -> bytes:
    """Return the name, or the path from the root, by which the lowers know a node."""
    if same_directory:
        return node.redirect if node.redirect is not None else node.name
    path: list[bytes] = []
    walk: Node | None = node
    while walk is not None and walk.parent is not None:
        if walk.redirect is not None and walk.redirect.startswith(b"/"):
            return b"/".join([walk.redirect, *reversed(path)])
        path.append(walk.redirect if walk.redirect is not None else walk.name)
        walk = walk.parent
    return b"/" + b"/".join(reversed(path))


def leads_out(name: bytes) -> bool:
    """Say whether a part of a redirect is no name."""
    return name in _NO_NAMES


def may_exist(name: bytes) -> bool:
    """Say whether a name can be looked up. EACCES for one that leads out (lookup_one() in fs/namei.c)."""
    if name in _NO_NAMES:
        raise refused(errno.EACCES, name)
    return len(name) <= NAME_MAX


def refused(code: int, value: bytes) -> OSError:
    """Return the exception for a redirect that is not followed, and log it, once."""
    if value not in _told and len(_told) < _MOST_TOLD:
        _told.add(value)
        log.warning("a redirect is not followed: %r: %s", value[:NAME_MAX], os.strerror(code))
    return OSError(code, f"a redirect that leads nowhere: {value[:NAME_MAX]!r}")
