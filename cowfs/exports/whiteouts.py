"""How a layer says that a name of the layers below is gone, in the words of each system."""

from __future__ import annotations

from cowfs.changes.paths import join
from cowfs.overlay.xattr_format import NAME_MAX

PREFIX = b".wh."
"""Of an empty file with the rest of the name, for aufs and OCI images; overlayfs has a device 0:0, and a list
stands beside the layer."""


def place_of(path: bytes, style: str) -> bytes | None:
    """Return the path of what says that *path* is gone; None where the name would be too long."""
    if style in {"overlayfs", "list"}:
        return path
    directory, _, name = path.rpartition(b"/")
    return join(directory, PREFIX + name) if len(PREFIX + name) <= NAME_MAX else None


def is_taken(path: bytes, style: str) -> bool:
    """Whether something at *path* would itself be taken for a whiteout, by its name."""
    return style in {"aufs", "oci"} and any(name.startswith(PREFIX) for name in path.split(b"/"))
