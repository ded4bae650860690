"""Read a layer: the names of a directory, and the key at a path."""

from __future__ import annotations

from cowfs.layers.base import Key, LowerLayer


def names_of(layer: LowerLayer, directory: Key) -> list[bytes]:
    """Return all names in a directory."""
    found = layer.names(directory)
    return found() if callable(found) else found


def find(layer: LowerLayer, *path: bytes) -> Key:
    """Return the key of the inode at a path."""
    key = layer.root
    for name in path:
        found = layer.lookup(key, name)
        assert found is not None, name
        key = found[0]
    return key
