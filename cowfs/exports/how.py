"""What there is to choose of an export."""

from __future__ import annotations

from dataclasses import dataclass

FORMATS = ("squashfs", "tar", "gnutar", "oci", "overlayfs", "iso", "patch", "rsync", "restic")
STYLES = {
    "squashfs": ("overlayfs", "aufs"),
    "tar": ("oci", "aufs", "overlayfs", "list"),
    "gnutar": ("oci", "aufs", "overlayfs", "list"),
}
"""Those of each format that has a choice, the default first."""
TAG, COMPRESSION = "latest", "gzip"


@dataclass(frozen=True, slots=True)
class How:
    """How something is exported."""

    format: str
    merged: bool = False
    """The whole tree, and not what was changed alone."""
    whiteouts: str = ""
    """One of :data:`cowfs.exports.whiteouts.STYLES`; empty: the first that the format has."""
    base: str = ""
    """For ``oci``: the layout of the image to put the layer on, ``DIRECTORY[:TAG]``. For ``iso``: the ISO
    that is to have another root image, ``FILE[:PATH]``."""
    tag: str = TAG
    """For ``oci``: the name of the image."""
    compression: str = COMPRESSION
    """For ``squashfs``."""
    force: bool = False
    """Replace the target, if it is a file or an empty directory."""
    latest: int | None = None
    """SOURCE_DATE_EPOCH: when it is made, and how late times may be, in seconds since the epoch."""

    @property
    def style(self) -> str:
        return self.whiteouts or STYLES.get(self.format, ("oci" if self.format == "oci" else "overlayfs",))[0]
