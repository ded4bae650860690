"""How each system marks a name of the layers below as deleted."""

from __future__ import annotations

from cowfs.changes.paths import join
from cowfs.overlay.xattr_format import NAME_MAX

PREFIX = b".wh."
"""The prefix of an empty file that is a whiteout in aufs and OCI images. In overlayfs a whiteout is a device
0:0, and the style ``list`` writes a list beside the layer."""


def place_of(path: bytes, style: str) -> bytes | None:
    """Return the path of the whiteout of *path*; None if its name would be too long."""
    if style in {"overlayfs", "list"}:
        return path
    directory, _, name = path.rpartition(b"/")
    return join(directory, PREFIX + name) if len(PREFIX + name) <= NAME_MAX else None


def is_taken(path: bytes, style: str) -> bool:
    """Whether *path* itself would be taken for a whiteout, because of its name."""
    return style in {"aufs", "oci"} and any(name.startswith(PREFIX) for name in path.split(b"/"))
