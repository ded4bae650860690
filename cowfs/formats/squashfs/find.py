"""Find a squashfs image in another file: an AppImage, an ISO, a disk image or firmware."""

from __future__ import annotations

import os
import re

from cowfs.errors import LayerError
from cowfs.formats.squashfs.recognise import MAGICS, SAMPLE, appended_at
from cowfs.formats.squashfs.superblock import LONGEST, parse

_MAGICS = re.compile(b"|".join(re.escape(magic) for magic in MAGICS))
_LENGTH = 4
"""Bytes of each."""

_PIECE = 1 << 20
_SEARCHED = 16 << 30
"""How many bytes are searched: a few seconds on a fast disk."""

_TRIED = 100_000
"""How many positions that look like an image are examined, in about a second."""


def find_image(fd: int) -> int | None:
    """Return the offset of the first complete squashfs image in a file; None if there is none.

    An image that is longer than the rest of the file, or of an unknown version, does not count. If the file
    begins with an ELF program, the search begins at its end. Blocks; it may read the whole file. OSError;
    LayerError if too many positions only look like an image.
    """
    tried = 0
    size = os.fstat(fd).st_size or os.lseek(fd, 0, os.SEEK_END)
    at = appended_at(os.pread(fd, SAMPLE, 0), size) or 0
    if at >= size:
        at = 0  # what it says of itself is wrong
    end = min(size, at + _SEARCHED)
    while at < end and (piece := os.pread(fd, _PIECE, at)):
        for found in _MAGICS.finditer(piece):
            tried += 1
            if tried > _TRIED:
                raise LayerError("too many places look like the beginning of an image", "give offset=BYTES")
            if _is_image(fd, at + found.start(), size):
                return at + found.start()
        at += max(len(piece) - _LENGTH + 1, 1)
    return None


def _is_image(fd: int, at: int, size: int) -> bool:
    try:
        parse(os.pread(fd, LONGEST, at), "", size - at)
    except LayerError:
        return False
    return True
