"""Nodes: the inodes of the merged tree that the kernel knows, and the table of them."""

from __future__ import annotations

import stat
import sys
from array import array
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

from cowfs.layers.base import Key
from cowfs.layers.partial import Part
from cowfs.overlay.stack import Place

if TYPE_CHECKING:
    from cowfs.overlay.handle import Handles

ROOT_INO = 1  # FUSE_ROOT_ID
APART = 1 << 48
"""Set in the numbers of all inodes that are not kept (:mod:`cowfs.overlay.graft`), and in no others."""
LAYER_BITS = 4
LAYER = (1 << LAYER_BITS) - 1


def in_number(layer: int, key: Key) -> int | None:
    """Return a place in an image as one number; None if it does not fit.

    Most known inodes are files with a single place, and a tuple would be a fifth of a node's memory.
    """
    return key << LAYER_BITS | layer if type(key) is int and 0 <= layer <= LAYER else None


class Node:
    """One inode of the merged tree; hard links share one Node.

    ``upper`` is None until it is copied up. For a directory, ``lowers`` are all directories merged into it,
    topmost first. For a file, they are the inode that it shows, and last the one with its data; these differ
    for a metacopy. ``parent`` and ``name`` are where the node was last seen.
    """

    __slots__ = (
        "added",
        "below",
        "children",
        "copying",
        "dead",
        "generation",
        "handles",
        "indexed",
        "ino",
        "lookups",
        "metacopy",
        "mode",
        "name",
        "others",
        "parent",
        "partial",
        "protection",
        "redirect",
        "upper",
    )

    def __init__(
        self,
        ino: int,
        mode: int,
        parent: Node | None,
        name: bytes,
        upper: Key | None,
        below: tuple[Place, ...] | int,
        generation: int = 0,
    ) -> None:
        self.ino = ino
        self.generation = generation
        self.mode = mode
        self.parent = parent
        self.name = name
        self.upper = upper
        self.children: dict[bytes, Node] | None = {} if stat.S_ISDIR(mode) else None
        self.below = below
        """The places that *lowers* returns; for most files packed into one number (:func:`in_number`)."""
        self.others: set[tuple[Node, bytes]] | None = None
        """The names of a hard link that are known besides this one."""
        self.lookups = 0
        self.handles: Handles | None = None
        self.copying: Any = None  # the object on which the adapter makes others wait
        self.metacopy = False
        self.partial: Part | None = None
        """How much of its data a partial file has in the upper; None for others."""
        self.protection: int | None = None  # see cowfs.overlay.protect; None: not looked for yet
        self.redirect: bytes | None = None
        self.added = 0  # how often a name was put into it, or is about to be
        self.indexed: int | None = None  # link count of an indexed hard link
        self.dead = False

    @property
    def lowers(self) -> tuple[Place, ...]:
        """The node's places in the lower layers."""
        below = self.below
        return ((below & LAYER, below >> LAYER_BITS),) if isinstance(below, int) else below

    @lowers.setter
    def lowers(self, lowers: tuple[Place, ...]) -> None:
        self.below = lowers

    @property
    def is_dir(self) -> bool:
        return self.children is not None

    @property
    def is_merged(self) -> bool:
        """Whether a directory shows names of lower layers."""
        return self.below != ()

    def __repr__(self) -> str:
        place = "upper" if self.upper is not None else f"lower {self.lowers[0][0]}" if self.lowers else "gone"
        return f"<Node {self.ino} {self.name!r} {stat.filemode(self.mode)} {place}>"


class NodeTable:
    """All live nodes by inode number. A node lives while the kernel or a child of it refers to it."""

    __slots__ = ("_by_ino", "_modes", "many", "most", "root", "too_many")

    def __init__(self, root: Node) -> None:
        self.root = root
        self._by_ino: dict[int, Node] = {root.ino: root}
        self._modes: dict[int, int] = {}
        self.most = 0
        """The largest number of nodes since :meth:`compact`, counted when one is removed."""
        self.many = sys.maxsize
        """With more nodes than this …"""
        self.too_many: Callable[[], None] = lambda: None
        """… this is called for each that is added."""

    def __len__(self) -> int:
        return len(self._by_ino)

    def __getitem__(self, ino: int) -> Node:
        return self._by_ino[ino]

    def all(self) -> list[Node]:
        return list(self._by_ino.values())

    def get(self, ino: int) -> Node | None:
        return self._by_ino.get(ino)

    def compact(self) -> None:
        """Shrink the table to the memory that its nodes need: a dictionary does not shrink by itself."""
        self._by_ino = dict(self._by_ino)
        self.most = 0

    def oldest(self, count: int) -> array[int]:
        """Return the numbers of the *count* nodes that were added or renewed longest ago."""
        return array("Q", islice(self._by_ino, count))

    def set_aside(self, node: Node) -> None:
        """Free the number of a node for another node, until :meth:`put_back`."""
        del self._by_ino[node.ino]

    def put_back(self, node: Node) -> None:
        """Enter a node that was set aside again, replacing the node that has its number now."""
        self._by_ino[node.ino] = node

    def renew(self, ino: int) -> Node | None:
        """Make a node the most recently added, and return it; None if there is no such node."""
        node = self._by_ino.pop(ino, None)
        if node is not None:
            self._by_ino[ino] = node
        return node

    def child(self, parent: Node, name: bytes) -> Node | None:
        """Return the live node known under *name*."""
        assert parent.children is not None
        node = parent.children.get(name)
        if node is None:
            return None
        if self._by_ino.get(node.ino) is not node:  # dead, and another node has its number now
            del parent.children[name]
            return None
        return node

    def add(self, node: Node) -> None:
        """Enter a new node, also under its name.

        It replaces a dead node of the same number: it has another generation, and takes over the lookups that
        the kernel will forget.
        """
        before = self._by_ino.get(node.ino)
        if before is not None:
            if node.generation == before.generation:
                node.generation += 1
            node.lookups += before.lookups
        node.mode = self._modes.setdefault(node.mode, node.mode)  # few differ: share the ints
        self._by_ino[node.ino] = node
        parent, name = node.parent, node.name
        if parent is not None and parent.children is not None:
            known = parent.children.get(name)
            if known is not None:
                _drop_other(known, parent, name)
            parent.children[name] = node
        if len(self._by_ino) > self.many:
            self.too_many()

    def rename(self, node: Node, parent: Node, name: bytes) -> None:
        """Add a name under which *node* is known."""
        assert parent.children is not None
        if node.parent is not parent or node.name != name:
            before = node.parent, node.name
            if _stands_at(node, *before) and before[0] is not None:
                if node.others is None:
                    node.others = set()
                node.others.add((before[0], before[1]))
            _drop_other(node, parent, name)
            node.parent, node.name = parent, name
        known = parent.children.get(name)
        if known is not None and known is not node:
            _drop_other(known, parent, name)
        parent.children[name] = node

    def detach(self, parent: Node, name: bytes) -> None:
        """Forget a name, but not its node."""
        if parent.children is not None:
            node = parent.children.pop(name, None)
            if node is not None:
                _drop_other(node, parent, name)

    def place(self, node: Node) -> tuple[Node, bytes] | None:
        """Return a name of the node: the one under which it was last seen, or another known one."""
        if node.parent is not None and _stands_at(node, node.parent, node.name):
            return node.parent, node.name
        for parent, name in node.others or ():
            if not parent.dead:
                _drop_other(node, parent, name)
                node.parent, node.name = parent, name
                return parent, name
        return None

    def unused(self, node: Node) -> list[Node]:
        """Remove *node* if nothing refers to it, then its parents likewise; return the removed nodes."""
        removed: list[Node] = []
        self.most = max(self.most, len(self._by_ino))
        others, node.others = node.others, None
        self._remove_upwards(node, removed)
        if others is not None:
            if not removed:
                node.others = others
                return removed
            for parent, name in others:
                _leave(node, parent, name)
                if parent not in removed:
                    self._remove_upwards(parent, removed)
        return removed

    def _remove_upwards(self, node: Node, removed: list[Node]) -> None:
        walk: Node | None = node
        while not (
            walk is None
            or walk.lookups > 0
            or walk.children
            or walk.handles
            or walk is self.root
            or walk.copying is not None
        ):
            if self._by_ino.get(walk.ino) is walk:
                del self._by_ino[walk.ino]
            removed.append(walk)
            if walk.parent is not None:
                _leave(walk, walk.parent, walk.name)
            walk = walk.parent


def path_of(node: Node) -> bytes:
    """Return the path of a node from the root, without a leading slash: b"" is the root."""
    names: list[bytes] = []
    walk: Node | None = node
    while walk is not None and walk.parent is not None:
        names.append(walk.name)
        walk = walk.parent
    return b"/".join(reversed(names))


def _stands_at(node: Node, parent: Node | None, name: bytes) -> bool:
    return parent is not None and parent.children is not None and parent.children.get(name) is node


def _leave(node: Node, parent: Node, name: bytes) -> None:
    """Remove a name from a directory's known names, if it is that of *node*."""
    if parent.children is not None and parent.children.get(name) is node:
        del parent.children[name]


def _drop_other(node: Node, parent: Node, name: bytes) -> None:
    if node.others is not None:
        node.others.discard((parent, name))
        if not node.others:
            node.others = None
