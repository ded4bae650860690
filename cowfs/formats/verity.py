"""Verify data against a hash tree as it is read, in the format of dm-verity.

The format is that of the kernel's drivers/md/dm-verity-target.c, and of cryptsetup's lib/verity/verity.c.
veritysetup(8) creates a tree: a superblock, then the levels of hashes from the top, each in whole blocks. The
hash of the topmost block is the root hash. A user who trusts the root hash need not trust the image.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import struct
import threading
from collections import OrderedDict
from typing import Protocol

from cowfs.errors import LayerError

log = logging.getLogger(__name__)

BLOCK = 4096
_SUPERBLOCK = struct.Struct("<8sII16x32sIIQH6x256s")
# signature, version, hash_type, algorithm, data_block_size, hash_block_size, data_blocks, salt_size, salt
_SIGNATURE = b"verity\0\0"
_DIGEST = 32
_EACH = BLOCK // _DIGEST
_MOST_LEVELS = 63
_KEPT = 2048
"""How many verified blocks of hashes are cached: 8 MiB, which cover 1 GiB of data."""
_REPORTS = 200


class Readable(Protocol):
    """The data or the tree: a file, or something that is read like one."""

    @property
    def size(self) -> int: ...

    def pread(self, size: int, at: int) -> bytes: ...

    def forget(self, size: int, at: int) -> None: ...

    def caches(self) -> dict[str, tuple[int, int]]: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...


class VerifiedBytes:
    """The part of *data* that *tree* covers, verified when read. Any thread may call any method."""

    def __init__(self, data: Readable, tree: Readable, root_hash: bytes, name: str) -> None:
        """This object closes *data* and *tree*. Reads a little. LayerError, OSError, WouldWait."""
        self._data = data
        self._tree = tree
        self._name = name
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._reported: set[int] = set()
        blocks, self._salt = _superblock(tree, name)
        if blocks * BLOCK > data.size or not blocks:
            raise LayerError(
                f"{name}: its hash tree covers {blocks * BLOCK} bytes, but it has {data.size}",
                "give the tree that was made for this image",
            )
        self.size = blocks * BLOCK
        self._levels = _levels(blocks)
        self._root = root_hash
        self.pread(1, 0)

    def pread(self, size: int, at: int) -> bytes:
        """Return bytes as os.pread() does. EIO if they, or their hashes, do not match the root hash."""
        end = min(at + size, self.size)
        if at < 0 or at >= end:
            return b""
        first, last = at // BLOCK, (end - 1) // BLOCK
        data = self._read(self._data, first * BLOCK, (last + 1 - first) * BLOCK)
        for number in range(first, last + 1):
            start = (number - first) * BLOCK
            if self._hash(data[start : start + BLOCK]) != self._wanted(0, number):
                data = data[:start] + self._once_more(number) + data[start + BLOCK :]
        return data[at - first * BLOCK : end - first * BLOCK]

    def _once_more(self, number: int) -> bytes:
        """Read a block that did not match again, because a cache may have been wrong. EIO."""
        self._data.forget(BLOCK, number * BLOCK)
        block = self._read(self._data, number * BLOCK, BLOCK)
        if self._hash(block) != self._wanted(0, number):
            raise self._wrong(number * BLOCK, "the data")
        return block

    def _wanted(self, level: int, number: int) -> bytes:
        """Return the expected hash of a block. Level 0 is the data, level 1 its hashes, and so on."""
        if level == len(self._levels):
            return self._root
        index, place = divmod(number, _EACH)
        with self._lock:
            block = self._known.get((level, index))
            if block is not None:
                self._known.move_to_end((level, index))
        if block is None:
            block = self._hashes(level, index)
        return block[place * _DIGEST : (place + 1) * _DIGEST]

    def _hashes(self, level: int, index: int) -> bytes:
        wanted = self._wanted(level + 1, index)
        at = self._levels[level] + index * BLOCK
        block = self._read(self._tree, at, BLOCK)
        if self._hash(block) != wanted:
            self._tree.forget(BLOCK, at)
            block = self._read(self._tree, at, BLOCK)
            if self._hash(block) != wanted:
                raise self._wrong(at, "the hash tree")
        with self._lock:
            self._known[level, index] = block
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
        return block

    def _hash(self, block: bytes) -> bytes:
        return hashlib.sha256(self._salt + block).digest()

    def _read(self, data: Readable, at: int, size: int) -> bytes:
        found = data.pread(size, at)
        while len(found) < size:
            more = data.pread(size - len(found), at + len(found))
            if not more:
                raise self._wrong(at, "the end of the file")
            found += more
        return found

    def _wrong(self, at: int, what: str) -> OSError:
        text = f"{what} at {at:#x} does not match the root hash"
        if at not in self._reported and len(self._reported) < _REPORTS:
            self._reported.add(at)
            log.error("%s: %s", self._name, text)
        return OSError(errno.EIO, f"{self._name}: {text}")

    def forget(self, size: int, at: int) -> None:
        """Do nothing: this caches no data."""

    def caches(self) -> dict[str, tuple[int, int]]:
        """Return the caches of the data."""
        return self._data.caches()

    def stop(self) -> None:
        """Make reads that wait for other machines fail."""
        self._data.stop()
        self._tree.stop()

    def close(self) -> None:
        """Close both. Safe to call twice."""
        self._data.close()
        self._tree.close()


def _superblock(tree: Readable, name: str) -> tuple[int, bytes]:
    """Return the number of blocks that a tree covers, and its salt. LayerError."""
    raw = tree.pread(_SUPERBLOCK.size, 0)
    if len(raw) < _SUPERBLOCK.size or raw[:8] != _SIGNATURE:
        raise LayerError(f"{name}: not a dm-verity hash tree", "create one with veritysetup format")
    _, version, kind, algorithm, data_size, hash_size, blocks, salt_size, salt = _SUPERBLOCK.unpack(raw)
    is_usual = (version, kind, data_size, hash_size) == (1, 1, BLOCK, BLOCK)
    if not is_usual or algorithm.rstrip(b"\0") != b"sha256" or salt_size > len(salt):
        raise LayerError(
            f"{name}: unsupported hash tree: cowfs reads version 1 with sha256 and blocks of 4096 bytes",
            "create it with the defaults of veritysetup format",
        )
    return blocks, salt[:salt_size]


def _levels(blocks: int) -> list[int]:
    """Return the first block of each level in the tree, beginning with the hashes of the data."""
    counts: list[int] = []
    while blocks > 1 and len(counts) < _MOST_LEVELS:
        blocks = -(-blocks // _EACH)
        counts.append(blocks)
    levels, at = [], BLOCK
    for count in reversed(counts):
        levels.append(at)
        at += count * BLOCK
    return levels[::-1]
