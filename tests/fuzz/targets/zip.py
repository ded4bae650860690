"""Zip archives as lowers, used in every way. Mutations change fields of the headers."""

from __future__ import annotations

import io
import random
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

from cowfs.layers.zip import ZipLayer
from tests.fuzz import bytes as plain
from tests.fuzz.driver import Run, Target
from tests.fuzz.exercise import exercise_as

_ODD = (0, 1, 7, 8, 12, 99, 0x2F, 0xFFFF, 0xFFFE, 0x4000, 0xA000, 0x8000)
_FIELDS = {b"PK\1\2": 46, b"PK\3\4": 30, b"PK\5\6": 22, b"PK\6\6": 56, b"PK\6\7": 20}
"""The size of each header without its variable parts."""


def _one(data: bytes) -> None:
    exercise_as(ZipLayer, data)


@contextmanager
def _run() -> Iterator[Run]:
    yield _one


def _seeds() -> list[bytes]:
    return [_archive(method) for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)]


def _archive(method: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, mode in (
            ("d/", 0o40755), ("d/f", 0o100644), ("l", 0o120777), ("pipe", 0o10600),
            ("e" * 90 + "/x", 0o100600),
        ):  # fmt: skip
            member = zipfile.ZipInfo(name)
            member.external_attr, member.compress_type = mode << 16, method
            member.extra = struct.pack("<HHBi", 0x5455, 5, 1, 7)
            member.extra += struct.pack("<HHBBIBI", 0x7875, 11, 1, 4, 5, 4, 6)
            data = b"d/f" if name == "l" else bytes(range(100)) * 7 if mode & 0o100000 else b""
            with archive.open(member, "w", force_zip64=name == "d/f") as file:
                file.write(data)
    return out.getvalue()


def _mutate(data: bytes, choose: random.Random) -> bytes:
    if choose.randrange(5) == 0:
        return plain.mutate(data, choose)
    changed = bytearray(data)
    for _ in range(choose.choice((1, 1, 2, 4))):
        magic = choose.choice(list(_FIELDS))
        places = [at for at in range(len(data)) if data.startswith(magic, at)]
        if places:
            at = choose.choice(places) + choose.randrange(4, _FIELDS[magic] + 40)
            size = choose.choice((1, 2, 2, 4, 8))
            value = choose.choice((*_ODD, choose.randrange(len(data)), (1 << 8 * size) - 1))
            changed[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    return bytes(changed)


TARGET = Target(_run, _seeds, ("cowfs.formats.zip", "cowfs.formats.zip_data", "cowfs.layers.zip"), _mutate)
