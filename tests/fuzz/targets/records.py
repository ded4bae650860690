"""The record of who changed what, ``cowfs/blame``: batches, and the file with them.

The first byte of an input selects the JSON of a batch, or changes of a whole file of five bytes each. The
file then gets correct digests, which its owner could write too.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

from cowfs.changes.blame import blame, names_of
from cowfs.errors import StoreError
from cowfs.layers.kernel_file import KernelFile
from cowfs.store.format.records import Records, pack
from tests.fuzz import bytes as plain
from tests.fuzz.driver import Run, Target

_BLOCK, _DRAFT, _RING = 4096, 192 << 10, 1 << 20
_BEGIN = _BLOCK + 2 * _DRAFT
_KEY = b"k" * 16
_FRAME = struct.Struct("<4sIQI")
_ODD: list[Any] = [
    None, True, -1, 0, 1, 2, 1 << 40, 1 << 70, 1.5, float("nan"), "", "x", "\0", "\ud800", "\x1b[2J", [],
    {}, [[]],
    "d/" * 5000, 253402300799 * 10**6,
]  # fmt: skip
_BATCH: dict[str, Any] = {
    "begun": 1_700_000_000_000_000,
    "processes": [[1, 0, "/bin/sh", ["sh", "-c"], "/a.service"], [2, 1000, "", [], ""]],
    "directories": ["d", "d/e"],
    "records": [
        [1, 0, 5, 0, -1, "f", 7], [32, 6, 7, 1, 0, "g", 8], [1 << 14, 8, 9, -1, 1, "h", 9, -1, "i"],
        [1 << 15, 8, 9, 0, 0, "g", 9, 1, "h"], [16, 9, 9, 0, 0, "l", 9, -1, "f"], [1 << 12, 9, 9, 0, -1,
        "f", 7],
    ],
}  # fmt: skip


def _tells(contents: list[bytes]) -> None:
    with suppress(StoreError):
        names_of(contents, "store", lambda _: True)
    with suppress(StoreError):
        histories, _ = blame(contents, [b"f", b"d/g", b"i", b"\xff"], "store")
        for history in histories:
            json.dumps([*history.to_json(), len([*history.events()])])


def _file(changes: bytes, signed: bool) -> None:
    data = bytearray(_HEAD.ljust(_BEGIN + _RING, b"\0"))
    for number, at in enumerate((_BLOCK, _BEGIN, _BEGIN + _BLOCK, _BEGIN + 3 * _BLOCK)):
        content = pack(_BATCH)
        data[at : at + _FRAME.size] = _FRAME.pack(b"blmf", len(content), 9 - number, 0)
        data[at + _FRAME.size + 16 : at + _FRAME.size + 16 + len(content)] = content
    for change in range(0, len(changes) - 4, 5):
        block, inside, value, size = struct.unpack("<BHBB", changes[change : change + 5])
        at = block * _BLOCK + inside % _BLOCK
        data[at : at + size % 9] = bytes([value]) * (size % 9)
    for at in range(_BLOCK, _BEGIN + _RING, _BLOCK) if signed else ():
        head = bytes(data[at : at + _FRAME.size])
        size = _FRAME.unpack(head)[1]
        if head.startswith(b"blmf") and size < _DRAFT:
            content = bytes(data[at + _FRAME.size + 16 : at + _FRAME.size + 16 + size])
            digest = hashlib.blake2b(head + content, digest_size=16, key=_KEY).digest()
            data[at + _FRAME.size : at + _FRAME.size + 16] = digest
    fd = os.memfd_create("blame")
    os.write(fd, data)
    with closing(KernelFile(fd)) as file, suppress(StoreError):
        records = Records(file, "store")
        assert records.gaps < 1 << 64
        _tells(list(records.contents()))
        records.keep_draft(pack(_BATCH))
        records.end_draft()
        assert file.stat().st_size == len(data), "it has grown"


_HEAD = struct.pack("<8sIIQ16s", b"cowfsblm", 1, 0, _RING, _KEY)


def _one(data: bytes) -> None:
    kind = data[:1]
    if kind in {b"f", b"F"}:
        _file(data[1:], signed=kind == b"F")
    else:
        _tells([zlib.compress(data[1:]), pack(_BATCH)])


@contextmanager
def _run() -> Iterator[Run]:
    yield _one


def _seeds() -> list[bytes]:
    text = json.dumps(_BATCH).encode()
    long = {**_BATCH, "directories": ["d/" * 300_000], "records": [[1, 0, 0, -1, 0, "x", 1]] * 1900}
    return [
        b"j" + text,
        b"j" + json.dumps(long).encode(),
        b"j[]",
        b"j" + b"[" * 5000,
        b"f",
        b"F",
        b"F\0\x08\2\0\1",
    ]


def _mutate(data: bytes, choose: random.Random) -> bytes:
    if data[:1] in {b"f", b"F"}:
        more = bytes(
            (choose.choice((0, 0, 1, 1, 97, 98, 99, 100)), choose.randrange(64), 0, choose.randrange(256), 1)
        )
        return (data + more if choose.randrange(3) else data[:1] + plain.mutate(data[1:], choose))[:500]
    try:
        batch = json.loads(data[1:])
    except (ValueError, RecursionError):
        return data[:1] + plain.mutate(data[1:], choose)
    if not isinstance(batch, dict) or not choose.randrange(6):
        return b"j" + plain.mutate(data[1:], choose)
    place: Any = batch
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            place.append(choose.choice(_ODD)) if isinstance(place, list) else place.update(a=1)
            break
        key = choose.choice(keys)
        if not isinstance(place[key], list | dict) or not choose.randrange(4):
            how = choose.randrange(4)
            if how == 0:
                del place[key]
            elif how == 1 and isinstance(place, list):
                place.insert(key, place[key])
            else:
                place[key] = choose.choice((*_ODD, choose.randrange(1 << 16)))
            break
        place = place[key]
    return b"j" + json.dumps(batch).encode()


TARGET = Target(_run, _seeds, ("cowfs.changes.blame", "cowfs.store.format.records"), _mutate, largest=1 << 20)
