"""ISO 9660 images as lowers: content is shown correctly, or refused with its name."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from cowfs.errors import LayerError
from cowfs.formats.archive import Inode
from cowfs.layers.iso9660 import Iso9660Layer
from cowfs.store.format.identity import identify_lower
from tests.fuzz.targets import iso9660 as by_hand
from tests.support.system import run

pytestmark = pytest.mark.skipif(shutil.which("xorriso") is None, reason="needs xorriso")


_MOVED = ("deep directories are moved, and hard links kept",)


def made(image: Path, top: Path, *options: str) -> Path:
    if options == _MOVED:
        how = ("-compliance", "deep_paths_off", "-hardlinks", "on", "-outdev", image)
        run("xorriso", *how, "-rr_reloc_dir", "rr_moved", "-map", top, "/", "-commit")
    else:
        run("xorriso", "-as", "mkisofs", "-quiet", *options, "-o", image, top)
    return image


def find(layer: Iso9660Layer, path: bytes) -> Inode:
    key = layer.root
    for name in path.split(b"/"):
        found = layer.lookup(key, name)
        assert found is not None, path
        key = found[0]
    return key


def read(layer: Iso9660Layer, path: bytes) -> bytes:
    return layer.open(find(layer, path), os.O_RDONLY).pread(1 << 30, 0)


@pytest.fixture
def top(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    (top / "1/2/3/4/5/6/7/8/9/10").mkdir(parents=True)  # deeper than ISO 9660 allows: relocated
    (top / "1/2/3/4/5/6/7/8/9/10/deep").write_text("deep")
    (top / ("n" * 230)).write_bytes(b"long name" * 1000)
    (top / os.fsdecode("ü €".encode())).write_text("x")
    (top / "dir").mkdir(mode=0o750)
    for number in range(200):  # more than a sector of names
        (top / f"dir/file {number}").write_text(str(number))
    (top / "alias").hardlink_to(top / "1/2/3/4/5/6/7/8/9/10/deep")
    (top / "nothing").touch()
    os.chmod(top / "nothing", 0o4711)
    (top / "link").symlink_to("/a/../b/./" + "x" * 230 + "/" + "y" * 200)
    os.mkfifo(top / "pipe")
    os.utime(top / "nothing", ns=(1, 1_700_000_001_000_000_000))
    return top


@pytest.mark.parametrize("options", [("-R",), ("-R", "-J"), _MOVED])
def test_rock_ridge_shows_a_tree_as_it_was(tmp_path: Path, top: Path, options: tuple[str, ...]) -> None:
    with closing(Iso9660Layer(str(made(tmp_path / "x.iso", top, *options)))) as layer:
        seen = 0
        for path in sorted(top.rglob("*")):
            name, there = os.fsencode(path.relative_to(top)), path.lstat()
            inode = find(layer, name)
            attr = layer.stat(inode)
            assert (attr.st_mode, attr.st_uid, attr.st_gid) == (there.st_mode, there.st_uid, there.st_gid)
            assert attr.st_mtime_ns // 1_000_000_000 == int(there.st_mtime)
            if path.is_symlink():
                assert layer.readlink(inode) == os.fsencode(os.readlink(path))
            elif path.is_file():
                assert attr.st_size == there.st_size and read(layer, name) == path.read_bytes()
            elif path.is_dir():
                assert attr.st_nlink == there.st_nlink
            seen += 1
        assert seen == 218
        alias, deep = find(layer, b"alias"), find(layer, b"1/2/3/4/5/6/7/8/9/10/deep")
        assert (alias is deep, alias.nlink) == ((True, 2) if options == _MOVED else (False, 1))


def test_without_rock_ridge_names_are_joliets_or_plain(tmp_path: Path) -> None:
    (tmp_path / "tree/Dir").mkdir(parents=True)
    (tmp_path / "tree/Dir/Some File.txt").write_text("text")
    image = made(tmp_path / "x.iso", tmp_path / "tree", "-J")
    data = image.read_bytes().replace(b"SP\7\1\xbe\xef", b"XX\7\1\xbe\xef")  # the start of Rock Ridge
    image.write_bytes(data)
    with closing(Iso9660Layer(str(image))) as layer:
        assert read(layer, b"Dir/Some File.txt") == b"text"
        assert layer.stat(find(layer, b"Dir")).st_mode == stat.S_IFDIR | 0o755
    image.write_bytes(data.replace(b"%/E", b"   "))
    with closing(Iso9660Layer(str(image))) as layer:
        assert read(layer, b"dir/some_fil.txt") == b"text"
        assert layer.stat(find(layer, b"dir/some_fil.txt")).st_mode == stat.S_IFREG | 0o644


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    here = tmp_path_factory.mktemp("small")
    (here / "tree/directory").mkdir(parents=True)
    (here / "tree/file").write_bytes(b"data of the file" * 1000)
    return made(here / "x.iso", here / "tree", "-R").read_bytes()


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        assert old in data
        return data.replace(old, new)

    return change


def looped(data: bytes) -> bytes:
    """The directory leads to the root, whose place and size are in one place of the records."""
    root, at = data[0x8000 + 156 :][2:18], data.index(b"DIRECTOR") - 33
    return data[: at + 2] + root + data[at + 18 :]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda data: data[:0x9000], "truncated: it has 36864 bytes"),
        (lambda data: data[: data.index(b"data of the file")], "truncated: it "),
        (replaced(b"NM\x0e\1\0directory", b"NM\x0e\1\0dire/tory"), "which no file can have here"),
        (replaced(b"NM\x0e\1\0directory", b"NM\x0e\1\0" + bytes(9)), "which no file can have here"),
        (looped, "is in it twice"),
        (replaced(b"NM\x0e\1\0directory", b"ZF\x0e\1pz\4\x0f\0\0\0\0\0\0"), r"compressed \(zisofs\)"),
        (lambda data: data[:0x8080] + b"\0\7" + data[0x8082:], "blocks of 1792 bytes"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    tmp_path: Path, small: bytes, change: Callable[[bytes], bytes], why: str
) -> None:
    image = tmp_path / "x.iso"
    image.write_bytes(change(small))
    for opened in (identify_lower, Iso9660Layer):
        with pytest.raises(LayerError, match=why):
            opened(str(image))


def test_a_part_that_every_record_has_is_read_no_oftener_than_there_are_bytes(tmp_path: Path) -> None:
    """This image of some megabytes took hours, because all its records used the same four megabytes."""
    goes_on = by_hand.field(b"CE", by_hand.both(20) + by_hand.both(0) + by_hand.both(10_000))
    records = [by_hand.record(b"%d" % number, 0, 0, 0, goes_on) for number in range(20)]
    top = by_hand.directory(19, 19, *records, use=by_hand.field(b"SP", b"\xbe\xef\0"))
    volumes = by_hand.volume(1, 19) + by_hand.volume(255, 0) + bytes(by_hand.SECTOR)
    image = tmp_path / "x.iso"
    image.write_bytes(by_hand.BEFORE + volumes + top + bytes(10_000))
    with pytest.raises(LayerError, match="too many continuation areas"):
        Iso9660Layer(str(image))


def test_a_file_of_very_many_pieces() -> None:
    """Reading it, and its size, do not depend on unrelated data in the image."""
    inode = Inode(2, stat.S_IFREG, segments=[(at, 1, at) for at in range(0, 2_000_000, 2)])
    assert list(inode.stored(1_000_001, 1_000_005)) == [(1_000_002, 1, 1_000_002), (1_000_004, 1, 1_000_004)]
    assert list(inode.stored(1_999_998, 1 << 40)) == [(1_999_998, 1, 1_999_998)]
    assert list(inode.stored(0, 1)) == [(0, 1, 0)] and not list(inode.stored(1_999_999, 1 << 40))
    begun = time.process_time()
    for _ in range(1000):
        assert inode.bytes_stored() == 1_000_000
        assert len(list(inode.stored(1_000_000, 1_000_100))) == 50
    assert time.process_time() - begun < 10, "it goes through all of them"
