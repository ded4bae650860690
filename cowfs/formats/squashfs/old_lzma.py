"""LZMA before version 4, which had gzip alone: as the patches of that time stored it, block by block.

All of them begin with the properties 0x5d (lc 3, lp 0, pb 2), no zlib stream does. What follows:

- sqlzma (Slax, and firmware after it): the size of the dictionary (4 bytes) and of the data (8), as in a
  ``.lzma`` file; blocks that are smaller so are zlib streams (sqlzma, uncomp.c).
- Broadcom: the size of the dictionary alone (its sqlzma.c).
- The patch for uClinux and the NB5: before the properties the size of the data (4 bytes; LzmaWrapper.c).

The ends of the last two are not marked: what such a block gives may be longer than what went into it.
"""

from __future__ import annotations

import lzma

from cowfs.formats.squashfs.errors import CodecError

Block = bytes | memoryview

NONE, ALONE, PROPERTIES, SIZE = range(4)
"""The layouts: none of these, as in a .lzma file, only the dictionary, the size before."""

_PROPERTIES = 0x5D
_DICTIONARY = 64 << 20
"""No encoder of these takes a larger one."""


def layout(block: Block, limit: int) -> int:
    """Which layout a block has whose data has *limit* bytes at most. SIZE may still be a zlib stream."""
    if len(block) < 13:
        return NONE
    if block[0] == _PROPERTIES:
        if _number(block, 5, 8) <= limit:
            return ALONE
        if _number(block, 1, 4) <= _DICTIONARY:
            return PROPERTIES
    return SIZE if block[4] == _PROPERTIES and _number(block, 0, 4) <= limit else NONE


def with_properties(block: Block, limit: int) -> bytes:
    """Decompress PROPERTIES. CodecError."""
    return _raw(block, 5, limit)


def with_size(block: Block, limit: int) -> bytes:
    """Decompress SIZE. CodecError."""
    size = _number(block, 0, 4)
    data = _raw(block, 9, min(size, limit))
    if len(data) != size:
        raise CodecError(f"lzma: {len(data)} bytes, not {size}")
    return data


def _number(block: Block, at: int, size: int) -> int:
    return int.from_bytes(block[at : at + size], "little")


def _raw(block: Block, at: int, limit: int) -> bytes:
    # A dictionary larger than the data is never used, and is memory.
    options = {"id": lzma.FILTER_LZMA1, "dict_size": max(limit, 4096), "lc": 3, "lp": 0, "pb": 2}
    try:
        stream = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[options])
        return stream.decompress(block[at:], limit)
    except (lzma.LZMAError, EOFError) as error:
        raise CodecError(f"lzma: {error}") from error
