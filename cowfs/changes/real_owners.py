"""Show the merged tree of a store that was used in a user namespace as it is outside of that namespace."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from cowfs.changes.version import Node, Tree
from cowfs.layers.acl import with_known
from cowfs.overlay.mapped_owners import ACLS, Translation
from cowfs.types import own_attr


class RealOwners:
    """The tree *after*, each file with the owner that a commit in the namespace would have given it.

    A user or group that has no number in the namespace is that of the file before the changes, because nobody
    in the namespace can change it. So are those in its ACL. What shows as nobody may be one of these even if
    the namespace has a user with this number.
    """

    def __init__(
        self,
        after: Tree,
        before: tuple[Tree, Tree],
        owners: Translation,
        renames: Callable[[], dict[bytes, bytes]],
    ) -> None:
        """*before* is the tree before the changes, with the store's owners and with the real ones. *renames*
        returns the old paths of renamed files and directories by the new ones; it may take long."""
        self._renames = renames
        self._sources: dict[bytes, bytes] | None = None
        self._after = after
        self._seen_before, self._before = before
        self._owners = owners

    def node(self, path: bytes) -> Node | None:
        found = self._after.node(path)
        if found is None:
            return None
        attr = own_attr(found.attr)
        user, group = self._owners.user(attr.st_uid), self._owners.group(attr.st_gid)
        nobody = self._owners.nobody
        if attr.st_uid == nobody[0] or attr.st_gid == nobody[1]:
            old_path = self._old_path(path)
            was, seen = self._before.node(old_path), self._seen_before.node(old_path)
            if was is not None and seen is not None:
                user = was.attr.st_uid if attr.st_uid == seen.attr.st_uid == nobody[0] else user
                group = was.attr.st_gid if attr.st_gid == seen.attr.st_gid == nobody[1] else group
        attr.st_uid = attr.st_uid if user is None else user
        attr.st_gid = attr.st_gid if group is None else group
        return replace(found, attr=attr, xattrs=functools.partial(self._xattrs, path, found))

    def _old_path(self, path: bytes) -> bytes:
        """Return the path before the changes of what is at *path* now."""
        if self._before.node(path) is not None:
            return path
        if self._sources is None:
            self._sources = self._renames()
        above, rest = path, b""
        while above:
            if above in self._sources:
                return self._sources[above] + rest
            above, _, name = above.rpartition(b"/")
            rest = b"/" + name + rest
        return path

    def _xattrs(self, path: bytes, node: Node) -> dict[bytes, bytes]:
        found = node.xattrs()
        real = {name: self._owners.xattr(name, value) for name, value in found.items()}
        acls = ACLS & found.keys()
        old_path = self._old_path(path) if acls else path
        was, seen = (self._before.node(old_path), self._seen_before.node(old_path)) if acls else (None, None)
        if was is not None and seen is not None:
            old, shown = was.xattrs(), seen.xattrs()
            real |= {name: with_known(real[name], shown[name], old[name]) for name in acls & old.keys()}
        return real

    def names(self, path: bytes) -> set[bytes]:
        return self._after.names(path)

    def others(self, wanted: Iterable[tuple[int, int, int]]) -> Iterator[bytes]:
        return self._after.others(wanted)
