"""Directories whose changes are not kept: they show another union, whose upper layer is in memory.

That union has the layers of the first one, and below its own upper also the first one's upper, so it shows
everything that was there before. Its nodes have numbers of their own
(:data:`~cowfs.overlay.node.APART`) in the same table. Each directory of it that users see is a
*border*. A border is entered among the children of the first union's directory, where every search for the
name finds it. Each call is passed on to the union that its node belongs to, so neither union needs to know
the other.

A border behaves like a mountpoint: it and the directories above it cannot be moved or removed (EBUSY), and
nothing can be renamed or linked across it (EXDEV).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from cowfs.errors import os_error
from cowfs.overlay.dir import ROOT, Owner
from cowfs.overlay.fs import OverlayFs
from cowfs.overlay.lookup import lookup
from cowfs.overlay.node import APART, Node
from cowfs.overlay.overlay import Overlay
from cowfs.overlay.readdir import Seen
from cowfs.types import Attr, FsStats


class Grafted(Overlay):
    """A union that does not keep the changes below some directories. See the module."""

    def __init__(self, *args: Any, **more: Any) -> None:
        self.apart: Overlay = self  # until there is another
        self.borders: dict[Node, Node] = {}
        """The nodes of *apart* that are seen, and the first union's directories that they are seen in."""
        self._fixed: set[Node] = set()
        super().__init__(*args, **more)

    def graft(self, apart: Overlay, path: bytes) -> None:
        """Show *apart* at this path, instead of the first union. Call it before the mount.

        Pass the same *apart* for all paths. ENOENT if the path does not exist, ENOTDIR if it is not a
        directory or is below a symbolic link.
        """
        if self.apart is self:
            self.apart = apart
            apart.nodes = self.nodes
            apart.root.lookups = 1
            self.nodes.add(apart.root)
        *above, name = path.strip(b"/").split(b"/")
        parent, inner = self.root, apart.root
        for part in above:
            parent, inner = _directory(self, parent, part), _directory(apart, inner, part)
        _directory(self, parent, name)  # it exists; from now on, nobody looks it up there
        border = _directory(apart, inner, name)
        border.lookups += 1
        apart.copy_up_meta(border)
        parent.lookups += 1
        assert parent.children is not None
        hidden = parent.children.pop(name)
        self.release(hidden)
        parent.children[name] = border
        self.borders[border] = parent
        walk: Node | None = parent
        while walk is not None:
            self._fixed.add(walk)
            walk = walk.parent

    def unions(self) -> tuple[OverlayFs, ...]:
        return self, self.apart

    def union_of(self, node: Node) -> Overlay:
        return self.apart if node.ino & APART else self

    def above(self, node: Node) -> Node:
        return self.borders.get(node) or node.parent or node

    def room_of(self, ino: int) -> FsStats:
        return (self.apart if ino & APART else self).upper.statfs()

    def _must_stay(self, node: Node) -> None:
        if node in self.borders or node in self._fixed:
            raise os_error(errno.EBUSY, node.name)

    def _must_be_one_side(self, one: Node, other: Node) -> None:
        if (one.ino ^ other.ino) & APART:
            raise os_error(errno.EXDEV, one.name)

    def _removal(self, parent: Node, name: bytes) -> Overlay:
        """Return the union in which a name is to be removed, or replaced."""
        node = self.nodes.child(parent, name) if parent.children is not None else None
        if node is not None:
            self._must_stay(node)
        return self.union_of(parent)

    def rmdir(self, parent: Node, name: bytes, seen: Seen | None = None) -> Node:
        return Overlay.rmdir(self._removal(parent, name), parent, name, seen)

    def rename(
        self,
        parent: Node,
        name: bytes,
        new_parent: Node,
        new_name: bytes,
        flags: int = 0,
        seen: Seen | None = None,
        owner: Owner = ROOT,
    ) -> Node | None:
        self._must_be_one_side(parent, new_parent)
        self._removal(new_parent, new_name)
        union = self._removal(parent, name)
        return Overlay.rename(union, parent, name, new_parent, new_name, flags, seen, owner)

    def link(self, node: Node, parent: Node, name: bytes) -> Attr:
        self._must_be_one_side(node, parent)
        return Overlay.link(self.union_of(parent), node, parent, name)


def _directory(fs: OverlayFs, parent: Node, name: bytes) -> Node:
    found = lookup(fs, parent, name)
    if found is None:
        raise os_error(errno.ENOENT, name)
    if not found[0].is_dir:
        fs.release(found[0])
        raise os_error(errno.ENOTDIR, name)
    return found[0]


def _passed_on(method: Callable[..., Any], *, by_handle: bool) -> Callable[..., Any]:
    """Return a method that calls *method* of the union that its first argument belongs to."""

    def by_node(self: Grafted, node: Node, *args: Any, **more: Any) -> Any:
        return method(self.apart if node.ino & APART else self, node, *args, **more)

    def by_its_node(self: Grafted, handle: Any, *args: Any, **more: Any) -> Any:
        return method(self.apart if handle.node.ino & APART else self, handle, *args, **more)

    return by_its_node if by_handle else by_node


_BY_NODE = (
    "lookup", "resolve", "readdir", "listing", "look_through", "create", "create_unnamed", "mkdir", "symlink",
    "mknod", "unlink", "nlink", "setattr", "readlink", "was_read", "must_be_allowed", "getxattr", "listxattr",
    "setxattr", "removexattr", "getflags", "setflags", "version", "birth", "open", "begin_lazily",
    "is_long_to_cut", "attach", "copy_up", "copy_up_chain", "copy_up_meta", "prepare_copy_up", "stat",
    "needs_data", "data_waits", "forget", "release",
)  # fmt: skip
_BY_HANDLE = ("write", "will_be_written", "seek", "release_handle")
for _name in _BY_NODE:
    setattr(Grafted, _name, _passed_on(getattr(Overlay, _name), by_handle=False))
for _name in _BY_HANDLE:
    setattr(Grafted, _name, _passed_on(getattr(Overlay, _name), by_handle=True))
