"""What is in a directory of a layer, however large it is."""

from __future__ import annotations

from cowfs.layers.base import Key, LowerLayer


def names_of(layer: LowerLayer, directory: Key) -> list[bytes]:
    """All names."""
    found = layer.names(directory)
    return found() if callable(found) else found
