"""Malicious images: every count, offset and length is limited, and loops are refused."""

from __future__ import annotations

import errno
import logging
import lzma
import os
import resource
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lz4.block
import pytest
import zstandard

from cowfs.errors import LayerError
from cowfs.layers.squashfs import SquashfsLayer
from tests.support.listing import find
from tests.support.squashforge import DIRECTORY, FILE, NONE32, Entry, Forge, place

Open = Callable[[bytes], SquashfsLayer]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    layers = []

    def call(image: bytes) -> SquashfsLayer:
        path = tmp_path / "forged.sqfs"
        path.write_bytes(image)
        layer = SquashfsLayer(os.fspath(path))
        layers.append(layer)
        return layer

    yield call
    for layer in layers:
        layer.close()


def damaged(call: Callable[[], object], *, code: int = errno.EIO) -> OSError:
    with pytest.raises(OSError) as caught:
        call()
    assert caught.value.errno == code
    return caught.value


@contextmanager
def at_most(more: int) -> Iterator[None]:
    """Limit this process to *more* bytes; more raise MemoryError."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def read(layer: SquashfsLayer, *names: bytes, size: int = 1 << 20) -> bytes:
    return layer.open(find(layer, *names), os.O_RDONLY).pread(size, 0)


def test_what_the_forge_makes_is_a_good_image(opened: Open) -> None:
    forge = Forge()
    start = forge.block(b"hello".ljust(4096, b"."))
    inner = forge.file(4096, start, [4096 | 1 << 24], number=3)
    sub = forge.directory([Entry(b"file", inner)], number=2)
    layer = opened(forge.finish(forge.directory([Entry(b"sub", sub, DIRECTORY)])))
    assert read(layer, b"sub", b"file").startswith(b"hello...")


def test_inodes_with_the_same_number_get_numbers_of_their_own(opened: Open) -> None:
    """Whether the number is one that an image with so many inodes can have, or not."""
    forge = Forge()
    given = {b"1": 2, b"2": 2, b"3": 2, b"4": 1 << 31, b"5": 1 << 31}
    entries = [Entry(name, forge.file(0, 0, [], number=number)) for name, number in given.items()]
    layer = opened(forge.finish(forge.directory(entries)))
    found = {name: layer.stat(find(layer, name)).st_ino for name in given}
    assert len(set(found.values())) == len(given)
    assert found[b"1"] == 2 and found[b"4"] == 1 << 31
    assert found == {name: layer.stat(find(layer, name)).st_ino for name in reversed(given)}


# --- graphs that are no trees


def test_a_directory_that_holds_itself_is_refused(opened: Open) -> None:
    forge = Forge()
    root = forge.directory([Entry(b"self", forge.next_ref(), DIRECTORY)])
    layer = opened(forge.finish(root))
    damaged(lambda: layer.lookup(layer.root, b"self"))


def test_a_loop_of_directories_is_found(opened: Open, caplog: pytest.LogCaptureFixture) -> None:
    forge = Forge()
    one = forge.next_ref()
    two = forge.next_ref(32)
    assert forge.directory([Entry(b"two", two, DIRECTORY)], number=2) == one
    assert forge.directory([Entry(b"one", one, DIRECTORY)], number=3) == two
    layer = opened(forge.finish(forge.directory([Entry(b"one", one, DIRECTORY)])))
    with caplog.at_level(logging.ERROR):
        damaged(lambda: find(layer, b"one", b"two", b"one"))
    assert "loop" in caplog.text


def test_a_directory_in_two_places_is_refused(opened: Open) -> None:
    """Twenty levels, each with two names for the next, would be a tree of a million directories."""
    forge = Forge()
    below = forge.directory([])
    for _ in range(20):
        below = forge.directory([Entry(b"a", below, DIRECTORY), Entry(b"b", below, DIRECTORY)])
    layer = opened(forge.finish(below))
    damaged(lambda: layer.readdir(layer.root))
    damaged(lambda: layer.lookup(layer.root, b"a"))


def test_a_parent_after_its_children_or_before_makes_no_difference(opened: Open) -> None:
    forge = Forge()
    root = forge.directory([Entry(b"later", forge.next_ref(32), DIRECTORY)])
    forge.directory([], number=2)
    layer = opened(forge.finish(root))
    assert layer.readdir(find(layer, b"later")) == []


@pytest.mark.parametrize("name", [b"..", b".", b"a/b", b"/", b"nul\0"])
def test_names_that_lead_out_of_the_directory_are_refused(opened: Open, name: bytes) -> None:
    forge = Forge()
    file = forge.file(0, 0, [])
    layer = opened(forge.finish(forge.directory([Entry(b"ok", file), Entry(name, file)])))
    damaged(lambda: layer.readdir(layer.root))
    damaged(lambda: layer.lookup(layer.root, name))


@pytest.mark.parametrize("kind", [8, 9, 255, 65535])
def test_entries_of_unknown_types_are_not_listed_but_found(opened: Open, kind: int) -> None:
    """The kernel ends its listing there without an error; cowfs reports the damage."""
    forge = Forge()
    layer = opened(forge.finish(forge.directory([Entry(b"x", forge.small(b"content"), kind)])))
    damaged(lambda: layer.readdir(layer.root))
    damaged(lambda: layer.lookup(layer.root, b"y"))
    assert read(layer, b"x") == b"content"


def test_a_directory_called_a_file_in_two_places_is_refused(opened: Open) -> None:
    forge = Forge()
    below = forge.directory([])
    layer = opened(forge.finish(forge.directory([Entry(b"a", below, FILE), Entry(b"b", below, FILE)])))
    assert layer.lookup(layer.root, b"a") is not None
    assert layer.lookup(layer.root, b"a") is not None
    damaged(lambda: layer.lookup(layer.root, b"b"))


# --- counts, offsets, lengths


@pytest.mark.parametrize("count", [1, 255, 256, 0xFFFFFFFE])
def test_headers_that_count_more_than_is_there(opened: Open, count: int) -> None:
    """Names before the damage are found; a listing would hide the names after it."""
    forge = Forge()
    file = forge.file(0, 0, [])
    layer = opened(forge.finish(forge.directory([Entry(b"a", file), Entry(b"x", file, count=count)])))
    damaged(lambda: layer.readdir(layer.root))
    damaged(lambda: layer.lookup(layer.root, b"y"))
    assert layer.lookup(layer.root, b"a") is not None


def test_a_header_of_300_entries(opened: Open) -> None:
    forge = Forge()
    file = forge.file(0, 0, [])
    block, offset, size = forge.listing([Entry(b"000", file, count=299)])
    for number in range(1, 300):
        forge.listings += struct.pack("<HhHH", file, 0, FILE, 2) + b"%03d" % number
        size += 11
    layer = opened(forge.finish(forge.large_directory(block, offset, size)))
    damaged(lambda: layer.readdir(layer.root))


@pytest.mark.parametrize(("block", "offset", "size"), [(0, 0, 1 << 31), (1 << 30, 0, 50), (0, 9000, 50)])
def test_listings_outside_of_their_table(opened: Open, block: int, offset: int, size: int) -> None:
    forge = Forge()
    forge.listing([Entry(b"x", 0)])
    layer = opened(forge.finish(forge.large_directory(block, offset, size)))
    code = errno.EFBIG if size > 1 << 30 else errno.EIO
    damaged(lambda: layer.readdir(layer.root), code=code)
    damaged(lambda: layer.lookup(layer.root, b"x"), code=code)


def test_a_listing_whose_table_ends_within_an_entry(opened: Open) -> None:
    forge = Forge()
    block, offset, size = forge.listing([Entry(b"name", forge.file(0, 0, []))])
    root = forge.large_directory(block, offset, size)
    whole = bytes(forge.listings)
    for cut in range(1, len(whole) - 12):
        forge.listings[:] = whole[:-cut]
        layer = opened(forge.finish(root))
        damaged(lambda: layer.readdir(layer.root))  # noqa: B023
        damaged(lambda: layer.lookup(layer.root, b"name"[:-cut]))  # noqa: B023


@pytest.mark.parametrize("size", [1 << 62, (1 << 63) - 1, 1 << 40, NONE32])
def test_files_that_claim_more_blocks_than_there_can_be(opened: Open, size: int) -> None:
    forge = Forge()
    file = forge.large_file(size, 96, b"")
    layer = opened(forge.finish(forge.directory([Entry(b"x", file)])))
    assert layer.lookup(layer.root, b"x") is not None
    damaged(lambda: read(layer, b"x"))


def test_a_negative_size_is_refused(opened: Open) -> None:
    forge = Forge()
    layer = opened(forge.finish(forge.directory([Entry(b"x", forge.large_file(1 << 63, 96, b""))])))
    damaged(lambda: layer.lookup(layer.root, b"x"))


def test_a_file_of_petabytes_of_holes_costs_nothing(opened: Open) -> None:
    """Its block list consists of zeros, which compress to nothing. It is refused, not read."""
    forge = Forge(block_size=1 << 20)
    file = forge.large_file(1 << 50, 96, bytes(40_000))
    layer = opened(forge.finish(forge.directory([Entry(b"x", file)])))
    start = time.monotonic()
    damaged(lambda: layer.open(find(layer, b"x"), os.O_RDONLY).pread(10, 1 << 49))
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "word", [4097 | 1 << 24, 0x00FFFFFF, 1 << 24, 1 << 25, 0xFFFFFFFF, 100 | 1 << 24, 4095 | 1 << 24]
)
def test_data_blocks_of_impossible_lengths(opened: Open, word: int) -> None:
    forge = Forge()
    start = forge.block(bytes(9000))
    layer = opened(forge.finish(forge.directory([Entry(b"x", forge.file(4096, start, [word]))])))
    damaged(lambda: read(layer, b"x"))


def test_data_behind_the_end_of_the_image(opened: Open) -> None:
    forge = Forge()
    end = len(forge.finish(forge.directory([Entry(b"x", forge.file(4096, 0, [4096 | 1 << 24]))])))
    forge = Forge()
    image = forge.finish(forge.directory([Entry(b"x", forge.file(4096, end, [4096 | 1 << 24]))]))
    layer = opened(image + bytes(8192))
    damaged(lambda: read(layer, b"x"))


def test_a_block_stored_in_more_than_it_holds(opened: Open) -> None:
    forge = Forge()
    stored = zlib.compress(bytes(4096)).ljust(5000, b"\0")
    file = forge.file(4096, forge.block(stored), [len(stored)])
    layer = opened(forge.finish(forge.directory([Entry(b"x", file)])))
    damaged(lambda: read(layer, b"x"))


@pytest.mark.parametrize(("compressor", "compress"), [(1, zlib.compress), (4, lzma.compress)])
def test_a_stream_without_its_end(opened: Open, compressor: int, compress: Callable[[bytes], bytes]) -> None:
    """The data is complete, but its checksum is missing."""
    forge = Forge(compressor=compressor)
    stored = compress(bytes(4096))
    good = forge.file(4096, forge.block(stored), [len(stored)])
    cut = forge.file(4096, forge.block(stored[:-3]), [len(stored) - 3])
    layer = opened(forge.finish(forge.directory([Entry(b"cut", cut), Entry(b"good", good)])))
    assert read(layer, b"good") == bytes(4096)
    damaged(lambda: read(layer, b"cut"))


@pytest.mark.parametrize("start", [0xFFFFF000, 1 << 31])
def test_data_outside_of_the_image(opened: Open, start: int) -> None:
    forge = Forge()
    file = forge.file(4096, start, [4096 | 1 << 24])
    layer = opened(forge.finish(forge.directory([Entry(b"x", file)])))
    damaged(lambda: read(layer, b"x"))


@pytest.mark.parametrize(("fragment", "tail"), [(1, 0), (NONE32 - 1, 0), (0, 4000), (0, NONE32)])
def test_tails_outside_of_their_fragment(opened: Open, fragment: int, tail: int) -> None:
    forge = Forge()
    forge.fragments.append((forge.block(bytes(1000)), 1000 | 1 << 24))
    file = forge.file(100, 0, [], fragment=fragment, tail=tail)
    layer = opened(forge.finish(forge.directory([Entry(b"x", file)])))
    damaged(lambda: read(layer, b"x"))


def test_a_symlink_longer_than_any_path(opened: Open) -> None:
    forge = Forge()
    link = forge.inode(3, struct.pack("<II", 1, 1 << 31))
    layer = opened(forge.finish(forge.directory([Entry(b"x", link, 3)])))
    damaged(lambda: layer.lookup(layer.root, b"x"))


def test_a_symlink_ends_at_a_nul(opened: Open) -> None:
    forge = Forge()
    link = forge.inode(3, struct.pack("<II", 1, 9) + b"target\0no")
    layer = opened(forge.finish(forge.directory([Entry(b"x", link, 3)])))
    assert layer.readlink(find(layer, b"x")) == b"target"


@pytest.mark.parametrize("owner", [1, 65535])
def test_owners_that_are_not_in_the_table(opened: Open, owner: int) -> None:
    forge = Forge()
    file = forge.inode(FILE, bytes(16), owner=owner)
    layer = opened(forge.finish(forge.directory([Entry(b"x", file)])))
    damaged(lambda: layer.lookup(layer.root, b"x"))


@pytest.mark.parametrize("ref", [0xFFFF, 9000, 1 << 16, 1 << 40, (1 << 48) - 1])
def test_references_to_where_no_inode_is(opened: Open, ref: int) -> None:
    forge = Forge()
    layer = opened(forge.finish(forge.directory([Entry(b"x", ref & 0xFFFFFFFFFFFF)])))
    damaged(lambda: layer.lookup(layer.root, b"x"))


def indexed(opened: Open, monkeypatch: pytest.MonkeyPatch, *, damage: str = "") -> SquashfsLayer:
    """A directory of 600 names that is only searched, with damage in its listing."""
    monkeypatch.setattr("cowfs.formats.squashfs.image._INDEX_FROM", 100)
    monkeypatch.setattr("cowfs.formats.squashfs.image._INDEX_TO", 100)
    forge = Forge()
    file = forge.file(0, 0, [], number=7)
    entries = [Entry(b"%05d" % number, file) for number in range(0, 1200, 2)]
    if damage == "type":
        entries[400].kind = 9
    elif damage == "count":
        entries[400].count = 500
    block, offset, size = forge.listing(entries)
    each = size // len(entries)  # 12 + 8 + 5 bytes; an index entry at every 100th
    index = [(each * at, place(each * at)[0], entries[at].name) for at in range(100, 600, 100)]
    if damage == "index":
        index[2] = (1 << 31, 0, index[2][2])
    elif damage == "name":
        index[2] = (*index[2][:2], b"00500")
    elif damage == "block":
        index[2] = (index[2][0], 1 << 20, index[2][2])
    elif damage == "size":
        size += 1 << 30
    return opened(forge.finish(forge.large_directory(block, offset, size, index)))


def test_an_index_leads_to_every_name(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = indexed(opened, monkeypatch)
    for number in range(1200):
        assert (layer.lookup(layer.root, b"%05d" % number) is not None) == (number % 2 == 0)
    assert layer.lookup(layer.root, b"") is None
    assert layer.lookup(layer.root, b"99999") is None


def test_damage_in_a_searched_directory(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = indexed(opened, monkeypatch, damage="count")
    assert layer.lookup(layer.root, b"00010") is not None, "before the damage"
    damaged(lambda: layer.lookup(layer.root, b"00810"))


@pytest.mark.parametrize("damage", ["type", "index", "block", "name"])
def test_every_name_is_found_whatever_the_index_says(
    opened: Open, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    layer = indexed(opened, monkeypatch, damage=damage)
    for number in (0, 410, 650, 798, 800, 810, 1198):
        assert layer.lookup(layer.root, b"%05d" % number) is not None, number
        if damage != "type":  # it affects only listings
            assert layer.lookup(layer.root, b"%05d" % (number + 1)) is None


def test_a_searched_directory_that_claims_to_be_huge(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = indexed(opened, monkeypatch, damage="size")
    damaged(lambda: layer.lookup(layer.root, b"99999"))


XATTR = struct.pack("<HH", 0, 1) + b"a" + struct.pack("<I", 3) + b"yes"


@pytest.mark.parametrize(
    ("keys", "sets", "number"),
    [
        (XATTR, (0, 2, 20), 0),  # one more than there are
        (XATTR, (0, 0xFFFFFFFF, 20), 0),
        (XATTR, (1 << 40, 1, 20), 0),
        (XATTR, (9000, 1, 20), 0),
        (XATTR, (0, 1, 20), 1),  # no such set
        (struct.pack("<HH", 0, 60000), (0, 1, 20), 0),
        (struct.pack("<HH", 0, 1) + b"a" + struct.pack("<I", 1 << 31), (0, 1, 20), 0),
        (struct.pack("<HH", 0x100, 1) + b"a" + struct.pack("<I", 4) + bytes(4), (0, 1, 20), 0),
        (struct.pack("<HH", 0x100, 1) + b"a" + struct.pack("<IQ", 8, 1 << 45), (0, 1, 20), 0),
    ],
)
def test_attributes_outside_of_their_table(
    opened: Open, keys: bytes, sets: tuple[int, int, int], number: int
) -> None:
    forge = Forge(xattr_keys=keys, xattr_sets=[sets])
    file = forge.large_file(0, 96, b"", xattr=number)
    layer = opened(forge.finish(forge.directory([Entry(b"x", file)])))
    key = find(layer, b"x")
    damaged(lambda: [layer.getxattr(key, name) for name in layer.listxattr(key)])


def test_attributes_of_namespaces_of_the_future_are_passed_over(opened: Open) -> None:
    forge = Forge(xattr_keys=struct.pack("<HH", 7, 1) + b"z" + bytes(4) + XATTR, xattr_sets=[(0, 2, 30)])
    layer = opened(forge.finish(forge.directory([Entry(b"x", forge.large_file(0, 96, b"", xattr=0))])))
    key = find(layer, b"x")
    assert layer.listxattr(key) == [b"user.a"]
    assert layer.getxattr(key, b"user.a") == b"yes"


@pytest.mark.parametrize(
    ("keys", "count"),
    [
        (bytes(8 * 20_000), 20_000),  # more than COUNT_MAX, of no length at all
        (20 * (struct.pack("<HH", 0, 1) + b"a" + struct.pack("<I", 60_000) + bytes(60_000)), 20),
    ],
)
def test_more_attributes_than_the_kernel_would_give(opened: Open, keys: bytes, count: int) -> None:
    forge = Forge(xattr_keys=keys, xattr_sets=[(0, count, len(keys))])
    layer = opened(forge.finish(forge.directory([Entry(b"x", forge.large_file(0, 96, b"", xattr=0))])))
    damaged(lambda: layer.listxattr(find(layer, b"x")))


def test_a_value_longer_than_the_kernel_gives_any(opened: Open) -> None:
    keys = struct.pack("<HH", 0, 1) + b"z" + struct.pack("<I", 65537) + bytes(65537) + XATTR
    forge = Forge(xattr_keys=keys, xattr_sets=[(0, 2, len(keys))])
    layer = opened(forge.finish(forge.directory([Entry(b"x", forge.large_file(0, 96, b"", xattr=0))])))
    key = find(layer, b"x")
    assert layer.listxattr(key) == [b"user.z", b"user.a"]
    damaged(lambda: layer.getxattr(key, b"user.z"), code=errno.E2BIG)
    assert layer.getxattr(key, b"user.a") == b"yes"


# --- the superblock


@pytest.mark.parametrize(
    "field",
    [
        {"inode_table": 0},
        {"inode_table": 1 << 60},
        {"directory_table": 0},
        {"directory_table": 1 << 62},
        {"id_table": 1 << 40},
        {"id_table": 0},
        {"xattr_table": 1 << 50},
        {"export_table": 100},
        {"fragments": 1 << 31, "fragment_table": 500},
        {"ids": 0},
        {"ids": 65535},
        {"block_size": 1 << 30},
        {"block_size": 5000},
        {"block_log": 63},
        {"compressor": 0},
        {"compressor": 7},
        {"bytes_used": 1 << 40},
        {"bytes_used": 100},
    ],
)
def test_forged_superblocks_are_refused_when_opened(opened: Open, field: dict[str, int]) -> None:
    forge = Forge()
    root = forge.directory([])
    opened(forge.finish(root))
    with pytest.raises(LayerError):
        opened(forge.finish(root, **field))


@pytest.mark.parametrize("root", [8192, 1 << 47, 5])
def test_roots_that_are_no_directory_are_refused_when_opened(opened: Open, root: int) -> None:
    forge = Forge()
    forge.directory([])
    with pytest.raises(LayerError):
        opened(forge.finish(root))


# --- blocks that decompress to too much data

SIZE = 100 << 20


def _bombs() -> dict[str, tuple[int, bytes]]:
    zeros = bytes(1 << 20)
    gzip, xz = zlib.compressobj(9), lzma.LZMACompressor(preset=0)
    zstd = zstandard.ZstdCompressor(level=1).compressobj(size=SIZE)
    unsized = zstandard.ZstdCompressor(level=1).compressobj()
    parts: dict[str, list[bytes]] = {"gzip": [], "xz": [], "zstd": [], "unsized": []}
    for _ in range(SIZE >> 20):
        for name, stream in (("gzip", gzip), ("xz", xz), ("zstd", zstd), ("unsized", unsized)):
            parts[name].append(stream.compress(zeros))
    for name, stream in (("gzip", gzip), ("xz", xz), ("zstd", zstd), ("unsized", unsized)):
        parts[name].append(stream.flush())
    raw_lzma = lzma.compress(bytes(64 << 20), lzma.FORMAT_ALONE, preset=0)
    return {
        "gzip": (1, b"".join(parts["gzip"])),
        "lzma": (2, raw_lzma),
        "xz": (4, b"".join(parts["xz"])),
        "lz4": (5, lz4.block.compress(bytes(64 << 20), store_size=False)),
        "zstd": (6, b"".join(parts["zstd"])),
        "zstd of unknown size": (6, b"".join(parts["unsized"])),
        "zstd that claims 2^60 bytes": (
            6,
            b"\x28\xb5\x2f\xfd\xc0\x50" + struct.pack("<Q", 1 << 60) + b"\1\0\0",
        ),
        "xz with a dictionary of 1.5 GiB": (4, _huge_dictionary()),
    }


def _huge_claim() -> bytes:
    return b"\x28\xb5\x2f\xfd\xc0\x50" + struct.pack("<Q", 1 << 60) + b"\1\0\0"


def _huge_dictionary() -> bytes:
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
    stream = bytearray(lzma.compress(bytes(4096), lzma.FORMAT_XZ, filters=filters))
    at = stream.index(b"\x21\x01", 12) + 2
    stream[at] = 39  # dictionary size 3 GiB; the header's checksum follows
    end = 12 + (stream[12] + 1) * 4
    stream[end - 4 : end] = struct.pack("<I", zlib.crc32(stream[12 : end - 4]))
    return bytes(stream)


@pytest.fixture(scope="module")
def bombs() -> dict[str, tuple[int, bytes]]:
    return _bombs()


@pytest.mark.parametrize(
    "which",
    [
        "gzip",
        "lzma",
        "xz",
        "lz4",
        "zstd",
        "zstd of unknown size",
        "zstd that claims 2^60 bytes",
        "xz with a dictionary of 1.5 GiB",
    ],
)
def test_decompression_bombs_take_no_memory(
    opened: Open, bombs: dict[str, tuple[int, bytes]], which: str
) -> None:
    compressor, bomb = bombs[which]
    bomb = bomb[: 1 << 20]
    forge = Forge(block_size=1 << 20, compressor=compressor)
    start = forge.block(bomb)
    forge.fragments.append((start, len(bomb)))
    block = forge.file(1 << 20, start, [len(bomb)])
    tail = forge.file(1000, 0, [], fragment=0)
    layer = opened(forge.finish(forge.directory([Entry(b"block", block), Entry(b"tail", tail)])))
    with at_most(48 << 20):
        damaged(lambda: read(layer, b"block"))
        damaged(lambda: read(layer, b"tail"))


def test_a_metadata_block_that_is_a_bomb(opened: Open, bombs: dict[str, tuple[int, bytes]]) -> None:
    forge = Forge()
    image = bytearray(forge.finish(forge.directory([])))
    bomb = zlib.compress(bytes(7 << 20), 9)[:8192]
    at = struct.unpack_from("<Q", image, 64)[0]
    # The inode table becomes one block that decompresses to more than 8192 bytes.
    image[at : at + 2] = struct.pack("<H", len(bomb))
    image[at + 2 : at + 2] = bomb
    for position in (40, 48, 72):
        (value,) = struct.unpack_from("<Q", image, position)
        struct.pack_into("<Q", image, position, value + len(bomb))
    with pytest.raises(LayerError, match="metadata block"):
        opened(bytes(image))
