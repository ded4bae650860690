"""Damage the structures of ext3 images. The same seed gives the same damage."""

from __future__ import annotations

import random
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass

from tests.ext3.reader import JOURNAL, ROOT, Image

_NUMBERS = (0, 1, 2, 3, 7, 8, 10, 11, 12, 0x7F, 0x80, 0xFF, 0x100, 0x3FF, 0x7FFF, 0xFFFC, 0xFFFF)
_LARGE = (0x10000, 0xFFFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
_SUPERBLOCK = (
    *((at, 4) for at in range(0, 52, 4)),
    *((at, 4) for at in (72, 76, 80, 84, 92, 96, 100, 224, 228, 232)),
    *((at, 2) for at in (52, 54, 56, 58, 60, 62, 80, 88, 90, 206, 254, 348, 350)),
    *((at, 1) for at in (174, 175, 252, 253, 372)),
    (96, 1), (100, 1), (268, 4), (272, 4), (336, 4),
)  # fmt: skip
"""(offset, size) of the fields of a superblock that ext3 uses or must check."""
_INODE = (
    *((at, 2) for at in (0, 2, 24, 26, 116, 118, 120, 128, 130)),
    *((at, 4) for at in (4, 8, 12, 16, 20, 28, 32, *range(40, 100, 4), 104, 108)),
)
_JOURNAL = tuple((at, 4) for at in (0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 64, 68, 72, 76, 80))


@dataclass
class Target:
    """A sound image, and the places of its structures."""

    name: str
    data: bytes

    def __post_init__(self) -> None:
        self.image = image = Image(self.data)
        self.inodes = [ino for ino in image.used_inodes() if ino in (ROOT, 7, JOURNAL) or ino >= 11]
        self.directories: list[int] = []
        self.indexes: list[int] = []
        self.indirect: list[int] = []
        self.xattrs: list[int] = []
        self.contents: list[int] = []
        for ino in self.inodes:
            inode = image.inode(ino)
            blocks = [block for _, block in image.mapping(inode)]
            self.indirect += image.indirect_blocks(inode)
            if inode.acl_block:
                self.xattrs.append(inode.acl_block)
            if stat.S_ISDIR(inode.mode):
                self.directories += blocks
                if inode.flags & 0x1000:
                    self.indexes.append(blocks[0])
            elif ino == JOURNAL:
                self.journal = blocks
            elif stat.S_ISREG(inode.mode):
                self.contents += blocks[:20]
        self.kinds_of_numbers = [self.inodes, self.directories, self.journal, self.indirect, self.contents]


def damaged(target: Target, seed: int) -> bytes:
    """Return a damaged copy, which depends only on *seed*."""
    choose = random.Random(seed)
    data = bytearray(target.data)
    how = choose.choice(_KINDS)
    for _ in range(choose.choice((1, 1, 1, 2, 3, 10))):
        how(target, data, choose)
    return bytes(data)


def _number(target: Target, choose: random.Random, size: int) -> int:
    image = target.image
    pool = [*_NUMBERS, choose.getrandbits(8 * size)]
    if size == 4:
        pool += [
            *_LARGE, image.blocks, image.blocks - 1, choose.randrange(image.blocks),
            image.inodes, image.inodes + 1, *(choose.choice(blocks) for blocks in target.kinds_of_numbers),
            image.group(0)[choose.randrange(3)],
        ]  # fmt: skip
    return choose.choice(pool) & ((1 << 8 * size) - 1)


def _put(target: Target, data: bytearray, at: int, size: int, choose: random.Random) -> None:
    if choose.random() < 0.25:
        data[at + choose.randrange(size)] ^= 1 << choose.randrange(8)
    else:
        data[at : at + size] = _number(target, choose, size).to_bytes(size, "little")


def _superblock(target: Target, data: bytearray, choose: random.Random) -> None:
    at, size = choose.choice(_SUPERBLOCK)
    _put(target, data, 1024 + at, size, choose)


def _groups(target: Target, data: bytearray, choose: random.Random) -> None:
    image = target.image
    at = (image.first_block + 1) * image.block_size + 32 * choose.randrange(image.groups)
    offset, size = choose.choice(((0, 4), (4, 4), (8, 4), (12, 2), (14, 2), (16, 2), (18, 2)))
    _put(target, data, at + offset, size, choose)


def _bitmaps(target: Target, data: bytearray, choose: random.Random) -> None:
    image = target.image
    block = image.group(choose.randrange(image.groups))[choose.randrange(2)]
    begin = block * image.block_size
    length = choose.choice((1, 1, 8, 64, image.block_size))
    at = begin + choose.randrange(image.block_size - length + 1)
    if length == 1:
        data[at] ^= 1 << choose.randrange(8)
    else:
        data[at : at + length] = choose.choice((b"\0", b"\xff")) * length


def _inodes(target: Target, data: bytearray, choose: random.Random) -> None:
    at, size = choose.choice(_INODE)
    if at + size <= target.image.inode_size:
        _put(target, data, target.image.place(choose.choice(target.inodes)) + at, size, choose)


def _inode_xattrs(target: Target, data: bytearray, choose: random.Random) -> None:
    size = target.image.inode_size
    if size > 128:
        place = target.image.place(choose.choice(target.inodes))
        _put(target, data, place + choose.randrange(128, size - 4, 2), choose.choice((1, 2, 4)), choose)


def _entries(target: Target, data: bytearray, choose: random.Random) -> None:
    """Change lengths, inodes, types and names of directory entries."""
    size = target.image.block_size
    begin, places, at = choose.choice(target.directories) * size, [], 0
    while at + 8 <= size:
        places.append(begin + at)
        step = struct.unpack_from("<H", data, begin + at + 4)[0]
        if step < 8:
            break
        at += step
    entry = choose.choice(places)
    what = choose.randrange(7)
    if what == 0:
        _put(target, data, entry, 4, choose)
    elif what == 1:
        _put(target, data, entry + 4, 2, choose)
    elif what == 2:
        _put(target, data, entry + 6, 1, choose)
    elif what == 3:
        _put(target, data, entry + 7, 1, choose)
    elif what == 4 and entry + 8 < len(data):
        data[entry + 8] = choose.choice(b"/\0.")
    elif what == 5:
        struct.pack_into("<I", data, entry, choose.choice(target.inodes))  # a loop, or one link too many
    else:
        struct.pack_into("<H", data, entry + 4, choose.choice((4, 8, 10, 12, size, size - 4, 0)))


def _index(target: Target, data: bytearray, choose: random.Random) -> None:
    if target.indexes:
        at = choose.choice(target.indexes) * target.image.block_size
        _put(
            target,
            data,
            at + choose.choice((24, 28, 29, 30, 32, 34, 36, 40, 44, 48, 52)),
            choose.choice((1, 2, 4)),
            choose,
        )


def _pointers(target: Target, data: bytearray, choose: random.Random) -> None:
    at = choose.choice(target.indirect) * target.image.block_size
    _put(target, data, at + 4 * choose.randrange(min(target.image.block_size // 4, 64)), 4, choose)


def _journal(target: Target, data: bytearray, choose: random.Random) -> None:
    at, size = choose.choice(_JOURNAL)
    _put(target, data, target.journal[0] * target.image.block_size + at, size, choose)


def _log(target: Target, data: bytearray, choose: random.Random) -> None:
    """Make a block of the log look like a block of a transaction."""
    size = target.image.block_size
    at = choose.choice(target.journal[1:4]) * size
    head = struct.pack(">III", 0xC03B3998, choose.choice((1, 2, 5, 9)), choose.randrange(10))
    data[at : at + size] = head + choose.randbytes(size - len(head))


def _xattr_blocks(target: Target, data: bytearray, choose: random.Random) -> None:
    if target.xattrs:
        at = choose.choice(target.xattrs) * target.image.block_size
        _put(
            target, data, at + choose.choice((0, 4, 8, *range(32, 100, 2))), choose.choice((1, 2, 4)), choose
        )


def _whole_block(target: Target, data: bytearray, choose: random.Random) -> None:
    """Replace a block of metadata with zeros, noise, or another block."""
    size = target.image.block_size
    metadata = [
        *target.directories,
        *target.indirect,
        *target.xattrs,
        target.journal[0],
        *target.image.group(0),
    ]
    at, other = choose.choice(metadata) * size, choose.choice(metadata) * size
    data[at : at + size] = choose.choice(
        (bytes(size), b"\xff" * size, choose.randbytes(size), data[other : other + size])
    )


def _flip(target: Target, data: bytearray, choose: random.Random) -> None:
    """Flip a bit in the first blocks, or anywhere."""
    limit = choose.choice((64 << 10, len(data)))
    data[choose.randrange(1024, limit)] ^= 1 << choose.randrange(8)


def _cut_off(target: Target, data: bytearray, choose: random.Random) -> None:
    """Cut off the end of the file."""
    if len(data) == len(target.data):
        del data[choose.randrange(2048, len(data)) :]


_KINDS: tuple[Callable[[Target, bytearray, random.Random], None], ...] = (
    *[_superblock, _groups, _index, _pointers, _inodes, _entries] * 2,
    *[
        _inodes,
        _inode_xattrs,
        _entries,
        _bitmaps,
        _journal,
        _log,
        _xattr_blocks,
        _whole_block,
        _flip,
        _cut_off,
    ],
)
