"""A zip archive as a lower layer."""

from __future__ import annotations

from cowfs.formats.zip import Archive
from cowfs.layers.archive import ArchiveLayer


class ZipLayer(ArchiveLayer):
    """Serve the zip archive at *path* as a :class:`cowfs.layers.base.LowerLayer`."""

    def __init__(self, path: str) -> None:
        """See :class:`cowfs.layers.archive.ArchiveLayer`."""
        super().__init__(path, Archive)
