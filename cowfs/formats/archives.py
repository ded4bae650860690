"""The kinds of archives that can be lowers."""

from __future__ import annotations

from collections.abc import Callable

from cowfs.formats import erofs, iso9660, tar
from cowfs.formats import zip as zipped
from cowfs.formats.archive import Tree
from cowfs.formats.squashfs.recognise import MAGICS
from cowfs.formats.squashfs.source import Bytes

SAMPLE = iso9660.MAGIC_AT + len(iso9660.MAGIC)
"""How many bytes from the start :func:`kind_of` needs."""
INDEXES: dict[str, Callable[[Bytes, str], Tree]] = {
    "tar": tar.Archive,
    "zip": zipped.Archive,
    "iso9660": iso9660.Image,
}
NAMES = {"tar": "tar archive", "zip": "zip archive", "iso9660": "ISO 9660 image"}
"""The name of each kind, for messages."""


def kind_of(start: bytes) -> str:
    """Return the kind of an archive that begins with *start*; "" if it is not an archive."""
    if start[:4] in MAGICS or erofs.is_erofs(start):
        return ""
    if tar.is_tar(start):
        return "tar"
    if zipped.is_zip(start):
        return "zip"
    return "iso9660" if iso9660.is_iso9660(start) else ""
