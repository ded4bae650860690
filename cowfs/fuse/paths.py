"""The path of a node in the merged tree, as bytes."""

from __future__ import annotations

from cowfs.overlay.node import Node

Place = tuple[Node | None, bytes]
"""A directory and a name in it; None and b"" is the root."""


def path_of(node: Node) -> bytes:
    """Return the path of a directory from the root, without a leading slash: b"" is the root."""
    names = []
    walk: Node | None = node
    while walk is not None and walk.parent is not None:
        names.append(walk.name)
        walk = walk.parent
    return b"/".join(reversed(names))


def join(place: Place) -> bytes:
    """Return the path of a place."""
    directory, name = place
    above = path_of(directory) if directory is not None else b""
    return above + b"/" + name if above else name
