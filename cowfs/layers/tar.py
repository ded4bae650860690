"""A tar archive, uncompressed, as a lower layer."""

from __future__ import annotations

from cowfs.formats.tar import Archive
from cowfs.layers.archive import ArchiveLayer


class TarLayer(ArchiveLayer):
    """Serve the tar archive at *path* as a :class:`cowfs.layers.base.LowerLayer`."""

    def __init__(self, path: str) -> None:
        """See :class:`cowfs.layers.archive.ArchiveLayer`."""
        super().__init__(path, Archive)
