"""Damage squashfs images: flip, cut off and forge bytes. The same seed gives the same damage."""

from __future__ import annotations

import random
import struct

_INTERESTING = (0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x100, 0x1FF, 0x2000, 0x7FFF, 0x8000, 0xFFFF, 0x10000)
_LARGE = (0x00FFFFFF, 0x01000000, 0x01000001, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
_HUGE = (1 << 40, 1 << 47, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 2, (1 << 64) - 1)
_FIELDS = (
    *((position, "<I") for position in range(4, 20, 4)),
    *((position, "<H") for position in range(20, 32, 2)),
    *((position, "<Q") for position in range(32, 96, 8)),
)
"""(position, format) of the fields of the superblock, except the magic number."""


def mutate(image: bytes, seed: int) -> bytes:
    """Return a damaged copy of *image*, which depends only on *seed*."""
    choose = random.Random(seed)
    data = bytearray(image)
    how = choose.choice((_flip, _flip, _forge, _forge, _tables, _tables, _superblock, _cut, _copy, _zero))
    for _ in range(choose.choice((1, 1, 1, 2, 3, 10, 40))):
        if len(data) > 100:
            how(data, choose)
    return bytes(data)


def _flip(data: bytearray, choose: random.Random) -> None:
    data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)


def _number(choose: random.Random, size: int, length: int) -> int:
    pool = [*_INTERESTING, choose.randrange(length), length, length - 1, choose.getrandbits(8 * size)]
    if size >= 4:
        pool += _LARGE
    if size == 8:
        pool += _HUGE
    return choose.choice(pool) & ((1 << 8 * size) - 1)


def _put(data: bytearray, position: int, choose: random.Random) -> None:
    size = choose.choice((2, 4, 8))
    if position + size <= len(data):
        data[position : position + size] = _number(choose, size, len(data)).to_bytes(size, "little")


def _forge(data: bytearray, choose: random.Random) -> None:
    """Replace a number anywhere."""
    _put(data, choose.randrange(len(data)), choose)


def _tables(data: bytearray, choose: random.Random) -> None:
    """Replace a number or flip a bit in inodes and directories."""
    (begin,) = struct.unpack_from("<Q", data, 64)
    if not 96 <= begin < len(data):
        begin = 96
    position = choose.randrange(begin, len(data))
    if choose.random() < 0.5:
        data[position] ^= 1 << choose.randrange(8)
    else:
        _put(data, position, choose)


def _superblock(data: bytearray, choose: random.Random) -> None:
    position, form = choose.choice(_FIELDS)
    size = struct.calcsize(form)
    if choose.random() < 0.3:
        data[position] ^= 1 << choose.randrange(8)
    else:
        data[position : position + size] = _number(choose, size, len(data)).to_bytes(size, "little")


def _cut(data: bytearray, choose: random.Random) -> None:
    """Cut off the end; half of the time, change the size in the superblock too."""
    del data[choose.randrange(96, len(data)) :]
    if choose.random() < 0.5:
        struct.pack_into("<Q", data, 40, len(data))


def _copy(data: bytearray, choose: random.Random) -> None:
    """Overwrite one piece with another: valid data in the wrong place."""
    size = choose.choice((2, 4, 8, 16, 32, 100, 1000))
    source, target = choose.randrange(len(data)), choose.randrange(96, len(data))
    piece = data[source : source + size][: len(data) - target]
    data[target : target + len(piece)] = piece


def _zero(data: bytearray, choose: random.Random) -> None:
    """Clear a sector."""
    begin = choose.randrange(96, len(data))
    end = min(begin + choose.choice((16, 512, 4096)), len(data))
    data[begin:end] = bytes(end - begin)
