"""Reading, copying, caching: the data of files."""

from __future__ import annotations

import errno
import logging
import os
import random
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cowfs.formats.squashfs.blocks import Stored
from cowfs.formats.squashfs.codecs import starter
from cowfs.formats.squashfs.errors import CodecError
from cowfs.formats.squashfs.workers import Workers
from cowfs.layers.kernel_file import KernelFile
from cowfs.layers.squashfs import SquashfsFile, SquashfsLayer
from tests.support.memory_file import MemoryFile
from tests.support.squashforge import Entry, Forge
from tests.support.squashfs import BLOCK, mksquashfs, needs_mksquashfs, noise, text

MIB = 1 << 20


def sparse() -> bytes:
    """Holes at the start, in the middle and at the end; data that begins and ends inside a block."""
    content = bytearray(40 * BLOCK + 5000)
    content[3 * BLOCK + 100 : 3 * BLOCK + 200] = b"x" * 100
    content[9 * BLOCK : 20 * BLOCK] = text(11 * BLOCK)
    content[25 * BLOCK - 1 : 25 * BLOCK + 1] = b"ab"
    return bytes(content)


FILES = {
    "text": text(20 * BLOCK + 4321),
    "noise": noise(5 * BLOCK),
    "sparse": sparse(),
    "sparse with a tail": sparse()[: 20 * BLOCK] + b"tail",
    "tiny": b"tiny",
    "empty": b"",
    "zeros": bytes(3 * BLOCK),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    if not any(os.access(os.path.join(part, "mksquashfs"), os.X_OK) for part in os.get_exec_path()):
        pytest.skip("needs mksquashfs (Debian: squashfs-tools)")
    base = tmp_path_factory.mktemp("data")
    top = base / "tree"
    top.mkdir()
    for name, content in FILES.items():
        (top / name).write_bytes(content)
    return {
        "usual": mksquashfs(base / "usual", top),
        "4K": mksquashfs(base / "4K", top, options=("-b", "4K", "-comp", "zstd")),
        "1M": mksquashfs(base / "1M", top, options=("-b", "1M", "-comp", "xz")),
        "tails": mksquashfs(base / "tails", top, options=("-tailends",)),
        "no fragments": mksquashfs(base / "nofrag", top, options=("-no-fragments", "-comp", "lz4")),
    }


KINDS = ("usual", "4K", "1M", "tails", "no fragments")


@pytest.fixture
def opened() -> Iterator[Callable[[Path], SquashfsLayer]]:
    layers: list[SquashfsLayer] = []

    def call(path: Path) -> SquashfsLayer:
        layers.append(SquashfsLayer(os.fspath(path)))
        return layers[-1]

    yield call
    for layer in layers:
        layer.close()


Open = Callable[[Path], SquashfsLayer]


def file_of(layer: SquashfsLayer, name: str) -> SquashfsFile:
    found = layer.lookup(layer.root, name.encode())
    assert found is not None
    return layer.open(found[0], os.O_RDONLY)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_reads_at_any_place_and_of_any_size(
    images: dict[str, Path], opened: Open, kind: str, name: str
) -> None:
    file, content = file_of(opened(images[kind]), name), FILES[name]
    places = random.Random(kind + name)
    edges = [0, 1, 4095, 4096, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, len(content) - 1, len(content)]
    for _ in range(60):
        offset = places.choice([*edges, places.randrange(len(content) + 10)])
        size = places.choice([0, 1, 100, 4096, BLOCK, BLOCK + 1, 3 * BLOCK, places.randrange(1, 4 * BLOCK)])
        offset = max(offset, 0)
        assert file.pread(size, offset) == content[offset : offset + size]
    assert file.pread(len(content) + 100, 0) == content
    assert file.pread(10, len(content) + BLOCK) == b""
    assert file.stat().st_size == len(content)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1000, 4096, BLOCK, MIB])
def test_sequential_reads(images: dict[str, Path], opened: Open, kind: str, step: int) -> None:
    file, content = file_of(opened(images[kind]), "text"), FILES["text"]
    parts, offset = [], 0
    while data := file.pread(step, offset):
        parts.append(data)
        offset += len(data)
    assert b"".join(parts) == content


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_segments_hold_all_data(images: dict[str, Path], opened: Open, kind: str, name: str) -> None:
    file, content = file_of(opened(images[kind]), name), FILES[name]
    for end in (len(content), len(content) + 1, len(content) // 2, 10 * BLOCK + 1, 1, 0):
        rest = bytearray(content[:end])
        last = -1
        for start, stop in file.segments(end):
            assert last < start < stop <= min(end, len(content)), "in order, apart, within the file"
            last = stop
            rest[start:stop] = bytes(stop - start)
        assert not any(rest), "data outside of the segments"


def test_holes_are_no_segments(images: dict[str, Path], opened: Open) -> None:
    file = file_of(opened(images["usual"]), "sparse")
    assert list(file.segments(1 << 60)) == [
        (3 * BLOCK, 4 * BLOCK),
        (9 * BLOCK, 20 * BLOCK),
        (24 * BLOCK, 26 * BLOCK),
    ]
    assert list(file_of(opened(images["usual"]), "zeros").segments(1 << 60)) == []


# --- copying


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_copies_are_equal_and_as_sparse(
    images: dict[str, Path], opened: Open, tmp_path: Path, kind: str, name: str
) -> None:
    source, content = file_of(opened(images[kind]), name), FILES[name]
    with (tmp_path / "copy").open("w+b", buffering=0) as target:
        source.copy_to(KernelFile(os.dup(target.fileno())))
        assert (tmp_path / "copy").read_bytes() == content
        stored = sum(stop - start for start, stop in source.segments(len(content)))
        assert os.fstat(target.fileno()).st_blocks * 512 <= stored + 2 * 4096
    memory = MemoryFile()
    source.copy_to(memory)
    assert bytes(memory.content) == content
    assert memory.written == stored


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0, 1, 4097, 9 * BLOCK + 5, 12 * BLOCK, 1 << 40])
def test_the_start_of_a_file_is_copied(images: dict[str, Path], opened: Open, kind: str, size: int) -> None:
    for name in ("text", "sparse", "tiny", "sparse with a tail"):
        target = MemoryFile()
        file_of(opened(images[kind]), name).copy_to(target, size)
        assert bytes(target.content) == FILES[name][:size]


def test_without_threads_everything_works_too(
    images: dict[str, Path], opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    file, target = file_of(opened(images["usual"]), "text"), MemoryFile()
    file.copy_to(target)
    assert bytes(target.content) == FILES["text"]
    assert b"".join(file.pread(BLOCK, at) for at in range(0, 30 * BLOCK, BLOCK)) == FILES["text"]


def test_an_error_of_the_target_ends_the_copy(images: dict[str, Path], opened: Open) -> None:
    target = MemoryFile()
    target.fails_after = MIB
    with pytest.raises(OSError) as caught:
        file_of(opened(images["usual"]), "text").copy_to(target)
    assert caught.value.errno == errno.ENOSPC
    assert target.busy == 0
    written = target.written
    assert file_of(opened(images["usual"]), "tiny").pread(4, 0) == b"tiny"
    assert target.written == written, "written to after the error was raised"


def test_an_error_leaves_the_rest_of_the_file_alone(tmp_path: Path, opened: Open) -> None:
    forge = Forge()
    start = forge.block(bytes(40 * MIB))
    words = struct.pack("<I", 4096 | 1 << 24) * (40 * MIB // 4096)
    image = tmp_path / "image"
    image.write_bytes(forge.finish(forge.directory([Entry(b"x", forge.large_file(40 * MIB, start, words))])))
    target = MemoryFile()
    target.fails_after = 0
    with pytest.raises(OSError):
        file_of(opened(image), "x").copy_to(target)
    assert target.written < 20 * MIB


def test_short_writes_are_continued(
    images: dict[str, Path], opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.pwritev

    def short(fd: int, parts: list[memoryview], offset: int) -> int:
        return original(fd, [b"".join(parts)[:100_001]], offset)

    monkeypatch.setattr(os, "pwritev", short)
    with (tmp_path / "copy").open("w+b", buffering=0) as target:
        file_of(opened(images["usual"]), "text").copy_to(KernelFile(os.dup(target.fileno())))
    assert (tmp_path / "copy").read_bytes() == FILES["text"]


def test_workers_that_are_closed_take_no_work() -> None:
    workers = Workers()
    assert workers.submit(int, "5").result() == 5
    workers.close()
    workers.close()
    for closed in (workers, Workers()):
        closed.close()
        with pytest.raises(OSError) as caught:
            closed.submit(int)
        assert caught.value.errno == errno.EBADF


# --- damage


def damage(image: Path, target: Path, content: bytes) -> Path:
    """Overwrite a data block in the middle of the file "text"."""
    data = bytearray(image.read_bytes())
    data[len(data) // 3 : len(data) // 3 + len(content)] = content
    target.write_bytes(data)
    return target


@needs_mksquashfs
def test_a_damaged_block_is_an_error_where_it_is_and_nowhere_else(
    tmp_path: Path, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    top = tmp_path / "tree"
    top.mkdir()
    content = text(30 * BLOCK)
    (top / "file").write_bytes(content)
    image = mksquashfs(tmp_path / "good", top, options=("-comp", "gzip"))
    broken = damage(image, tmp_path / "broken", b"\xff" * 600)
    file = file_of(opened(broken), "file")
    failed = []
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            for number in range(30):
                try:
                    assert file.pread(BLOCK, number * BLOCK) == content[number * BLOCK :][:BLOCK]
                except OSError as error:
                    assert error.errno == errno.EIO
                    failed.append(number)
    assert 1 <= len(set(failed)) <= 3
    assert sorted(failed) == sorted(2 * list(set(failed)))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(set(lines)) <= 2 * len(set(failed)), "each damage is told once"
    assert all("data block at 0x" in line and str(broken) in line for line in lines)
    with pytest.raises(OSError) as caught:
        file.copy_to(MemoryFile())
    assert caught.value.errno == errno.EIO


def test_an_image_cut_short_while_it_is_open_is_an_io_error(tmp_path: Path, opened: Open) -> None:
    forge = Forge()
    start = forge.block(noise(8 * 4096))
    file = forge.file(8 * 4096, start, [4096 | 1 << 24] * 8)
    image = tmp_path / "image"
    image.write_bytes(forge.finish(forge.directory([Entry(b"file", file)])))
    data = file_of(opened(image), "file")
    assert data.pread(4096, 0) == noise(8 * 4096)[:4096]
    os.truncate(image, 5000)
    with pytest.raises(OSError) as caught:
        data.pread(4096, 4 * 4096)
    assert caught.value.errno == errno.EIO
    assert "shorter" in str(caught.value)


# --- caching and read-ahead


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the position of every data block that is decompressed."""
    from cowfs.formats.squashfs import data as module

    seen: list[int] = []
    original = module.Blocks._expand

    def expand(self: module.Blocks, raw: bytes, stored: Stored) -> bytes:
        seen.append(stored.position)
        return original(self, raw, stored)

    monkeypatch.setattr(module.Blocks, "_expand", expand)
    return seen


def test_concurrent_readers_decompress_a_block_once(
    images: dict[str, Path], opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = counting(monkeypatch)
    layer = opened(images["usual"])
    ready = threading.Barrier(8)

    def read() -> bytes:
        file = file_of(layer, "text")
        ready.wait()
        return b"".join(file.pread(10_000, offset) for offset in range(0, len(FILES["text"]), 10_000))

    with ThreadPoolExecutor(8) as pool:
        results = {future.result() for future in [pool.submit(read) for _ in range(8)]}
    assert results == {FILES["text"]}
    layer.close()
    assert len(seen) == len(set(seen)), "a block was decompressed twice"


def test_one_file_read_by_many_threads(images: dict[str, Path], opened: Open) -> None:
    file, content = file_of(opened(images["4K"]), "text"), FILES["text"]

    def read(seed: int) -> None:
        places = random.Random(seed)
        for _ in range(100):
            offset, size = places.randrange(len(content)), places.randrange(200_000)
            assert file.pread(size, offset) == content[offset : offset + size]

    with ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(read, seed) for seed in range(6)]:
            future.result()


def test_who_reads_on_finds_the_next_blocks_ready(
    images: dict[str, Path], opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = counting(monkeypatch)
    layer = opened(images["usual"])
    file = file_of(layer, "text")
    file.pread(4096, 0)
    layer._image._blocks.workers.close()
    assert len(seen) == 1, "a look at the start is not reading on"
    layer = opened(images["usual"])
    file = file_of(layer, "text")
    for number in range(3):
        file.pread(BLOCK, number * BLOCK)
    layer._image._blocks.workers.submit(int).result()
    layer._image._blocks.workers.submit(int).result()
    layer.close()
    assert len(seen) > 1 + 3 + 1


def test_random_reads_do_not_read_ahead(
    images: dict[str, Path], opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = counting(monkeypatch)
    layer = opened(images["usual"])
    file = file_of(layer, "text")
    for number in (4, 11, 7, 18, 1, 14):
        file.pread(4096, number * BLOCK)
    layer.close()
    assert len(seen) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_thread_should_read_is_said_so(images: dict[str, Path], opened: Open, kind: str) -> None:
    for name, content in FILES.items():
        file = file_of(opened(images[kind]), name)
        near = max(0, len(content) - 50)
        for size, offset in ((4096, 0), (MIB, 0), (100, near), (4096, len(content)), (5, MIB)):
            data = file.try_pread(size, offset)
            if kind != "1M" and size < MIB:  # of xz; and the others are quick
                assert data is not None
            assert data is None or data == content[offset : offset + size]
            file.pread(size, offset)
            assert file.try_pread(size, offset) == content[offset : offset + size]


def test_a_slow_block_is_left_to_a_thread(images: dict[str, Path], opened: Open) -> None:
    file = file_of(opened(images["1M"]), "text")
    assert file.try_pread(10, 0) is None
    assert file.pread(10, 0) == FILES["text"][:10]
    assert file.try_pread(10, 10) == FILES["text"][10:20]


def test_a_slow_block_that_another_thread_makes_is_not_waited_for(
    images: dict[str, Path], opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cowfs.formats.squashfs import data as module

    begun, go_on = threading.Event(), threading.Event()
    original = module.Blocks._expand

    def expand(self: module.Blocks, raw: bytes, stored: Stored) -> bytes:
        begun.set()
        assert go_on.wait(60)
        return original(self, raw, stored)

    monkeypatch.setattr(module.Blocks, "_expand", expand)
    file = file_of(opened(images["1M"]), "text")
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(file.pread, 4096, 0)
        assert begun.wait(60)
        try:
            assert file.try_pread(4096, 4096) is None
        finally:
            go_on.set()
        assert reading.result() == FILES["text"][:4096]


def test_a_read_that_is_tried_first_is_no_sequential_one(
    images: dict[str, Path], opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = counting(monkeypatch)
    layer = opened(images["usual"])
    file = file_of(layer, "text")
    for number in (4, 11, 7, 18, 1, 14):
        file.try_pread(4096, number * BLOCK)
        file.pread(4096, number * BLOCK)
        file.pread(4096, number * BLOCK + 4096)
    layer.close()
    assert len(seen) == 6


HEX = noise(10 * BLOCK).hex().encode()


@pytest.fixture(scope="module")
def zstd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with blocks that can be decompressed in part."""
    top = tmp_path_factory.mktemp("zstd") / "tree"
    top.mkdir()
    (top / "text").write_bytes(HEX)
    return mksquashfs(top.parent / "image", top, options=("-comp", "zstd"))


@needs_mksquashfs
def test_a_look_into_a_block_makes_it_in_part_and_the_next_one_whole(
    zstd: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = counting(monkeypatch)
    file = file_of(opened(zstd), "text")
    content = HEX
    for number in (9, 3, 15):
        at = number * BLOCK
        assert file.pread(4096, at + 8000) == content[at + 8000 : at + 12096]
    assert not seen, "nothing is made whole for one look"
    for number in (9, 3, 15, 9):
        at = number * BLOCK
        assert file.pread(4096, at + 100) == content[at + 100 : at + 4196]
    assert len(seen) == 3, "a second look makes it whole, and it is kept"
    assert file.pread(BLOCK, 6 * BLOCK) == content[6 * BLOCK : 7 * BLOCK]
    assert file.pread(4096, 12 * BLOCK - 4096) == content[12 * BLOCK - 4096 : 12 * BLOCK]
    assert len(seen) == 5, "the end of a block takes all of it"


@needs_mksquashfs
def test_damage_is_found_in_what_is_made_in_part(tmp_path: Path, zstd: Path, opened: Open) -> None:
    image = damage(
        zstd, tmp_path / "broken", b"\xff" * BLOCK
    )  # from one block's middle over the next's start
    whole, part = (file_of(opened(image), "text") for _ in range(2))
    bad = {number for number in range(20) if not readable(whole, BLOCK, number * BLOCK)}
    found = {number for number in range(20) if not readable(part, 4096, number * BLOCK + BLOCK // 2)}
    assert found
    assert found <= bad


def readable(file: SquashfsFile, size: int, offset: int) -> bool:
    try:
        file.pread(size, offset)
    except OSError as error:
        assert error.errno == errno.EIO
        return False
    return True


def test_blocks_with_a_checksum_are_made_whole() -> None:
    library = pytest.importorskip("zstandard")
    start = starter("zstd", BLOCK)
    assert start is not None and starter("gzip", BLOCK) is None and starter("xz", BLOCK) is None
    content = text(BLOCK)
    plain = library.ZstdCompressor().compress(content)
    summed = library.ZstdCompressor(write_checksum=True).compress(content)
    assert start(plain, 5000) == start(summed, 5000) == content[:5000]
    with pytest.raises(CodecError):
        start(summed[:-1] + bytes([summed[-1] ^ 1]), 5000)
    with pytest.raises(CodecError):
        start(b"nonsense", 5000)
    assert len(start(plain[:10], 5000)) < 5000


def test_reading_after_close_is_an_error_and_nothing_worse(images: dict[str, Path], opened: Open) -> None:
    layer = opened(images["usual"])
    file = file_of(layer, "text")
    file.pread(2 * BLOCK, 0)
    layer.close()
    layer.close()
    with pytest.raises(OSError):
        file.pread(BLOCK, 10 * BLOCK)


# --- block lists of many chunks


def test_a_block_list_over_many_metadata_blocks(tmp_path: Path, opened: Open) -> None:
    """10,000 blocks, some of them holes: the place of a block depends on all before it."""
    choose = random.Random(3)
    forge, words, expected = Forge(), [], []
    start = 96
    for number in range(10_000):
        if choose.random() < 0.6:
            words.append(0)
            expected.append(bytes(4096))
        else:
            block = struct.pack("<I", number) * 1024
            forge.block(block)
            words.append(4096 | 1 << 24)
            expected.append(block)
    file = forge.large_file(10_000 * 4096, start, struct.pack("<10000I", *words))
    image = tmp_path / "image"
    image.write_bytes(forge.finish(forge.directory([Entry(b"file", file)])))
    layer = opened(image)
    for order in (range(9_999, 0, -777), range(0, 10_000, 501), choose.sample(range(10_000), 50)):
        data = file_of(layer, "file")
        for number in order:
            assert data.pread(4096, number * 4096) == expected[number], number
    target = MemoryFile()
    file_of(layer, "file").copy_to(target)
    assert bytes(target.content) == b"".join(expected)
    found = list(file_of(layer, "file").segments(1 << 60))
    assert sum(stop - start for start, stop in found) == 4096 * sum(1 for word in words if word)
