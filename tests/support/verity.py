"""Make hash trees like veritysetup(8), written from the description of the format."""

from __future__ import annotations

import hashlib
import struct

BLOCK = 4096
SALT = bytes(range(32))


def _sum(block: bytes) -> bytes:
    return hashlib.sha256(SALT + block).digest()


def make_tree(data: bytes, algorithm: bytes = b"sha256", blocks: int | None = None) -> tuple[bytes, bytes]:
    """Return the hash tree of *data* and its root hash."""
    assert len(data) % BLOCK == 0
    count = len(data) // BLOCK
    head = struct.pack(
        "<8sII16s32sIIQH6x", b"verity", 1, 1, bytes(16), algorithm, BLOCK, BLOCK, blocks or count, 32
    )
    sums = [_sum(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)]
    levels: list[bytes] = []
    while len(sums) > 1:
        level = b"".join(sums)
        level += bytes(-len(level) % BLOCK)
        levels.insert(0, level)
        sums = [_sum(level[at : at + BLOCK]) for at in range(0, len(level), BLOCK)]
    return (head + SALT).ljust(BLOCK, b"\0") + b"".join(levels), sums[0]
