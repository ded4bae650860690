"""Nodes: the inodes of the merged tree that the kernel knows of, and the table that finds them."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, Any

from cowfs.layers.base import Key

if TYPE_CHECKING:
    from cowfs.overlay.file import Handle

ROOT_INO = 1  # FUSE_ROOT_ID

Lower = tuple[int, Key]
"""Where a node is found below the upper: the index of the lower layer, and the key in it."""


class Node:
    """One inode of the merged tree; hard links share one Node.

    ``upper`` is None until it is copied up. ``lowers`` are, for a directory, all the directories
    merged into it, topmost first; for a file the one that it shows, and last the one with its data
    (they differ for a metacopy). ``parent`` and ``name`` are where it was last seen.
    """

    __slots__ = (
        "children",
        "copying",
        "dead",
        "generation",
        "handles",
        "indexed",
        "ino",
        "lookups",
        "lowers",
        "metacopy",
        "mode",
        "name",
        "parent",
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
        lowers: tuple[Lower, ...],
    ) -> None:
        self.ino = ino
        self.generation = 0
        self.mode = mode
        self.parent = parent
        self.name = name
        self.upper = upper
        self.lowers = lowers
        self.children: dict[bytes, Node] | None = {} if stat.S_ISDIR(mode) else None
        self.lookups = 0
        self.handles: list[Handle] | None = None
        self.copying: Any = None  # whatever the adapter lets others wait on
        self.metacopy = False
        self.redirect: bytes | None = None
        self.indexed: int | None = None  # for a hard link in the index: how many names the union shows
        self.dead = False

    @property
    def is_dir(self) -> bool:
        return self.children is not None

    @property
    def is_merged(self) -> bool:
        """Whether a directory shows names of lower layers."""
        return bool(self.lowers)

    def __repr__(self) -> str:
        place = "upper" if self.upper is not None else f"lower {self.lowers[0][0]}" if self.lowers else "gone"
        return f"<Node {self.ino} {self.name!r} {stat.filemode(self.mode)} {place}>"


class NodeTable:
    """All live nodes by inode number. A node lives while the kernel or a child of it refers to it."""

    __slots__ = ("_by_ino", "_modes", "root")

    def __init__(self, root: Node) -> None:
        self.root = root
        self._by_ino: dict[int, Node] = {root.ino: root}
        self._modes: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._by_ino)

    def __getitem__(self, ino: int) -> Node:
        return self._by_ino[ino]

    def get(self, ino: int) -> Node | None:
        return self._by_ino.get(ino)

    def child(self, parent: Node, name: bytes) -> Node | None:
        """Return the live node known under *name*."""
        assert parent.children is not None
        node = parent.children.get(name)
        if node is None:
            return None
        if self._by_ino.get(node.ino) is not node:  # a hard link forgotten under its other name
            del parent.children[name]
            return None
        return node

    def add(self, node: Node) -> None:
        """Enter a new node, also under its name. A dead node of the same number makes way:
        its successor has the next generation and takes over what the kernel will forget."""
        before = self._by_ino.get(node.ino)
        if before is not None:
            node.generation = before.generation + 1
            node.lookups += before.lookups
        node.mode = self._modes.setdefault(node.mode, node.mode)  # few different ones: share the ints
        self._by_ino[node.ino] = node
        if node.parent is not None and node.parent.children is not None:
            node.parent.children[node.name] = node

    def rename(self, node: Node, parent: Node, name: bytes) -> None:
        """Let *node* be known under this name from now on (as well)."""
        assert parent.children is not None
        node.parent, node.name = parent, name
        parent.children[name] = node

    def detach(self, parent: Node, name: bytes) -> None:
        """Forget a name, not the node."""
        if parent.children is not None:
            parent.children.pop(name, None)

    def place(self, node: Node) -> tuple[Node, bytes] | None:
        """Return a name that the node has: the one it was last seen under, or another known one.

        The search is slow, but only for a hard link that lost the name it was last seen under.
        """
        parent, name = node.parent, node.name
        if parent is not None and parent.children is not None and parent.children.get(name) is node:
            return parent, name
        for directory in self._by_ino.values():
            for name, child in (directory.children or {}).items():
                if child is node and not directory.dead:
                    node.parent, node.name = directory, name
                    return directory, name
        return None

    def unused(self, node: Node) -> list[Node]:
        """Remove *node* if nobody refers to it, then its parents likewise; return what was removed."""
        removed = []
        walk: Node | None = node
        while (
            walk is not None
            and walk is not self.root
            and walk.lookups <= 0
            and not walk.children
            and not walk.handles
            and walk.copying is None
        ):
            if self._by_ino.get(walk.ino) is walk:
                del self._by_ino[walk.ino]
            parent = walk.parent
            if parent is not None and parent.children is not None:
                if parent.children.get(walk.name) is walk:
                    del parent.children[walk.name]
            removed.append(walk)
            walk = parent
        return removed
