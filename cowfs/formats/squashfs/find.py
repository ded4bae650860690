"""Where in a file a squashfs image begins: in an AppImage, an ISO, a disk image or firmware."""

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
"""So many bytes are looked at: some seconds, where the disk is quick."""

_TRIED = 100_000
"""So much is looked at more closely: about a second."""


def find_image(fd: int) -> int | None:
    """Return the byte at which the first whole squashfs image in a file begins; None if there is none.

    What looks like one and is longer than the rest of the file, or of another version, is none. Behind an ELF
    program the search begins where that ends. Blocks: it may read all of the file. Raises OSError; LayerError
    for a file that is full of what only looks like an image.
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
