"""ISO 9660 images as lowers, used in every way. An input has the sectors after the first 16."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from cowfs.layers.iso9660 import Iso9660Layer
from tests.fuzz import bytes as plain
from tests.fuzz.driver import Run, Target
from tests.fuzz.exercise import exercise_as

SECTOR = 2048
BEFORE = bytes(16 * SECTOR)
ROOT, _DIR, _MOVED, _PLAIN, MORE, _DATA = range(19, 25)
"""Sectors of directories, the Joliet root, continuation areas, and data."""
_SIGNS = (b"SP", b"PX", b"TF", b"NM", b"CE", b"SL", b"CL", b"RE", b"PN", b"ST", b"ZF", b"SF")
_ODD = (
    *(0, 1, 2, 4, 7, 8, 0x80, 0xFF, 0x7F, 0x800, 0xFFFF, 0xA1FF, 0x41ED, 0x81A4, 0x21B6, 0x11B6, 0xF1FF),
    *(ROOT, _DIR, _MOVED, _PLAIN, MORE, _DATA),
)


def _one(data: bytes) -> None:
    exercise_as(Iso9660Layer, BEFORE + data)


@contextmanager
def _run() -> Iterator[Run]:
    yield _one


def _seeds() -> list[bytes]:
    return [image(is_rock_ridge=True), image(is_rock_ridge=False)]


def both(number: int) -> bytes:
    return struct.pack("<I", number) + struct.pack(">I", number)


def field(sign: bytes, data: bytes) -> bytes:
    return sign + bytes((len(data) + 4, 1)) + data


def posix(mode: int, serial: int = 0) -> bytes:
    return field(b"PX", b"".join(map(both, (mode, 1, 1000, 1000, serial))))


def record(name: bytes, block: int, size: int, flags: int = 0, use: bytes = b"") -> bytes:
    date = bytes((124, 2, 29, 12, 30, 59, 4))
    rest = both(block) + both(size) + date + bytes((flags, 0, 0)) + b"\1\0\0\1" + bytes((len(name),)) + name
    rest += bytes(1 - len(name) % 2) + use + bytes(len(use) % 2)
    return bytes((len(rest) + 2, 0)) + rest


def directory(here: int, above: int, *records: bytes, use: bytes = b"") -> bytes:
    listing = record(b"\0", here, SECTOR, 2, use) + record(b"\1", above, SECTOR, 2)
    return (listing + b"".join(records)).ljust(SECTOR, b"\0")


def volume(kind: int, root: int, escapes: bytes = b"") -> bytes:
    start = (bytes((kind,)) + b"CD001\1").ljust(88, b"\0") + escapes
    return (start.ljust(128, b"\0") + b"\0\10\10\0".ljust(28, b"\0") + record(b"\0", root, SECTOR, 2)).ljust(
        SECTOR, b"\0"
    )


def image(*, is_rock_ridge: bool) -> bytes:
    root, folder = posix(0o40755), posix(0o40750)
    first = field(b"SP", b"\xbe\xef\0") if is_rock_ridge else b""
    file = posix(0o104755, 7) + field(b"TF", b"\x0e" + bytes((124, 1, 1, 0, 0, 0, 0)) * 3)
    long_time = field(b"TF", b"\x82" + b"2024010203040506" + b"\4")
    link = posix(0o120777) + field(b"SL", b"\0\x08\0\4\0\1\1a") + field(b"SL", b"\0\0\1b\2\0")
    more = field(b"CE", both(MORE) + both(8) + both(40))
    inside = directory(
        *(_DIR, ROOT),
        record(b"F.;1", _DATA, 700, 0, file + field(b"NM", b"\0the same file")),
        record(b"L.;1", 0, 0, 0, link + field(b"NM", b"\0link")),
        record(b"M", _MOVED, 0, 0, folder + field(b"CL", both(_MOVED))),
    )
    top = directory(
        *(ROOT, ROOT),
        record(b"D", _DIR, SECTOR, 2, folder + field(b"NM", b"\0d")),
        record(b"E.;1", _DATA, 2048, 0x80, file),
        record(b"E.;1", _DATA + 1, 100, 0, file),
        record(b"F.;1", _DATA, 700, 0, file + field(b"NM", b"\1fi") + more),
        record(b"NULL.;1", 0, 0, 0, posix(0o20666) + field(b"PN", both(1) + both(3)) + long_time),
        record(b"PIPE.;1", 0, 0, 0, posix(0o10600)),
        record(b"R", _MOVED, SECTOR, 2, field(b"RE", b"")),
        use=first + root,
    )
    joliet = directory(_PLAIN, _PLAIN, record("Fü;1".encode("utf-16-be"), _DATA, 700))
    moved = directory(_MOVED, _DIR, record(b"DEEP.;1", _DATA, 5, 0, file))
    areas = (bytes(8) + field(b"NM", b"\0le") + field(b"ST", b"")).ljust(SECTOR, b"\0")
    volumes = volume(1, ROOT) + volume(2, _PLAIN, b"%/E") + volume(255, 0)
    return volumes + top + inside + moved + joliet + areas + bytes(range(256)) * 9


def _mutate(data: bytes, choose: random.Random) -> bytes:
    if choose.randrange(5) == 0:
        return plain.mutate(data, choose)
    changed = bytearray(data)
    for _ in range(choose.choice((1, 1, 2, 4))):
        at = _place(data, choose)
        how = choose.randrange(6)
        if how == 0:
            other = choose.randrange(len(data) // SECTOR + 1) * SECTOR
            changed[other : other + SECTOR] = changed[at // SECTOR * SECTOR :][:SECTOR]
        elif how == 1:
            changed[at : at + 2] = choose.choice(_SIGNS)
        else:
            size = choose.choice((1, 1, 2, 4))
            value = choose.choice((*_ODD, choose.randrange(len(data) + 1), (1 << 8 * size) - 1))
            changed[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    return bytes(changed)


def _place(data: bytes, choose: random.Random) -> int:
    """Return an offset in or shortly after a header, a record, or a field of Rock Ridge."""
    how = choose.randrange(4)
    if how == 0:
        return choose.choice((0, 88, 128, 156, 158, 166, 181)) + SECTOR * choose.randrange(2)
    if how == 1:
        at = choose.randrange(3, 7) * SECTOR
        for _ in range(choose.randrange(9)):
            at += data[at] if at < len(data) else 0
        return at + choose.randrange(36)
    sign = choose.choice(_SIGNS)
    places = [at for at in range(len(data)) if data.startswith(sign, at)]
    return choose.choice(places or [0]) + choose.randrange(40)


TARGET = Target(
    _run,
    _seeds,
    ("cowfs.formats.iso9660", "cowfs.formats.archive", "cowfs.layers.archive", "cowfs.layers.iso9660"),
    _mutate,
)
