"""Read any part of a member of a zip archive, decompressing it as needed.

A stream can only be decompressed from its start. So this module keeps the state of the decompressor where
readers stopped, for those who continue, and at some points before that, for those who read elsewhere.
"""

from __future__ import annotations

import errno
import logging
import struct
import threading
import zlib
from collections import OrderedDict
from typing import TYPE_CHECKING

from cowfs.errors import os_error
from cowfs.formats.squashfs.cache import GenerationCache
from cowfs.formats.squashfs.source import Bytes
from cowfs.url.waiting import WouldWait, must_not_wait

if TYPE_CHECKING:
    from zlib import _Decompress

log = logging.getLogger(__name__)

STORED, DEFLATED = 0, 8
_LOCAL = struct.Struct("<4s22xHH")  # magic, bytes of the name and of the extra fields
_BLOCK = 256 << 10
"""How many bytes are decompressed and cached as one block."""
_KEPT = 32 << 20
"""How many bytes of decompressed data are cached."""
_PLACES, _PLACES_OF_ONE = 256, 128
"""How many states of decompressors are kept for all members, and for one: about 70 KiB each."""
_LEAST_APART = 16
"""The least distance of two kept states, in blocks."""
_NEAR = 8
"""How many blocks before the requested one are cached too, for readers that are on their way there."""
_READERS = 32
"""For how many readers the state where they stopped is kept."""
_INPUT = 32 << 10
_SHORT = 64 << 10
"""How many bytes take less time to decompress than handing the work to a thread."""
_READ_FOR_CRC = 64 << 20
"""How many bytes before the end of a stored member are read with the end, to check the CRC."""
_REPORTS = 200


class Member:
    """The data of a member, and how much of it the CRC has covered."""

    __slots__ = (
        "compared",
        "crc",
        "data_at",
        "header",
        "is_wrong",
        "lock",
        "method",
        "packed",
        "size",
        "sum",
    )

    def __init__(self, header: int, method: int, packed: int, size: int, crc: int) -> None:
        """*header* is the position of its local header; *packed* and *size* are in bytes."""
        self.header = header
        self.method = method
        self.packed = packed
        self.size = size
        self.crc = crc
        self.data_at = -1
        self.lock: threading.Lock | None = None
        self.compared = self.sum = 0
        self.is_wrong = False


class _State:
    """The state of a decompressor at the start of a block."""

    __slots__ = ("at", "block", "crc", "stream")

    def __init__(self, stream: _Decompress, block: int = 0, at: int = 0, crc: int = 0) -> None:
        self.stream = stream
        self.block = block
        self.at = at
        self.crc = crc

    def copy(self) -> _State:
        return _State(self.stream.copy(), self.block, self.at, self.crc)


class Unpacker:
    """Reads the members of one archive. Any thread may call any method."""

    def __init__(self, data: Bytes, name: str) -> None:
        """*name* is for messages."""
        self._data = data
        self._name = name
        self._blocks: GenerationCache[tuple[int, int], bytes] = GenerationCache(_KEPT, len)
        self._places: GenerationCache[tuple[int, int], _State] = GenerationCache(_PLACES, lambda _: 1)
        self._last: OrderedDict[tuple[int, int], _State] = OrderedDict()
        self._lock = threading.Lock()  # for _last, and for the members' locks
        self._reported: set[int] = set()

    def shrink(self) -> None:
        """Drop decompressed data and kept states."""
        self._blocks.clear()
        self._places.clear()
        with self._lock:
            self._last.clear()

    @staticmethod
    def crc(data: bytes) -> bytes:
        """Return the CRC of *data*, as archives store it."""
        return zlib.crc32(data).to_bytes(4, "little")

    def is_long(self, member: Member, size: int, offset: int) -> bool:
        """Whether reading these bytes must decompress much, or read much for the CRC."""
        if member.size <= _SHORT:
            return False
        if member.method == STORED:
            before = offset - member.compared
            return member.compared < member.size == offset + size and before > _SHORT
        return any(
            self._blocks.get((member.header, block)) is None
            for block in range(offset // _BLOCK, (offset + size - 1) // _BLOCK + 1)
        )

    def pread(self, member: Member, size: int, offset: int) -> bytes:
        """Return *size* bytes at *offset*, which the member has. May block. EIO, WouldWait."""
        if member.data_at < 0:
            member.data_at = self._find(member)
        if member.lock is None:
            with self._lock:
                member.lock = member.lock or threading.Lock()
        if member.method == STORED:
            return self._stored(member, size, offset)
        first, last = offset // _BLOCK, (offset + size - 1) // _BLOCK
        data = b"".join([self._block(member, block) for block in range(first, last + 1)])
        start = offset - first * _BLOCK
        return data[start : start + size]

    def _find(self, member: Member) -> int:
        """Return the position of a member's data, after its local header."""
        header = self._data.pread(_LOCAL.size, member.header)
        if len(header) < _LOCAL.size or header[:4] != b"PK\3\4":
            raise self._damaged(member, "no member")
        _, name, extra = _LOCAL.unpack(header)
        return int(member.header + _LOCAL.size + name + extra)

    def _read(self, member: Member, size: int, at: int) -> bytes:
        found = self._data.pread(size, member.data_at + at)
        while len(found) < size:
            piece = self._data.pread(size - len(found), member.data_at + at + len(found))
            if not piece:
                raise self._damaged(member, "the archive has become shorter")
            found += piece
        return found

    def _damaged(self, member: Member, what: str) -> OSError:
        if member.header not in self._reported and len(self._reported) < _REPORTS:
            self._reported.add(member.header)
            log.error("%s: damaged zip archive: member at %#x: %s", self._name, member.header, what)
        return os_error(errno.EIO)

    # --- stored

    def _stored(self, member: Member, size: int, offset: int) -> bytes:
        data = self._read(member, size, offset)
        # A reader before the end does not wait for one that computes the CRC. Who reads the end, later reads
        # again what the CRC does not cover yet.
        if member.compared < member.size and member.lock is not None:
            is_end = offset + size == member.size
            if member.lock.acquire(blocking=is_end and not must_not_wait()):
                try:
                    self._compare(member, data, offset)
                finally:
                    member.lock.release()
            elif is_end:  # another compares, and may wait for another machine
                raise WouldWait
        if member.is_wrong:
            raise self._damaged(member, "wrong CRC")
        return data

    def _compare(self, member: Member, data: bytes, offset: int) -> None:
        """Add *data* to the CRC if it continues the covered part; at the end of the member, read the rest."""
        end = offset + len(data)
        if offset <= member.compared < end:
            member.sum = zlib.crc32(memoryview(data)[member.compared - offset :], member.sum)
            member.compared = end
        if end == member.size and member.size - member.compared <= _READ_FOR_CRC:
            while member.compared < member.size:
                piece = self._read(member, min(_BLOCK, member.size - member.compared), member.compared)
                member.sum = zlib.crc32(piece, member.sum)
                member.compared += len(piece)
        member.is_wrong = member.compared == member.size and member.sum != member.crc

    # --- deflated

    def _block(self, member: Member, block: int) -> bytes:
        key = (member.header, block)
        found = self._blocks.get(key)
        if found is None:
            assert member.lock is not None
            if not member.lock.acquire(blocking=not must_not_wait()):
                raise WouldWait
            try:
                found = self._blocks.get(key)
                if found is None:
                    found = self._decompress(member, block)
            finally:
                member.lock.release()
        return found

    def _decompress(self, member: Member, wanted: int) -> bytes:
        """Return a block, after decompressing those before it from the nearest kept state."""
        apart = max(_LEAST_APART, -(-member.size // _BLOCK) // _PLACES_OF_ONE + 1)
        state = self._nearest(member, wanted, apart)
        while True:
            block = state.block
            data = self._next(member, state)
            if block + _NEAR > wanted:
                self._blocks.put((member.header, block), data)
            if state.block * _BLOCK >= member.size:
                return data
            if state.block % apart == 0 and self._places.get((member.header, state.block)) is None:
                self._places.put((member.header, state.block), state.copy())
            if block == wanted:
                break
        with self._lock:
            self._last[member.header, state.block] = state
            if len(self._last) > _READERS:
                self._last.popitem(last=False)
        return data

    def _nearest(self, member: Member, wanted: int, apart: int) -> _State:
        with self._lock:
            last = max(
                (at for header, at in self._last if header == member.header and at <= wanted), default=0
            )
            for block in range(wanted - wanted % apart, last, -apart):
                kept = self._places.get((member.header, block))
                if kept is not None:
                    return kept.copy()
            if last:
                return self._last.pop((member.header, last))
        return _State(zlib.decompressobj(-zlib.MAX_WBITS))

    def _next(self, member: Member, state: _State) -> bytes:
        """Decompress and return the next block."""
        stream, found = state.stream, bytearray()
        end = min(_BLOCK, member.size - state.block * _BLOCK)
        while len(found) < end:
            packed = stream.unconsumed_tail
            if not packed and state.at < member.packed:
                packed = self._read(member, min(_INPUT, member.packed - state.at), state.at)
                state.at += len(packed)
            try:
                piece = stream.decompress(packed, end - len(found))
            except zlib.error as error:
                raise self._damaged(member, str(error)) from None
            if not piece and (stream.eof or (state.at == member.packed and not stream.unconsumed_tail)):
                raise self._damaged(member, "its data ends too early")
            found += piece
        state.crc = zlib.crc32(found, state.crc)
        state.block += 1
        if state.block * _BLOCK >= member.size and state.crc != member.crc:
            raise self._damaged(member, "wrong CRC")
        return bytes(found)
