"""Find a node by its number, for file handles. The kernel's export.c has an index for that."""

from __future__ import annotations

from collections.abc import Callable

from cowfs.overlay.fs import OverlayFs, Steps
from cowfs.overlay.lookup import lookup
from cowfs.overlay.node import Node
from cowfs.overlay.readdir import listing

Places = dict[int, tuple[int, bytes]]
"""Where an inode was seen: the number of a directory, and a name in it."""


def at_place(fs: OverlayFs, ino: int, places: Places) -> Node | None:
    """Return the node with this number if it is known, or is still at the place where it was seen."""
    names: list[tuple[int, bytes]] = []
    walk = ino
    while (node := fs.nodes.get(walk)) is None:
        if walk not in places or len(names) > len(places):
            return None
        above, name = places[walk]
        names.append((walk, name))
        walk = above
    for expected, name in reversed(names):
        try:
            found = lookup(fs.union_of(node), node, name) if node.is_dir else None
        except OSError:
            found = None
        if found is None or found[0].ino != expected:
            fs.release(node if found is None else found[0])
            return None
        node = found[0]
    return None if node.dead else node


def see_all(fs: OverlayFs, places: Places) -> Steps[None]:
    """Walk through the whole union, and record the place of every inode."""
    places.clear()

    def note(directory: Node, name: bytes, node: Node) -> bool:
        is_new = node.ino not in places
        places[node.ino] = (directory.ino, name)
        return is_new

    return walk(fs, note)


def walk(fs: OverlayFs, see: Callable[[Node, bytes, Node], bool]) -> Steps[None]:
    """Walk through the whole union.

    Call *see* with each directory, name and node, a directory before its contents. *see* returns whether to
    enter a directory.
    """
    waiting = [fs.root]
    fs.root.lookups += 1
    try:
        while waiting:
            directory = waiting.pop()
            try:
                names = listing(fs.union_of(directory), directory)
                for _, name in ((yield names) if callable(names) else names).after(0):
                    yield None
                    node = _child(fs, directory, name)
                    if node is None:
                        continue
                    if see(directory, name, node) and node.is_dir:
                        node.lookups += 1
                        waiting.append(node)
                    else:
                        fs.release(node)
            except OSError:
                continue  # skip what cannot be listed
            finally:
                fs.forget(directory, 1)
    finally:
        for node in waiting:
            fs.forget(node, 1)


def _child(fs: OverlayFs, directory: Node, name: bytes) -> Node | None:
    try:
        found = lookup(fs.union_of(directory), directory, name)
    except OSError:
        return None
    return None if found is None else found[0]
