"""Places in the merged tree, and their paths as bytes."""

from __future__ import annotations

from cowfs.overlay.node import Node, path_of

Place = tuple[Node | None, bytes]
"""A directory and a name in it; None and b"" is the root."""


def join(place: Place) -> bytes:
    directory, name = place
    above = path_of(directory) if directory is not None else b""
    return above + b"/" + name if above else name
