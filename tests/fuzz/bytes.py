"""Mutations of inputs with an unknown format, or of text."""

from __future__ import annotations

import random

_NUMBERS = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x100,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 63,
)
_PIECES = (
    b"\0", b"\n", b"/", b"//", b"..", b".", b",", b":", b"\\", b"=", b"-1", b"0", b"1", b"\xff",
    b"\xd9\xa1", b"y",
    b"9" * 30, b"9" * 5000, b"A" * 255, b"B" * 256, b"C" * 5000, b"\x1b[31m", b"\xe2\x80\xae",
)  # fmt: skip


def mutate(data: bytes, choose: random.Random) -> bytes:
    """Return *data* with changed bits and numbers, and with pieces removed, repeated or inserted."""
    changed = bytearray(data)
    for _ in range(choose.choice((1, 1, 2, 3, 8))):
        at = choose.randrange(len(changed) + 1)
        length = choose.choice((1, 1, 2, 4, 8, choose.randrange(1 + len(changed))))
        how = choose.randrange(7)
        if how == 0 and at < len(changed):
            changed[at] ^= 1 << choose.randrange(8)
        elif how == 1 and at < len(changed):
            changed[at] = choose.randrange(256)
        elif how == 2:
            del changed[at : at + length]
        elif how == 3:
            changed[at:at] = changed[at : at + length]
        elif how == 4:
            changed[at:at] = choose.choice(_PIECES)
        elif how == 5:
            size = choose.choice((1, 2, 4, 8))
            number = choose.choice((*_NUMBERS, choose.getrandbits(8 * size))) & ((1 << 8 * size) - 1)
            changed[at : at + size] = number.to_bytes(size, choose.choice(("little", "big")))
        else:
            start = choose.randrange(len(changed) + 1)
            changed[at : at + length] = changed[start : start + length]
    return bytes(changed)
