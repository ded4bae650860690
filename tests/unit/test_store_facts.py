"""Facts about stores, without opening one: sizes, foreign files, superblocks, headers, identities."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowfs.errors import LayerError, StoreError, UsageError, WrongLower
from cowfs.linux import files, filesystems
from cowfs.store.format import header, sizes
from cowfs.store.format.identity import identify_lower
from cowfs.store.format.sniff import what_is
from cowfs.store.format.superblock import Superblock, read_superblock
from cowfs.types import Identity
from tests.support.system import run

# --- sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("256", 256 << 20),
        ("256M", 256 << 20),
        ("256m", 256 << 20),
        ("256MiB", 256 << 20),
        ("256MiB", 256 << 20),
        ("2G", 2 << 30),
        ("1T", 1 << 40),
        ("65536K", 64 << 20),
        ("5K", 4096),
        ("1K", 4096),
        ("0", 0),
        ("8388607T", 8388607 << 40),
        (" 16 ", 16 << 20),
        ("1.5G", 3 << 29),
        ("0.25MiB", 1 << 18),
    ],
)
def test_a_size_is_megabytes_unless_it_says_otherwise(text: str, size: int) -> None:
    assert sizes.parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "M",
        "--1",
        "1.5.5G",
        "1.",
        ".5G",
        "1,5G",
        "12 34",
        "64X",
        "0x10",
        "1e3",
        "ten",
        "9" * 5000,
        "\u0661",
    ],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        sizes.parse_size(text)


def test_a_size_that_no_file_can_have_is_refused() -> None:
    with pytest.raises(UsageError, match="'8388608T' is too large for a file"):
        sizes.parse_size("8388608T")


def test_sizes_are_written_for_people() -> None:
    assert [sizes.format_size(n) for n in (12, 512 << 10, 64 << 20, 2 << 30, 3 << 29, 1 << 40)] == [
        "12 bytes",
        "512 KiB",
        "64 MiB",
        "2 GiB",
        "1.5 GiB",
        "1 TiB",
    ]


def test_room_is_looked_for_before_anything_is_written(tmp_path: Path) -> None:
    sizes.check_room("s", str(tmp_path), 1 << 20)
    with pytest.raises(StoreError, match="are free"):
        sizes.check_room("s", str(tmp_path), 1 << 60)
    sizes.check_room("s", str(tmp_path), 1 << 60, allocated=(1 << 60) - 4096)


def test_fat_holds_no_file_of_4_gib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "fs_magic", lambda fd: filesystems.FAT)
    monkeypatch.setattr(os, "fstatvfs", lambda fd: os.statvfs_result((4096, 4096) + (1 << 40,) * 8))
    sizes.check_room("s", str(tmp_path), 4095 << 20)
    with pytest.raises(StoreError, match="FAT"):
        sizes.check_room("s", str(tmp_path), 4096 << 20)


# --- what a file is


def _iso(path: Path) -> None:
    path.write_bytes(bytes(32_769) + b"CD001" + bytes(9000))


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "y")


def _fat(path: Path) -> None:
    path.write_bytes(b"\xeb\x3c\x90mkfs.fat".ljust(54, b"\0") + b"FAT16   ".ljust(456, b"\0") + b"\x55\xaa")


def _btrfs(path: Path) -> None:
    path.write_bytes(bytes(65_600) + b"_BHRfS_M" + bytes(4096))


FOREIGN: list[tuple[str, Callable[[Path], object]]] = [
    ("an empty file", lambda path: path.touch()),
    ("a text file", lambda path: path.write_text("söme text\n" * 9000)),
    ("a text file", lambda path: path.write_text("x" + "ö" * 90_000)),
    ("a file that begins with zeros", lambda path: path.write_bytes(bytes(100_000))),
    ("a file of unknown kind", lambda path: path.write_bytes(bytes(range(256)) * 400)),
    ("an ELF program", lambda path: path.write_bytes(Path("/bin/ls").read_bytes())),
    ("a script", lambda path: path.write_text("#!/bin/sh\nexit\n")),
    ("gzip-compressed data", lambda path: path.write_bytes(gzip.compress(b"x"))),
    ("a zip archive", _zip),
    ("an ISO 9660 image", _iso),
    ("a FAT filesystem", _fat),
    ("a btrfs filesystem", _btrfs),
    ("an XFS filesystem", lambda path: path.write_bytes(b"XFSB".ljust(8192, b"\0"))),
    ("a LUKS encrypted volume", lambda path: path.write_bytes(b"LUKS\xba\xbe".ljust(8192, b"\0"))),
    ("a big-endian squashfs image", lambda path: path.write_bytes(b"sqsh".ljust(8192, b"\0"))),
]


@pytest.mark.parametrize(("name", "make"), FOREIGN, ids=[name for name, _ in FOREIGN])
def test_a_foreign_file_is_named(tmp_path: Path, name: str, make: Callable[[Path], object]) -> None:
    path = tmp_path / "foreign"
    make(path)
    with path.open("rb") as file:
        assert what_is(file.fileno()) == name
        with pytest.raises(StoreError, match=f"not a store but {name}"):
            read_superblock(file.fileno(), str(path))
    if name == "a zip archive":
        assert identify_lower(str(path)).kind == "zip"
        return
    said = "squashfs version" if "big-endian" in name else "not a squashfs image"
    said = "damaged ISO 9660 image" if "ISO" in name else said
    if name in {"a text file", "a script", "an empty file"}:
        said = f"not a squashfs image but {name}"
    with pytest.raises(LayerError, match=said):
        identify_lower(str(path))


# --- superblocks


def _mke2fs(path: Path, *options: str, size: str = "16M") -> Path:
    run("mke2fs", "-q", "-F", *options, path, size)
    return path


def _superblock(path: Path) -> Superblock:
    with path.open("rb") as file:
        return read_superblock(file.fileno(), str(path))


@pytest.mark.parametrize("block", ["1024", "2048", "4096"])
def test_ext3_is_a_store(tmp_path: Path, block: str) -> None:
    found = _superblock(_mke2fs(tmp_path / "i", "-t", "ext3", "-b", block))
    assert (found.size, found.block_size, found.state) == (16 << 20, int(block), "clean")
    assert 0 < found.free_blocks < found.blocks


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-t", "ext2"], "ext2 filesystem.*no journal.*tune2fs -j"),
        (
            ["-t", "ext4", "-O", "^orphan_file,^metadata_csum_seed"],  # which newer mke2fs(8) sets by itself
            r"ext4 filesystem \(extents, 64bit, flex_bg, huge_file, .*metadata_csum",
        ),
        (["-t", "ext3", "-O", "extents"], r"ext4 filesystem \(extents\)"),
        (["-t", "ext3", "-O", "orphan_file"], r"ext4 filesystem \(orphan_file\)"),
        (["-t", "ext3", "-O", "bigalloc,extents"], r"ext4 filesystem \(extents, bigalloc\)"),
        (["-O", "journal_dev"], "external ext3 journal"),
    ],
)
def test_other_ext_filesystems_are_refused_by_name(tmp_path: Path, options: list[str], said: str) -> None:
    with pytest.raises(StoreError) as caught:
        _superblock(_mke2fs(tmp_path / "i", *options))
    assert re.search(said, str(caught.value))


def test_a_feature_of_the_future_is_refused(tmp_path: Path) -> None:
    path = _mke2fs(tmp_path / "i", "-t", "ext3")
    _patch(path, 1024 + 96, struct.pack("<I", 0x2 | 0x4000_0000))
    with pytest.raises(StoreError, match="unknown feature 0x40000000"):
        _superblock(path)


def _patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_truncated_image_is_refused(tmp_path: Path) -> None:
    path = _mke2fs(tmp_path / "i", "-t", "ext3")
    os.truncate(path, (16 << 20) - 4096)
    with pytest.raises(StoreError, match=r"truncated: it has only 16.0 MiB of 16 MiB"):
        _superblock(path)


def test_an_image_below_16_mb_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="12 MiB is too small"):
        _superblock(_mke2fs(tmp_path / "i", "-t", "ext3", size="12M"))


@given(offset=st.integers(0, 1023), value=st.integers(0, 255))
def test_a_damaged_superblock_never_does_worse_than_a_store_error(
    tmp_path_factory: pytest.TempPathFactory, offset: int, value: int
) -> None:
    path = _cached_image(tmp_path_factory)
    with path.open("r+b") as file:
        before = os.pread(file.fileno(), 1024, 1024)
        os.pwrite(file.fileno(), bytes([value]), 1024 + offset)
        try:
            assert read_superblock(file.fileno(), str(path)).size <= 16 << 20
        except StoreError:
            pass
        finally:
            os.pwrite(file.fileno(), before, 1024)


_images: list[Path] = []


def _cached_image(factory: pytest.TempPathFactory) -> Path:
    if not _images or not _images[0].exists():
        _images[:] = [_mke2fs(factory.mktemp("superblock") / "i", "-t", "ext3")]
    return _images[0]


# --- headers

LOWERS = (
    Identity("squashfs", "ab" * 32, "squashfs, 61 MiB, 59012 inodes", "/live/root", 4096),
    Identity("directory", "cd" * 32, "directory on ext4, inode 2", "/base"),
)


def test_a_header_is_read_as_it_was_written() -> None:
    made = header.bound(header.new_header(xattrs=header.USER, adopted=True), LOWERS)
    assert header.from_json(header.to_json(made), "s") == made


def test_unknown_fields_of_the_same_version_are_kept() -> None:
    content = json.loads(header.to_json(header.new_header())) | {"label": "mine"}
    read = header.from_json(json.dumps(content).encode(), "s")
    assert json.loads(header.to_json(read)) == content


def test_a_newer_version_is_refused_saying_so() -> None:
    content = json.loads(header.to_json(header.new_header())) | {"version": 3, "created_by": "cowfs 9"}
    with pytest.raises(
        StoreError, match=r"format version 3; this cowfs supports versions up to 2 .created by cowfs 9"
    ):
        header.from_json(json.dumps(content).encode(), "s")


def test_another_whiteout_format_is_refused() -> None:
    content = json.loads(header.to_json(header.new_header())) | {"whiteouts": "unionfs"}
    with pytest.raises(StoreError, match="unionfs format"):
        header.from_json(json.dumps(content).encode(), "s")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(field=st.sampled_from(["version", "xattrs", "uuid", "lowers", "created"]), value=json_values)
def test_a_header_with_a_wrong_field_is_damaged_or_harmless(field: str, value: object) -> None:
    content = json.loads(header.to_json(header.bound(header.new_header(), LOWERS))) | {field: value}
    try:
        header.from_json(json.dumps(content).encode(), "s")
    except StoreError as error:
        assert "damaged" in error.message or "format" in error.message


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xfe", b"[1]", b"{}", b"null", b"[" * 100_000, b'{"version":"1"}']
)
def test_rubbish_is_a_damaged_header(data: bytes) -> None:
    with pytest.raises(StoreError, match="damaged"):
        header.from_json(data, "s")


@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a": ', "}")])
def test_what_can_be_read_of_a_header_can_be_written(opening: str, closing: str) -> None:
    """From some depth on, Python can read JSON but not write it; the depth depends on version and caller."""
    start = header.to_json(header.new_header()).decode().rstrip("\n}")
    for depth in (1, 3, *range(850, 1000), 1500, 3000, 9000):
        data = f'{start}, "more": {opening * depth}1{closing * depth}}}'.encode()
        try:
            read = header.from_json(data, "s")
        except StoreError as error:
            assert "damaged" in error.message and depth > 10
        else:
            assert json.loads(header.to_json(read)) == json.loads(data)


def test_a_store_knows_its_lowers() -> None:
    made = header.bound(header.new_header(), LOWERS)
    moved = tuple(Identity(low.kind, low.fingerprint, low.description, "/elsewhere") for low in LOWERS)
    header.check_lowers(made, LOWERS, "s")
    header.check_lowers(made, moved, "s")
    header.check_lowers(made, (), "s")
    header.check_lowers(header.new_header(), LOWERS, "s")
    for wrong in (LOWERS[:1], LOWERS[::-1]):
        with pytest.raises(
            WrongLower, match=r"belongs to /live/root \(squashfs, 61 MiB.*not to.*--force-lower"
        ):
            header.check_lowers(made, wrong, "s")


# --- identities


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "dir").mkdir(parents=True)
    (root / "dir" / "file").write_bytes(b"content" * 1000)
    return root


def _squash(tree: Path, image: Path) -> Path:
    run("mksquashfs", tree, image, "-quiet", "-no-progress", "-noappend", "-mkfs-time", "1000000000")
    return image


def test_a_squashfs_image_is_recognised_by_its_content(tree: Path, tmp_path: Path) -> None:
    image = _squash(tree, tmp_path / "one.sqfs")
    found = identify_lower(str(image))
    assert (found.kind, found.path) == ("squashfs", str(image))
    assert "3 inodes, made 2001-09-09 01:46:40 UTC" in found.description
    copy = tmp_path / "two.sqfs"
    copy.write_bytes(image.read_bytes() + bytes(4096))
    assert identify_lower(str(copy)).fingerprint == found.fingerprint, "padding and name are no identity"
    (tree / "dir" / "file").rename(tree / "dir" / "fill")
    other = identify_lower(str(_squash(tree, tmp_path / "three.sqfs")))
    assert other.fingerprint != found.fingerprint


def test_a_squashfs_image_that_is_not_whole_is_refused(tree: Path, tmp_path: Path) -> None:
    image = _squash(tree, tmp_path / "one.sqfs")
    whole = image.read_bytes()
    used = struct.unpack_from("<Q", whole, 40)[0]
    for end, said in ((used - 1, f"truncated squashfs image: {used - 1} of {used} bytes"), (60, "truncated")):
        image.write_bytes(whole[:end])
        with pytest.raises(LayerError, match=said):
            identify_lower(str(image))
    image.write_bytes(whole[:28] + struct.pack("<HH", 3, 2) + whole[32:])
    with pytest.raises(LayerError, match=r"squashfs version 3.2 is not supported"):
        identify_lower(str(image))
    image.write_bytes(whole[:64] + struct.pack("<Q", 1 << 40) + whole[72:])
    with pytest.raises(LayerError, match="damaged squashfs superblock"):
        identify_lower(str(image))


def test_what_cannot_be_a_lower_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LayerError, match="no such lower"):
        identify_lower(str(tmp_path / "missing"))
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(LayerError, match="neither a squashfs image nor a directory"):
        identify_lower(str(tmp_path / "fifo"))
    with pytest.raises(LayerError, match="cannot be opened"):
        identify_lower("/dev/null/x")


def test_a_directory_is_recognised_by_its_place(tree: Path) -> None:
    found = identify_lower(str(tree))
    assert found.kind == "directory"
    (tree / "new").touch()
    moved = tree.rename(tree.with_name("moved"))
    assert identify_lower(str(moved)).fingerprint == found.fingerprint
    assert identify_lower(str(moved / "dir")).fingerprint != found.fingerprint
    assert identify_lower("/proc/sys").fingerprint != identify_lower("/proc").fingerprint


def test_a_directory_that_was_made_anew_is_another(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    magic = files.fs_magic(fd)
    os.close(fd)
    if magic != 0xEF53:
        pytest.skip("needs ext4 below the temporary directory: it gives inode numbers out again")
    seen = set()
    for _ in range(3):
        path = tmp_path / "again"
        path.mkdir()
        seen.add(identify_lower(str(path)).fingerprint)
        path.rmdir()
    assert len(seen) == 3


def test_errno_of_an_unreadable_lower_is_told(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> os.statvfs_result:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fstatvfs", fail)
    with pytest.raises(LayerError, match="cannot be read: Input/output error"):
        identify_lower(str(tree))
