"""Images that are unusual but valid, or that the kernel reads anyway, with what they must show."""

from __future__ import annotations

import errno
import struct
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import zstandard

from tests.support.goblocks import BLOCKS
from tests.support.squashcompare import Failed, Seen
from tests.support.squashforge import DIRECTORY, NONE32, Entry, Forge
from tests.support.squashfs import text

RAW = 1 << 24
EIO = Failed(errno.EIO)


class Image(NamedTuple):
    """A forged image, and what it must show."""

    raw: bytes
    shown: Seen
    """Part of what the image must show, by path."""


Make = Callable[[], Image]
MAKERS: dict[str, Make] = {}


def peculiar(make: Make) -> Make:
    """Register a function that makes an image, by its name."""
    MAKERS[make.__name__.replace("_", " ")] = make
    return make


def peculiar_for(*values: Any) -> Callable[[Callable[[Any], Image]], Callable[[Any], Image]]:
    """Register a function that makes an image, once for each of *values*."""

    def note(make: Callable[[Any], Image]) -> Callable[[Any], Image]:
        for value in values:
            shown = value if isinstance(value, str) else repr(value)[:50]
            MAKERS[f"{make.__name__.replace('_', ' ')} {shown}"] = partial(make, value)
        return make

    return note


def names(*listed: bytes) -> dict[str, Any]:
    return {"names": sorted(listed)}


def pages(content: bytes) -> dict[str, Any]:
    return {"pages": [content[start : start + 4096] for start in range(0, len(content), 4096)]}


def two_files(forge: Forge, **directory: int) -> Image:
    """Return an image with two files, one of them in two blocks."""
    one = forge.small(b"alpha", 2)
    start = forge.block(b"b" * forge.block_size + b"tail")
    two = forge.file(forge.block_size + 4, start, [forge.block_size | RAW, 4 | RAW], 3)
    root = forge.directory([Entry(b"a", one, number=2), Entry(b"b", two, number=3)], 4, **directory)
    return Image(
        forge.finish(root),
        {
            b"": names(b"a", b"b") | {"lookup b'!'": Failed(errno.ENOENT)},
            b"/a": pages(b"alpha"),
            b"/b": pages(b"b" * forge.block_size + b"tail"),
        },
    )


def file(forge: Forge, ref: int, content: list[Any], number: int = 2) -> Image:
    """Return an image with one file."""
    raw = forge.finish(forge.directory([Entry(b"x", ref, number=number)], 99))
    return Image(raw, {b"": names(b"x"), b"/x": {"pages": content}})


# --- directories


@peculiar_for(-3, -2, -1, 1, 2, 3, 4, 8, 20, 1000)
def a_directory_states_a_size_that_is_off_by(more: int) -> Image:
    """squashfs-tools-ng before 1.1.3 and go-diskfs before 2025 leave out the 3 bytes of . and .. (-3)."""
    return two_files(Forge(), more=more)


@peculiar_for(-3, 5)
def a_directory_followed_by_another_states_a_size_that_is_off_by(more: int) -> Image:
    """If the size reaches beyond the listing, the kernel continues with the next listing."""
    forge = Forge()
    file_ = forge.small(b"content", 2)
    below = forge.directory([Entry(b"f", file_, number=2)], 3, more=more)
    empty = forge.directory([], 4, more=-3)
    root = forge.directory([Entry(b"d", below, DIRECTORY, 3), Entry(b"e", empty, DIRECTORY, 4)], 5, more=-3)
    listed = names(b"f") if more < 0 else names(b"f", b"d")
    return Image(forge.finish(root), {b"": names(b"d", b"e"), b"/d": listed, b"/d/f": pages(b"content")})


@peculiar
def names_in_no_order() -> Image:
    """The kernel lists all names, but does not find those after one with a greater first byte. cowfs does."""
    forge = Forge()
    order = [b"b", b"a", b"c", b"bb", b"\xff", b"z", b"B"]
    entries = [Entry(name, forge.small(name, at), number=at) for at, name in enumerate(order, 2)]
    shown: Seen = {b"/" + name: pages(name) for name in order}
    return Image(forge.finish(forge.directory(entries, 99)), {b"": names(*order), **shown})


@peculiar
def one_name_twice() -> Image:
    forge = Forge()
    entries = [
        Entry(b"a", forge.small(word, at), number=at) for at, word in enumerate((b"first", b"last"), 2)
    ]
    return Image(forge.finish(forge.directory(entries, 9)), {b"": names(b"a"), b"/a": pages(b"first")})


@peculiar_for(0, 1, 3, 7)
def a_file_that_the_listing_calls(kind: int) -> Image:
    forge = Forge()
    entries = [Entry(b"a", forge.small(b"A", 2), kind, 2), Entry(b"b", forge.small(b"B", 3), number=3)]
    shown: Seen = {b"": names(b"a", b"b"), b"/a": pages(b"A"), b"/b": pages(b"B")}
    return Image(forge.finish(forge.directory(entries, 9)), shown)


@peculiar_for(0, 2)
def a_directory_that_the_listing_calls(kind: int) -> Image:
    forge = Forge()
    below = forge.directory([Entry(b"f", forge.small(b"F", 2), number=2)], 3)
    root = forge.directory([Entry(b"d", below, kind, 3)], 9)
    return Image(forge.finish(root), {b"": names(b"d"), b"/d": names(b"f"), b"/d/f": pages(b"F")})


@peculiar
def headers_of_no_entries_and_of_many() -> Image:
    forge = Forge()
    entries = [Entry(b"%03d" % at, forge.small(b"%d" % at, at), number=at) for at in range(2, 300)]
    forge.listings += struct.pack("<III", NONE32, 0, 0)
    forge.group(entries[:256])
    forge.listings += struct.pack("<III", NONE32, 7, 7)
    forge.group(entries[256:])
    root = forge.large_directory(0, 0, len(forge.listings) + 3, number=900)
    return Image(forge.finish(root), {b"": names(*(entry.name for entry in entries)), b"/299": pages(b"299")})


@peculiar
def an_index_that_leads_nowhere() -> Image:
    forge = Forge()
    entries = [Entry(b"%04d" % at, forge.small(b"A", at), number=at) for at in range(2, 600)]
    block, offset, size = forge.listing(entries)
    index = [(1, 5, b"0300"), (1 << 20, 77, b"0400")]
    shown: Seen = {b"": names(*(entry.name for entry in entries)), b"/0500": pages(b"A")}
    return Image(forge.finish(forge.large_directory(block, offset, size, index, number=900)), shown)


# --- tables


@peculiar_for(32, 33, 60, 100, 8191)
def metadata_blocks_are_not_full_but_hold(chunk: int) -> Image:
    forge = Forge(chunk=chunk, xattr_keys=_key(b"one", b"1" * 50) + _key(b"two", b"2"))
    forge.xattr_sets = [(0, 2, 0)]
    entries = [Entry(b"f%03d" % at, forge.small(b"%d" % at, at), number=at) for at in range(2, 30)]
    link = forge.inode(10, struct.pack("<II", 1, 50) + b"t" * 50 + struct.pack("<I", NONE32), 98)
    start = forge.block(b"z" * 40 * 4096)
    large = forge.large_file(40 * 4096, start, struct.pack("<I", 4096 | RAW) * 40, 99, xattr=0)
    entries += [Entry(b"link", link, 3, 98), Entry(b"large", large, number=99)]
    shown: Seen = {
        b"": names(*(entry.name for entry in entries)),
        b"/f029": pages(b"29"),
        b"/link": {"target": b"t" * 50},
        b"/large": {"xattr user.one": b"1" * 50, "xattr user.two": b"2", **pages(b"z" * 40 * 4096)},
    }
    return Image(forge.finish(forge.directory(entries, 200)), shown)


@peculiar
def tables_with_something_between_them_and_behind_them() -> Image:
    forge = Forge(gap=b"\xff\xff what is this", padding=b"p" * 100)
    forge.fragments.append((forge.block(b"tail" * 50), 200 | RAW))
    return file(forge, forge.file(100, 0, [], 2, fragment=0, tail=20), [b"tail" * 25])


@peculiar_for("fragment export id xattr", "xattr id export fragment", "id fragment xattr export")
def tables_in_the_order(order: str) -> Image:
    """The kernel mounts only the first order. The end of a table follows only from the start of the next."""
    forge = Forge(count=1, order=tuple(order.split()), xattr_keys=_key(b"a", b"1"), xattr_sets=[(0, 1, 10)])
    forge.fragments.append((forge.block(b"tail" * 50), 200 | RAW))
    ref = forge.large_file(100, 0, b"", 1, xattr=0, fragment=0, tail=20)
    forge.export = [ref]
    image = file(forge, ref, [b"tail" * 25], 1)
    image.shown[b"/x"] |= {"xattr user.a": b"1"}
    return image


@peculiar
def data_between_the_tables() -> Image:
    forge = Forge(gap=b"a block of data!" * 256)
    root = forge.directory([Entry(b"x", forge.next_ref(32), number=2)], 9)
    forge.file(4096, 96 + 2 + len(forge.inodes) + 36, [4096 | RAW], 2)
    return Image(forge.finish(root), {b"": names(b"x"), b"/x": pages(forge.gap)})


@peculiar
def the_root_is_the_first_inode_and_its_file_behind_it() -> Image:
    forge = Forge()
    root = forge.directory([Entry(b"x", forge.next_ref(32), number=2)], 1)
    forge.small(b"later", 2)
    return Image(forge.finish(root), {b"/x": pages(b"later")})


@peculiar
def a_root_that_is_extended_and_has_no_index() -> Image:
    forge = Forge()
    block, offset, size = forge.listing([Entry(b"x", forge.small(b"X", 2), number=2)])
    return Image(forge.finish(forge.large_directory(block, offset, size)), {b"/x": pages(b"X")})


@peculiar
def exportable() -> Image:
    forge = Forge(count=2)
    one = forge.small(b"X", 1)
    forge.export = [one, forge.next_ref()]
    return file(forge, one, [b"X"], 1)


@peculiar_for(0, 1, 1 << 31)
def the_superblock_counts_inodes(count: int) -> Image:
    forge = Forge(count=count)
    return file(forge, forge.small(b"X", 4_000_000_000), [b"X"], 4_000_000_000)


@peculiar_for({"flags": 0xFBFF}, {"mkfs_time": NONE32}, {"fragment_table": 5}, {"fragment_table": 0})
def a_superblock_with(fields: dict[str, int]) -> Image:
    forge = Forge()
    one = forge.small(b"X", 2)
    return Image(
        forge.finish(forge.directory([Entry(b"x", one, number=2)], 3), **fields), {b"/x": pages(b"X")}
    )


@peculiar
def something_behind_the_image() -> Image:
    image = two_files(Forge())
    return image._replace(raw=image.raw + b"\xaa" * 10_000)


@peculiar
def an_empty_table_of_attributes() -> Image:
    """The kernel accepts no table, or one that is not empty."""
    return two_files(Forge(xattr_keys=b"", xattr_sets=[]))


# --- inodes


@peculiar_for(0, 1, 0x7FFFFFFF, 0x80000000, NONE32)
def a_file_of_the_time(mtime: int) -> Image:
    """The times of the format are unsigned: 1970 to 2106."""
    forge = Forge()
    image = file(forge, forge.small(b"X", 2, mtime=mtime), [b"X"])
    image.shown[b"/x"] |= {"st_mtime_ns": mtime * 10**9, "st_ctime_ns": mtime * 10**9}
    return image


@peculiar
def as_many_owners_as_there_can_be_and_nobody() -> Image:
    forge = Forge(owners=[*range(65_534), NONE32])
    image = file(forge, forge.small(b"X", 2, owner=65_534, group=65_533), [b"X"])
    image.shown[b"/x"] |= {"st_uid": 65_534, "st_gid": 65_533}
    return image


@peculiar_for(0o100644, 0o104755)
def a_mode_with_the_type_in_it(mode: int) -> Image:
    """The kernel refuses this since 6.17."""
    forge = Forge()
    one = forge.small(b"X", 2, mode=mode)
    shown = pages(b"X") | {"st_mode": mode}
    return Image(forge.finish(forge.directory([Entry(b"x", one, number=2)], 3)), {b"/x": shown})


@peculiar
def hard_links_of_a_basic_inode_and_an_inode_of_no_links() -> Image:
    forge = Forge()
    one = forge.small(b"X", 7)
    none = forge.inode(9, struct.pack("<QQQIIII", 96, 0, 0, 0, NONE32, 0, NONE32), 5)
    entries = [Entry(b"a", one, number=7), Entry(b"b", one, number=7), Entry(b"c", none, number=5)]
    linked = {"st_ino": 7, "st_nlink": 1, **pages(b"X")}
    shown: Seen = {b"/a": linked, b"/b": linked, b"/c": {"st_nlink": 0}}
    return Image(forge.finish(forge.directory(entries, 3)), shown)


@peculiar
def numbers_that_the_listing_has_otherwise() -> Image:
    forge = Forge()
    entries = [Entry(b"a", forge.small(b"A", 7), number=8), Entry(b"b", forge.small(b"BB", 8), number=7)]
    shown: Seen = {b"/a": {"st_ino": 7, **pages(b"A")}, b"/b": {"st_ino": 8, **pages(b"BB")}}
    return Image(forge.finish(forge.directory(entries, 3)), shown)


@peculiar_for(b"", b"x\0y", b"/" + b"l" * 4094, b"/" + b"l" * 4095)
def a_symlink_to(target: bytes) -> Image:
    forge = Forge()
    link = forge.inode(3, struct.pack("<II", 1, len(target)) + target, 5)
    seen = {"target": target.partition(b"\0")[0][:4095], "st_size": len(target)}
    return Image(forge.finish(forge.directory([Entry(b"l", link, 3, 5)], 9)), {b"/l": seen})


@peculiar_for(0, 0x103, 0xFFF00, 0x80000001, NONE32)
def devices_of_number(rdev: int) -> Image:
    forge = Forge()
    entries = []
    for kind in (4, 5, 11, 12):
        ref = forge.inode(kind, struct.pack("<II", 1, rdev) + (b"\xff" * 4 if kind > 7 else b""), kind)
        entries.append(Entry(b"%02d" % kind, ref, kind - (7 if kind > 7 else 0), kind))
    for kind in (6, 7, 13, 14):
        ref = forge.inode(kind, struct.pack("<I", 1) + (b"\xff" * 4 if kind > 7 else b""), kind)
        entries.append(Entry(b"%02d" % kind, ref, kind - (7 if kind > 7 else 0), kind))
    entries.sort(key=lambda entry: entry.name)
    shown: Seen = {b"/%02d" % kind: {"st_rdev": rdev} for kind in (4, 5, 11, 12)}
    return Image(forge.finish(forge.directory(entries, 99)), shown)


# --- data


@peculiar
def a_last_block_that_is_longer_than_the_file() -> Image:
    forge = Forge()
    return file(forge, forge.file(1000, forge.block(b"q" * 4096), [4096 | RAW], 2), [b"q" * 1000])


@peculiar
def a_last_block_that_decompresses_to_more_than_the_file() -> Image:
    forge = Forge(block_size=16384)
    packed = zlib.compress(b"k" * 16384)
    start = forge.block(b"w" * 16384 + packed)
    content = [b"w" * 4096] * 4 + [b"k" * 616]
    return file(forge, forge.file(17_000, start, [16384 | RAW, len(packed)], 2), content)


@peculiar
def blocks_that_hold_less_than_they_should() -> Image:
    """Only whole pages of the blocks can be read."""
    forge = Forge(block_size=16384)
    packed = zlib.compress(b"k" * 9000)
    start = forge.block(packed + b"r" * 5000 + b"w" * 16384)
    ref = forge.file(3 * 16384, start, [len(packed), 5000 | RAW, 16384 | RAW], 2)
    content = [b"k" * 4096] * 2 + [EIO] * 2 + [b"r" * 4096] + [EIO] * 3 + [b"w" * 4096] * 4
    return file(forge, ref, content)


@peculiar
def a_fragment_that_holds_less_than_it_should() -> Image:
    forge = Forge(block_size=16384)
    forge.fragments.append((forge.block(b"f" * 9000), 9000 | RAW))
    return file(forge, forge.file(10_000, 0, [], 2, fragment=0), [b"f" * 4096, b"f" * 4096, EIO])


@peculiar
def a_tail_of_one_byte_at_the_end_of_a_fragment() -> Image:
    forge = Forge()
    forge.fragments.append((forge.block(b"f" * 99 + b"!"), 100 | RAW))
    ref = forge.file(4097, forge.block(b"b" * 4096), [4096 | RAW], 2, fragment=0, tail=99)
    return file(forge, ref, [b"b" * 4096, b"!"])


@peculiar
def a_fragment_for_a_file_that_has_no_tail() -> Image:
    forge = Forge()
    forge.fragments.append((forge.block(b"f" * 100), 100 | RAW))
    return file(forge, forge.file(4096, forge.block(b"b" * 4096), [4096 | RAW], 2, fragment=0), [b"b" * 4096])


@peculiar
def holes_to_the_end() -> Image:
    forge = Forge()
    start = forge.block(b"b" * 4096)
    return file(forge, forge.file(9000, start, [4096 | RAW, 0, 0], 2), [b"b" * 4096, bytes(4096), bytes(808)])


@peculiar
def more_lengths_of_blocks_than_there_are_blocks() -> Image:
    forge = Forge()
    return file(forge, forge.file(100, forge.block(b"b" * 100), [100 | RAW, 5, 6], 2), [b"b" * 100])


@peculiar
def fewer_lengths_of_blocks_than_there_are_blocks() -> Image:
    """The existing blocks can be read; then follows other data, or an error."""
    forge = Forge()
    root = forge.directory([Entry(b"x", forge.next_ref(32), number=2)], 99)
    ref = forge.file(20 * 4096, forge.block(b"b" * 4096), [4096 | RAW, 0, NONE32], 2)
    assert root != ref
    return Image(forge.finish(root), {b"/x": {"pages": [b"b" * 4096, bytes(4096), *[EIO] * 18]}})


@peculiar_for(0, 4096, 1 << 40)
def a_file_that_says_it_has_holes_of(sparse: int) -> Image:
    forge = Forge()
    body = struct.pack("<QQQIIIII", 96, 4096, sparse, 1, NONE32, 0, NONE32, 4096 | RAW)
    forge.block(b"b" * 4096)
    return file(forge, forge.inode(9, body, 2), [b"b" * 4096])


# --- attributes


def _key(name: bytes, value: bytes, kind: int = 0) -> bytes:
    return struct.pack("<HH", kind, len(name)) + name + struct.pack("<I", len(value)) + value


def _attributes(keys: bytes, count: int, shown: dict[str, Any], sets: int = 1, **forged: Any) -> Image:
    forge = Forge(xattr_keys=keys, xattr_sets=[(0, count, len(keys))] * sets, **forged)
    ref = forge.large_file(0, 96, b"", 2, xattr=sets - 1)
    image = file(forge, ref, [])
    image.shown[b"/x"] |= shown
    return image


@peculiar
def attributes_of_all_namespaces_and_of_unknown_ones() -> Image:
    kinds = [
        _key(b"a", b"1"),
        _key(b"t", b"2", 1),
        _key(b"s", b"3", 2),
        _key(b"z", b"4", 7),
        _key(b"f", b"5", 0x200),
    ]
    return _attributes(b"".join(kinds), 5, {"xattrs": ["user.a", "trusted.t", "security.s"]})


@peculiar
def the_same_attributes_in_several_sets() -> Image:
    return _attributes(_key(b"a", b"1"), 1, {"xattr user.a": b"1"}, sets=3)


@peculiar
def one_attribute_twice_in_a_set() -> Image:
    return _attributes(_key(b"a", b"1") + _key(b"a", b"2"), 2, {"xattrs": ["user.a"], "xattr user.a": b"1"})


@peculiar
def a_set_of_no_attributes() -> Image:
    return _attributes(_key(b"a", b"1"), 0, {"xattrs": []})


@peculiar_for(8, 4, 20)
def an_attribute_out_of_line_whose_reference_states_a_length_of(length: int) -> Image:
    keys = (
        _key(b"v", b"value") + struct.pack("<HHc", 0x100, 1, b"o") + struct.pack("<IQ", length, 5) + bytes(20)
    )
    return _attributes(keys, 2, {"xattr user.v": b"value", "xattr user.o": b"value"})


@peculiar
def an_attribute_of_64_kib_and_one_of_more() -> Image:
    keys = _key(b"big", b"v" * 65536) + _key(b"bigger", bytes(65537)) + _key(b"g", b"good")
    shown = {
        "xattr user.big": b"v" * 65536,
        "xattr user.bigger": Failed(errno.E2BIG),
        "xattr user.g": b"good",
    }
    return _attributes(keys, 3, shown)


@peculiar
def a_number_of_attributes_but_no_table_of_them() -> Image:
    forge = Forge()
    return file(forge, forge.large_file(0, 96, b"", 2, xattr=3), [])


# --- compressors


@peculiar_for(*BLOCKS)
def data_and_a_fragment_compressed_in_go_by(which: str) -> Image:
    compressor, block = BLOCKS[which]
    options = struct.pack("<II", 1, 0) if compressor == 5 else None
    forge = Forge(block_size=8192, compressor=compressor, options=options)
    forge.fragments.append((forge.block(block), len(block)))
    one = forge.file(3000, forge.fragments[0][0], [len(block)], 2)
    two = forge.file(1000, 0, [], 3, fragment=0, tail=500)
    root = forge.directory([Entry(b"a", one, number=2), Entry(b"b", two, number=3)], 9)
    return Image(forge.finish(root), {b"/a": pages(text(3000)), b"/b": pages(text(3000)[500:1500])})


@peculiar_for(17, 20, 27)
def zstd_with_a_window_of_two_to_the(power: int) -> Image:
    """Larger than a block, as streaming compressors write it, but with the size of the content."""
    content = text(100_000)
    frame = zstandard.ZstdCompressor(level=3).compress(content)
    assert frame[4] == 0xA0, "one segment, its size in four bytes"
    frame = frame[:4] + bytes([0x80, (power - 10) << 3]) + frame[5:]
    forge = Forge(block_size=131_072, compressor=6)
    ref = forge.file(len(content), forge.block(frame), [len(frame)], 2)
    return file(forge, ref, pages(content)["pages"])


@peculiar_for(9, 12, 15)
def gzip_with_a_window_of_two_to_the(power: int) -> Image:
    stream = zlib.compressobj(9, zlib.DEFLATED, power)
    packed = stream.compress(text(9000)) + stream.flush()
    forge = Forge(block_size=16384, options=struct.pack("<IHH", 9, power, 1))
    ref = forge.file(9000, forge.block(packed + b"behind it"), [len(packed) + 9], 2)
    return file(forge, ref, pages(text(9000))["pages"])


@peculiar
def compressed_metadata() -> Image:
    return two_files(Forge(pack=zlib.compress))
