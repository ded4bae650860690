"""The redo log in the bytes of an image, and what must exist after a process dies."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from tests.ext3 import engine, images, recovery
from tests.ext3.engine import make_file
from tests.ext3.model import Promises, State, judge
from tests.ext3.powercut import Disk, Event
from tests.ext3.reader import Image

RARELY = 1_000_000
"""The number of operations without a commit or fsync."""
WRITE, MARK, CLOSING = 1, 3, 9 << 56 | 3
"""The kinds of records in a trace, and the mark for the end of the load."""


def strict(promises: Promises) -> Promises:
    """Everything before the last begun operation is promised."""
    return Promises(max(promises.begun - 1, promises.committed), promises.begun)


def judged(
    path: Path, states: list[State], promises: Promises, debug: int = 0, trace_fd: int = -1
) -> str | None:
    """Recover an image; return the errors."""
    wrong = recovery.by_engine(path, debug, trace_fd=trace_fd)
    return wrong or judge(states, promises, Image(path.read_bytes()))


def left(place: Path) -> Path:
    """Make an image whose daemon died, with one file committed and one not."""
    path = images.make(place / "image")
    with engine.opened(path) as opened:
        make_file(opened.layer, b"committed")
        opened.layer.sync()
        make_file(opened.layer, b"not committed")
        opened.image.abandon()
    return path


def ring(data: bytes | bytearray) -> tuple[int, int, int]:
    """Return the offsets of the redo log's header, and of the begin and end of its ring."""
    image = Image(data)
    blocks = [nr for _, nr in image.mapping(image.inode(8))]
    size = image.block_size
    count = min(len(blocks) // 4, (8 << 20) // size)
    header = blocks[-count] * size
    return header, header + size, header + count * size


def crc32c(data: bytes | bytearray) -> int:
    """Return the checksum that ext4 uses."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc


def records_in(data: bytes | bytearray) -> Iterator[tuple[int, int, int]]:
    """Yield offset, length and transaction of each record in the image."""
    header, begin, end = ring(data)
    session = data[header + 72 : header + 80]
    starts = [struct.unpack_from("<IIII", data, header + 88 + 16 * number) for number in (0, 1)]
    for _, tid, first, _ in sorted(starts, key=lambda start: start[1]):
        at, count = begin + first, 0
        while tid and at + 8 <= end:
            crc, length = struct.unpack_from("<II", data, at)
            order = session + struct.pack("<II", tid, count)
            if not 8 <= length <= end - at or crc32c(order + data[at + 4 : at + length]) != crc:
                break
            yield at, length, tid
            at, count = at + length, count + 1


def without_log(base: bytes, events: list[Event]) -> Disk:
    """Return the image of a process that died before its first commit, without the redo log."""
    header, _, _ = ring(base)
    image = Image(base)
    journal = [nr * image.block_size for _, nr in image.mapping(image.inode(8))]
    log = set(journal[1 : journal.index(header)])
    disk = Disk(bytearray(base))
    for event in events:
        if event.kind == MARK and event.number == CLOSING:
            break
        if not (event.kind == WRITE and event.number - event.number % image.block_size in log):
            disk.apply(event, [])
    return disk
