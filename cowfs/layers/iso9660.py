"""An ISO 9660 image as a lower layer."""

from __future__ import annotations

from cowfs.formats.iso9660 import Image
from cowfs.layers.archive import ArchiveLayer


class Iso9660Layer(ArchiveLayer):
    """Serve the ISO 9660 image at *path* as a :class:`cowfs.layers.base.LowerLayer`."""

    def __init__(self, path: str) -> None:
        """See :class:`cowfs.layers.archive.ArchiveLayer`."""
        super().__init__(path, Image)
