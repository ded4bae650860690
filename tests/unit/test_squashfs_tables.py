"""Metadata blocks and their tables, block by block."""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Callable, Iterator

import pytest

from cowfs.formats.squashfs.codecs import decompressor
from cowfs.formats.squashfs.metadata import BLOCK, IndexedTable, Metadata, Place, Table
from cowfs.formats.squashfs.source import FileBytes, Source
from tests.support.squashfs import text

Make = Callable[[bytes], Metadata]


@pytest.fixture
def make() -> Iterator[Make]:
    sources = []

    def call(image: bytes) -> Metadata:
        fd = os.memfd_create("image")
        os.write(fd, image)
        sources.append(Source(FileBytes(fd), "image", 0, len(image)))
        return Metadata(sources[-1], decompressor("gzip", BLOCK, "image"))

    yield call
    for source in sources:
        source.close()


def block(data: bytes, *, compressed: bool = False) -> bytes:
    stored = zlib.compress(data) if compressed else data
    return struct.pack("<H", len(stored) | (0 if compressed else 0x8000)) + stored


def is_damaged(call: Callable[[], object]) -> None:
    with pytest.raises(OSError) as caught:
        call()
    assert caught.value.errno == errno.EIO


def test_reading_goes_on_into_the_following_blocks(make: Make) -> None:
    content = text(3 * BLOCK + 100)
    parts = [content[at : at + BLOCK] for at in range(0, len(content), BLOCK)]
    for compressed in (False, True):
        blocks = [block(part, compressed=compressed) for part in parts]
        image = b"".join(blocks)
        table = Table(make(image), 0, len(image), "table")
        for at, size in ((0, 10), (BLOCK - 5, 10), (0, len(content)), (BLOCK, BLOCK), (5, 3 * BLOCK)):
            assert table.read(table.after(Place(0, 0), at), size) == content[at : at + size]
        data, after = table.advance(Place(0, 0), BLOCK + 7)
        assert data + table.read(after, 50) == content[: BLOCK + 57]
        last = table.after(Place(0, 0), 3 * BLOCK)
        assert table.upto(last, 1000) == (content[3 * BLOCK :], None)
        is_damaged(lambda: table.read(last, 101))  # noqa: B023
        is_damaged(lambda: table.read(Place(0, BLOCK), 1))  # noqa: B023


def test_a_place_behind_the_end_of_the_table(make: Make) -> None:
    image = block(bytes(BLOCK)) + block(b"another table")
    table = Table(make(image), 0, BLOCK + 2, "table")
    assert table.read(Place(0, 0), BLOCK) == bytes(BLOCK)
    is_damaged(lambda: table.read(Place(BLOCK + 2, 0), 1))
    is_damaged(lambda: table.read(Place(0, BLOCK), 1))
    is_damaged(lambda: table.read(Place(1 << 60, 0), 1))


def test_a_short_block_in_the_middle_of_a_table(make: Make) -> None:
    image = block(b"short") + block(bytes(BLOCK))
    table = Table(make(image), 0, len(image), "table")
    assert table.read(Place(0, 0), 5) == b"short"
    assert table.read(Place(0, 0), 6) == b"short\0", "as the kernel does"
    assert table.after(Place(0, 0), 5) == Place(7, 0)
    is_damaged(lambda: table.read(Place(0, 5), 1))


def test_what_can_be_read_of_a_table_that_is_damaged(make: Make) -> None:
    image = block(b"good") + b"\0\0" + block(bytes(BLOCK))
    data, error = Table(make(image), 0, len(image), "table").upto(Place(0, 1), 100)
    assert data == b"ood"
    assert error is not None and error.errno == errno.EIO


@pytest.mark.parametrize(
    "image",
    [
        b"",
        b"\x05",
        b"\x00\x80",  # no bytes
        b"\x00\x00",
        b"\x01\xa0" + bytes(8193),  # more than 8192
        b"\xff\x7f" + bytes(32767),
        b"\x64\x80" + bytes(50),  # goes on behind the end of the image
        b"\x05\x00" + b"trash",
        block(b"", compressed=True),
        block(bytes(BLOCK + 1), compressed=True),
    ],
)
def test_blocks_that_are_none(make: Make, image: bytes) -> None:
    metadata = make(image)
    is_damaged(lambda: metadata.block(0))


def indexed(make: Make, pointers: list[int], blocks: bytes, count: int) -> IndexedTable:
    image = blocks + struct.pack(f"<{len(pointers)}Q", *pointers)
    return IndexedTable(make(image), len(blocks), count, 4, "owner")


def test_tables_with_a_list_of_blocks(make: Make) -> None:
    first, second = block(struct.pack("<2048I", *range(2048))), block(struct.pack("<2I", 7, 8))
    table = indexed(make, [0, len(first)], first + second, 2050)
    assert [table.entry(number) for number in (0, 2047, 2048, 2049)] == [
        struct.pack("<I", value) for value in (0, 2047, 7, 8)
    ]
    assert len(table.all()) == 2050 * 4
    is_damaged(lambda: table.entry(2050))
    is_damaged(lambda: table.entry(-1))


def test_lists_of_blocks_that_lead_elsewhere(make: Make) -> None:
    one = block(struct.pack("<2I", 7, 8))
    # A valid block behind the list of blocks is not one of the table's.
    behind = one + struct.pack("<Q", len(one) + 8) + one
    is_damaged(lambda: IndexedTable(make(behind), len(one), 2, 4, "owner").entry(0))
    is_damaged(lambda: indexed(make, [1 << 50], one, 2).entry(0))
    assert indexed(make, [0], one, 3).entry(1) == struct.pack("<I", 8)
    is_damaged(lambda: indexed(make, [0], one, 3).entry(2))
    is_damaged(lambda: indexed(make, [0], one, 5000).all())


def test_an_image_on_a_failing_disk(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = make(block(b"data"))

    def pread(fd: int, size: int, offset: int) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(OSError) as caught:
        metadata.block(0)
    assert caught.value.errno == errno.ESTALE, "what the kernel says is passed on"
