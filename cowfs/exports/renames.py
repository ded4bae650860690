"""Which paths a commit renames in the lower itself.

A file, or a directory, that a command renamed may have an owner who has no number in this user namespace.
Nobody here can give that owner to a new file, so the lower's own one must get the new name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cowfs.changes.paths import join
from cowfs.changes.version import Tree
from cowfs.exports.plan import Item, Plan
from cowfs.linux import user_namespace
from cowfs.types import Change


class Renames:
    """What was renamed, and what of it the lower can rename itself. Blocks; OSError."""

    def __init__(self, items: Plan, before: Tree, after: Tree, told: Mapping[bytes, Change]) -> None:
        self._items = items
        self._before = before
        self._after = after
        self._told = told
        has_all = user_namespace.has_all("uid") and user_namespace.has_all("gid")
        renamed = () if has_all else told.values()
        self._sources = {
            change.path: change.source
            for change in renamed
            if change.kind == "R" and change.source is not None
        }

    def source(self, path: bytes) -> bytes | None:
        """Return the path before of what is at *path*, if the lower's own one should be renamed; else None.

        Its owner has no number here, the old path is free afterwards, and the new one was.
        """
        old = self._old_path(path)
        if old is None or self._before.node(path) is not None:
            return None
        was = self._before.node(old)
        if was is None or not user_namespace.lacks(was.attr.st_uid, was.attr.st_gid):
            return None
        return old if self._is_hidden(old) else None

    def old_path(self, path: bytes) -> bytes | None:
        """Return the path before of what is at *path*, if that, or a directory above, is renamed in the
        lower."""
        return self._old_path(path) if self._is_within(path) else None

    def gone(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield each path that a renamed directory of the lower has, but the new version has not.

        With it comes the path that it had before.
        """
        for path, item in self._items.items():
            source = None if item is Item.WHITEOUT else self.old_path(path)
            if source is None or self._before.node(path) is not None:
                continue
            missing = self._before.names(source) - self._after.names(path)
            for name in sorted(missing):
                if join(path, name) not in self._items:
                    yield join(path, name), join(source, name)

    def what(self, path: bytes) -> list[str] | None:
        """Return which attributes of a renamed inode have changed; None if it is another one."""
        change = self._told.get(path)
        if change is None:
            return []
        return sorted(change.what) if change.kind in {"M", "R"} and "type" not in change.what else None

    def _old_path(self, path: bytes) -> bytes | None:
        above, rest = path, b""
        while above and self._sources:
            if above in self._sources:
                return self._sources[above] + rest
            if above in self._told and self._told[above].kind == "A":
                return None
            above, _, name = above.rpartition(b"/")
            rest = b"/" + name + rest
        return None

    def _is_within(self, path: bytes) -> bool:
        """Whether a directory above *path*, or that itself, is renamed in the lower."""
        while path and self._sources:
            if self.source(path) is not None:
                return True
            path = path.rpartition(b"/")[0]
        return False

    def _is_hidden(self, path: bytes) -> bool:
        """Whether nothing is at *path* afterwards."""
        while path:
            item = self._items.get(path)
            if item is not None:
                return item is Item.WHITEOUT
            path = path.rpartition(b"/")[0]
        return False
