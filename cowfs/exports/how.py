"""The options of an export."""

from __future__ import annotations

from dataclasses import dataclass

FORMATS = ("squashfs", "tar", "gnutar", "oci", "overlayfs", "iso", "patch", "rsync", "restic")
DIRECTORIES = ("oci", "overlayfs")
"""The formats whose target is a directory."""
STYLES = {
    "squashfs": ("overlayfs", "aufs"),
    "tar": ("oci", "aufs", "overlayfs", "list"),
    "gnutar": ("oci", "aufs", "overlayfs", "list"),
}
"""The styles of whiteouts of each format that has several, the default first."""
TAG, COMPRESSION = "latest", "gzip"
"""The defaults."""


@dataclass(frozen=True, slots=True)
class How:
    """The options of an export."""

    format: str
    merged: bool = False
    """Export the whole tree rather than only the changes."""
    whiteouts: str = ""
    """One of :data:`cowfs.exports.whiteouts.STYLES`; empty: the default of the format."""
    base: str = ""
    """For ``oci``: the layout of the base image, ``DIRECTORY[:TAG]``. For ``iso``: the ISO whose root image
    to replace, ``FILE[:PATH]``."""
    tag: str = TAG
    """For ``oci``: the name of the image."""
    compression: str = COMPRESSION
    """For ``squashfs`` and ``iso``."""
    force: bool = False
    """Replace the target if it is a file or an empty directory."""
    latest: int | None = None
    """SOURCE_DATE_EPOCH, in seconds since the epoch: the time of creation, and the latest time of a file."""

    @property
    def style(self) -> str:
        return self.whiteouts or STYLES.get(self.format, ("oci" if self.format == "oci" else "overlayfs",))[0]
