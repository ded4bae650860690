"""The redirects that a rename writes: where the layers below have the renamed directory or file."""

from __future__ import annotations

from cowfs.overlay.node import Node


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
