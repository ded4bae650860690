"""Images of every kind, compared with the tree they were made from. No root needed."""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cowfs.errors import LayerError
from cowfs.formats.squashfs.find import find_image
from cowfs.layers.squashfs import SquashfsLayer
from cowfs.types import FileHandle
from tests.support.listing import find
from tests.support.squashfs import (
    BLOCK,
    devices,
    mksquashfs,
    needs_mksquashfs,
    needs_tar2sqfs,
    sample_tree,
    tar2sqfs,
    text,
    view,
)
from tests.support.system import run

pytestmark = needs_mksquashfs


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_tree(tmp_path_factory.mktemp("squashfs") / "tree")


@pytest.fixture(scope="module")
def image(tree: Path) -> Path:
    return mksquashfs(tree.parent / "image.sqfs", tree, options=devices())


@pytest.fixture
def opened() -> Iterator[Callable[..., SquashfsLayer]]:
    layers: list[SquashfsLayer] = []

    def call(path: Path | str, *, offset: int = 0) -> SquashfsLayer:
        layers.append(SquashfsLayer(os.fspath(path), offset=offset))
        return layers[-1]

    yield call
    for layer in layers:
        layer.close()


Open = Callable[..., SquashfsLayer]


def read(layer: SquashfsLayer, *names: bytes) -> bytes:
    key = find(layer, *names)
    return layer.open(key, os.O_RDONLY).pread(layer.stat(key).st_size, 0)


def assert_same_tree(layer: SquashfsLayer, top: Path, *, xattrs: bool = True) -> None:
    """Fail unless the layer shows the directory *top*."""
    for path, seen in view(layer):
        real = os.fsencode(top) + path
        status = os.lstat(real)
        assert seen["st_mode"] == status.st_mode, path
        assert (seen["st_uid"], seen["st_gid"]) == (status.st_uid, status.st_gid), path
        if path:
            assert seen["st_mtime_ns"] // 10**9 == int(status.st_mtime), path
        if stat.S_ISREG(status.st_mode):
            content = Path(os.fsdecode(real)).read_bytes()
            assert read(layer, *path.split(b"/")[1:]) == content, path
            assert (seen["st_nlink"], seen["st_size"]) == (status.st_nlink, len(content)), path
        elif stat.S_ISLNK(status.st_mode):
            assert seen["target"] == os.readlink(real), path
        elif stat.S_ISDIR(status.st_mode):
            assert seen["names"] == sorted(os.listdir(real)), path
        if xattrs:
            names = os.listxattr(real, follow_symlinks=False)
            assert seen["xattrs"] == {
                name.encode(): os.getxattr(real, name, follow_symlinks=False) for name in names
            }, path


@pytest.mark.parametrize("compressor", ["gzip", "lzma", "lzo", "lz4", "xz", "zstd"])
@pytest.mark.parametrize("block", ["4K", "128K"])
def test_every_compressor(tree: Path, tmp_path: Path, opened: Open, compressor: str, block: str) -> None:
    image = mksquashfs(tmp_path / "image.sqfs", tree, options=("-comp", compressor, "-b", block))
    assert_same_tree(opened(image), tree)


OPTIONS = {
    "uncompressed": ("-noI", "-noD", "-noF", "-noX", "-noId"),
    "no fragments": ("-no-fragments",),
    "tails in fragments": ("-tailends",),
    "everything in fragments": ("-always-use-fragments", "-b", "1M"),
    "no export table": ("-no-exports",),
    "no duplicates": ("-no-duplicates",),
    "not padded": ("-nopad",),
    "small window": ("-Xwindow-size", "8"),
    "BCJ filters": ("-comp", "xz", "-Xbcj", "x86,arm,powerpc"),
    "high compression": ("-comp", "lz4", "-Xhc"),
    "no holes": ("-no-sparse",),
}


@pytest.mark.parametrize("which", OPTIONS)
def test_options_of_mksquashfs(tree: Path, tmp_path: Path, opened: Open, which: str) -> None:
    image = mksquashfs(tmp_path / "image.sqfs", tree, options=OPTIONS[which])
    assert_same_tree(opened(image), tree)


def test_an_image_without_attributes(tree: Path, tmp_path: Path, opened: Open) -> None:
    layer = opened(mksquashfs(tmp_path / "image.sqfs", tree, options=("-no-xattrs",)))
    assert_same_tree(layer, tree, xattrs=False)
    key = find(layer, b"small")
    assert layer.listxattr(key) == []
    for name, code in ((b"user.one", errno.ENODATA), (b"odd.one", errno.EOPNOTSUPP)):
        with pytest.raises(OSError) as caught:
            layer.getxattr(key, name)
        assert caught.value.errno == code


@needs_tar2sqfs
@pytest.mark.parametrize("options", [(), ("-c", "zstd"), ("-e", "-b", "4096"), ("-T",)])
def test_tar2sqfs(tree: Path, tmp_path: Path, opened: Open, options: tuple[str, ...]) -> None:
    assert_same_tree(opened(tar2sqfs(tmp_path / "image.sqfs", tree, *options)), tree, xattrs=False)


@needs_tar2sqfs
def test_gensquashfs(tree: Path, tmp_path: Path, opened: Open) -> None:
    run("gensquashfs", "-q", "-k", "-D", tree, "-o", "-c", "xz", tmp_path / "image.sqfs")
    assert read(opened(tmp_path / "image.sqfs"), b"several") == (tree / "several").read_bytes()


def test_an_image_that_was_appended_to(tree: Path, tmp_path: Path, opened: Open) -> None:
    image = mksquashfs(tmp_path / "image.sqfs", tree)
    more = tmp_path / "more"
    more.mkdir()
    (more / "news").write_bytes(text(300_000))
    run("mksquashfs", more, image, "-quiet", "-no-progress", "-keep-as-directory")
    layer = opened(image)
    assert read(layer, b"more", b"news") == text(300_000)
    assert read(layer, b"dir", b"deep", b"deeper", b"deepest", b"file") == b"down here"


def test_special_files(image: Path, opened: Open) -> None:
    layer = opened(image)

    def status(name: bytes) -> tuple[int, int, int, int]:
        attr = layer.stat(find(layer, b"dev", name))
        return attr.st_mode, attr.st_uid, attr.st_gid, attr.st_rdev

    assert status(b"null") == (stat.S_IFCHR | 0o666, 0, 0, os.makedev(1, 3))
    assert status(b"disk") == (stat.S_IFBLK | 0o660, 0, 6, os.makedev(8, 17))
    assert status(b"large") == (stat.S_IFCHR | 0o600, 1000, 1000, os.makedev(300, 70000))
    assert status(b"socket") == (stat.S_IFSOCK | 0o600, 5, 6, 0)
    assert status(b"pipe") == (stat.S_IFIFO | 0o600, 5, 6, 0)


def test_hard_links_are_one_key(image: Path, opened: Open) -> None:
    layer = opened(image)
    keys = {
        find(layer, b"tail"),
        find(layer, b"dir", b"tail-again"),
        find(layer, b"dir", b"tail-third"),
    }
    assert len(keys) == 1
    assert layer.stat(keys.pop()).st_nlink == 3


def test_an_image_at_an_offset(image: Path, tree: Path, tmp_path: Path, opened: Open) -> None:
    shifted = tmp_path / "program"
    shifted.write_bytes(b"#!/bin/sh\n".ljust(12345, b"\n") + image.read_bytes())
    layer = opened(shifted, offset=12345)
    assert read(layer, b"noise") == (tree / "noise").read_bytes()
    assert "12345" in layer.name
    with pytest.raises(LayerError, match="not a squashfs image but a script"):
        opened(shifted)
    with pytest.raises(LayerError, match=r"offset .* is beyond its end"):
        opened(shifted, offset=1 << 40)


# --- directories

COUNT = 20_000


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of 20,000 entries, whose listing is long enough for an index."""
    base = tmp_path_factory.mktemp("large")
    top = base / "tree" / "large"
    top.mkdir(parents=True)
    (top / "first").write_bytes(b"")
    for number in range(COUNT):
        os.link(top / "first", top / f"some-name-{number * 3:08}")
    return mksquashfs(base / "image.sqfs", base / "tree")


def test_names_in_a_large_directory(large: Path, opened: Open) -> None:
    layer = opened(large)
    directory = find(layer, b"large")
    first = find(layer, b"large", b"first")
    for _ in range(2):  # first with the index, then with the listing
        for number in (0, 1, 2, COUNT // 2, COUNT - 2, COUNT - 1, *range(7, COUNT, 997)):
            found = layer.lookup(directory, b"some-name-%08d" % (number * 3))
            assert found is not None, number
            assert found[0] == first
            for missing in (b"some-name-%08d" % (number * 3 + 1), b"", b"a", b"zzz", b"some-name-"):
                assert layer.lookup(directory, missing) is None
        names = [entry.name for entry in layer.readdir(directory)]
        assert len(names) == COUNT + 1
        assert names == sorted(names)


def test_a_directory_that_is_only_ever_searched(
    large: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cowfs.formats.squashfs.image._INDEX_TO", 1000)
    layer = opened(large)
    directory = find(layer, b"large")
    for number in range(0, COUNT, 400):
        assert layer.lookup(directory, b"some-name-%08d" % (number * 3)) is not None
        assert layer.lookup(directory, b"some-name-%08d" % (number * 3 + 2)) is None
    assert layer.lookup(directory, b"zzz") is None


def test_names_in_order_are_searched_without_reading_the_index_for_each(
    large: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cowfs.formats.squashfs.image._INDEX_TO", 1000)
    layer = opened(large)
    directory, asked = find(layer, b"large"), 1000
    before = sum(layer.caches()["squashfs metadata"])
    for number in range(asked):
        assert layer.lookup(directory, b"some-name-%08d" % (number * 3)) is not None
    assert sum(layer.caches()["squashfs metadata"]) - before < 3 * asked


def test_what_is_no_directory_and_what_is_no_file(image: Path, opened: Open) -> None:
    layer = opened(image)
    file, link, directory = (find(layer, name) for name in (b"small", b"link", b"dir"))
    fifo = find(layer, b"dev", b"pipe")
    for call, code in (
        (lambda: layer.lookup(file, b"x"), errno.ENOTDIR),
        (lambda: layer.readdir(link), errno.ENOTDIR),
        (lambda: layer.readlink(file), errno.EINVAL),
        (lambda: layer.open(directory, os.O_RDONLY), errno.EISDIR),
        (lambda: layer.open(fifo, os.O_RDONLY), errno.EINVAL),
        (lambda: layer.open(file, os.O_RDWR), errno.EROFS),
        (lambda: layer.open(file, os.O_WRONLY | os.O_TRUNC), errno.EROFS),
        (lambda: layer.open(file, os.O_RDONLY).pwrite(b"x", 0), errno.EBADF),
        (lambda: layer.open(file, os.O_RDONLY).truncate(0), errno.EBADF),
        (lambda: layer.getxattr(file, b"user.no-such"), errno.ENODATA),
        (lambda: layer.getxattr(directory, b"no-namespace"), errno.EOPNOTSUPP),
    ):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == code


# --- facts about a layer


def test_statfs(image: Path, opened: Open) -> None:
    stats = opened(image).statfs()
    used = struct.unpack_from("<Q", image.read_bytes(), 40)[0]
    assert (stats.bsize, stats.blocks, stats.bfree) == (BLOCK, -(-used // BLOCK), 0)
    assert stats.files == len(list(view(opened(image)))) - 2  # "tail" has two more names


def test_handles_lead_back_to_inode_numbers(image: Path, opened: Open) -> None:
    layer = opened(image)
    key = find(layer, b"small")
    handle = layer.handle(key)
    assert handle is not None
    assert handle._replace(place=b"") == FileHandle(
        1, struct.pack("<II", layer.stat(key).st_ino, 0), bytes(16)
    )
    assert layer.handle_ino(handle) == layer.stat(key).st_ino
    last = layer.statfs().files
    assert layer.handle_ino(FileHandle(1, struct.pack("<II", last, 0))) == last
    for foreign in (
        FileHandle(2, handle.data),
        FileHandle(1, handle.data + b"\0"),
        FileHandle(1, handle.data, b"x" * 16),
        FileHandle(1, struct.pack("<II", 1, 1)),
        FileHandle(1, struct.pack("<II", 0, 0)),
        FileHandle(1, struct.pack("<II", last + 1, 0)),
        FileHandle(1, struct.pack("<II", 1 << 31, 0)),
    ):
        assert layer.handle_ino(foreign) is None
    layer.uuid = b"y" * 16  # handles of earlier mounts have none
    for given in (bytes(16), layer.uuid):
        assert layer.handle_ino(handle._replace(uuid=given)) == layer.stat(key).st_ino


def test_identity_is_of_the_tree_and_not_of_the_file(
    image: Path, tree: Path, tmp_path: Path, opened: Open
) -> None:
    copy = tmp_path / "copy"
    copy.write_bytes(bytes(512) + image.read_bytes() + b"padding")
    one, two = opened(image).identity(), opened(copy, offset=512).identity()
    assert one.fingerprint == two.fingerprint
    assert one.kind == "squashfs"
    other = mksquashfs(tmp_path / "other", tree / "dir")
    assert opened(other).identity().fingerprint != one.fingerprint


def test_layers_are_devices_of_their_own(image: Path, opened: Open) -> None:
    one, two = opened(image), opened(image)
    assert one.dev != two.dev
    assert one.stat(one.root).st_dev == one.dev


SHOWN = {
    # what we call it: how unsquashfs begins the line
    "compression": "Compression ",
    "level": "\tcompression-level ",
    "window size": "\twindow-size ",
    "strategies": "\tStrategies selected: ",
    "dictionary": "\tDictionary size ",
    "filters": "\tFilters selected: ",
    "algorithm": "\talgorithm ",
    "block size": "Block size ",
    "inodes": "Number of inodes ",
    "owners": "Number of ids ",
    "fragments": "Number of fragments ",
    "attribute sets": "Number of xattr ids ",
}


@pytest.mark.parametrize(
    "options",
    [
        ("-comp", "gzip", "-Xcompression-level", "7", "-Xwindow-size", "9", "-Xstrategy", "filtered,fixed"),
        ("-comp", "xz", "-Xbcj", "x86,arm,sparc", "-Xdict-size", "50%"),
        ("-comp", "zstd", "-Xcompression-level", "3"),
        ("-comp", "lzo", "-Xalgorithm", "lzo1x_1"),
        ("-comp", "lzo", "-Xcompression-level", "5"),
        ("-comp", "lz4", "-Xhc", "-b", "64K"),
    ],
)
def test_summary_says_what_unsquashfs_says(
    tree: Path, tmp_path: Path, opened: Open, options: tuple[str, ...]
) -> None:
    image = mksquashfs(tmp_path / "image.sqfs", tree, options=options)
    ours = dict(opened(image).summary())
    theirs = run("unsquashfs", "-s", image).stdout.splitlines()
    compared = 0
    for what, begin in SHOWN.items():
        line = next((line for line in theirs if line.startswith(begin)), None)
        if line is not None:
            assert ours[what].removesuffix(" bytes") == line.removeprefix(begin)
            compared += 1
    assert compared >= 6
    assert ours["size"].split()[0] in " ".join(theirs)
    assert ours["uncompressed"] == "nothing"
    if "-Xhc" in options:
        assert ours["high compression"] == "yes"


def test_summary_of_an_uncompressed_image_without_fragments(tree: Path, tmp_path: Path, opened: Open) -> None:
    options = ("-noI", "-noD", "-noF", "-noX", "-no-fragments", "-no-exports", "-no-xattrs", "-no-duplicates")
    facts = dict(opened(mksquashfs(tmp_path / "image.sqfs", tree, options=options)).summary())
    assert facts["uncompressed"] == "inodes, data, fragments, attributes, owners"
    assert facts["attribute sets"] == "none"
    assert facts["export table"] == "no"
    assert facts["duplicates"] == "kept"
    assert facts["small files"] == "no fragments"


# --- refused images


def _superblock(**changes: int) -> bytes:
    values = {"magic": 0x73717368, "major": 4, "minor": 0, **changes}
    return struct.pack("<I24xHH64x", values["magic"], values["major"], values["minor"])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"hsqs", "truncated"),
        (b"\x1f\x8b\x08" + bytes(200), "not a squashfs image but gzip-compressed data"),
        (bytes(1080) + b"\x53\xef" + bytes(100), "but an ext2, ext3 or ext4 filesystem"),
        (bytes(0x8001) + b"CD001" + bytes(100), "but an ISO 9660 image"),
        (b"some text", "not a squashfs image"),
        (bytes(5000), "but a file that begins with zeros"),
        (_superblock(major=3, minor=2), r"version 3\.2 is not supported.*mksquashfs"),
        (_superblock(major=1), r"damaged squashfs superblock: block size 0"),
        (_superblock(major=4, minor=1), r"version 4\.1 is not supported"),
        (
            b"sqsh" + bytes(24) + b"\0\4\0\0" + bytes(100),
            r"claims to be a big-endian squashfs version 4\.0, but that is never",
        ),
        (b"\x7fELF\x02\x01" + bytes(34) + struct.pack("<Q", 4096) + bytes(40), "an ELF program"),
        (_superblock() + bytes(100), "damaged squashfs superblock"),
    ],
)
def test_what_is_no_image_is_refused_by_name(tmp_path: Path, opened: Open, content: bytes, says: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(LayerError, match=says):
        opened(path)


def test_a_program_with_an_image_behind_it_tells_the_offset(
    image: Path, tmp_path: Path, opened: Open
) -> None:
    path = tmp_path / "some.AppImage"
    # Section headers: 3 of 64 bytes at 4000.
    header = b"\x7fELF\x02\x01" + bytes(34) + struct.pack("<Q", 4000) + bytes(10) + struct.pack("<HH", 64, 3)
    path.write_bytes(header.ljust(4192, b"\0") + image.read_bytes())
    with pytest.raises(LayerError, match="-o offset=4192"):
        opened(path)
    assert read(opened(path, offset=4192), b"one") == text(1, 1)


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize(("gap", "sections"), [(0, 0), (1, 0), (5000, 0), (1, 1 << 30)])
def test_a_program_without_section_headers(
    image: Path, tmp_path: Path, opened: Open, bits: int, gap: int, sections: int
) -> None:
    """What is loaded of it tells where it ends; what follows may be padded, and talk of images.

    As if it had none where they are said to be beyond the end of the file.
    """
    end, large = 70_001, 1 << 20
    if bits == 64:
        header = b"\x7fELF\x02\x01" + struct.pack("<26xQQ6xHHHH2x", 64, sections, 56, 2, 64, 1)
        header += struct.pack("<I4xQ16xQ16x", 1, 1, end - 1) + struct.pack("<I4xQ16xQ16x", 4, large, large)
    else:
        header = b"\x7fELF\x01\x01" + struct.pack("<22xII6xHHHH2x", 52, sections, 32, 2, 40, 1)
        header += struct.pack("<II8xI12x", 1, 1, end - 1) + struct.pack("<II8xI12x", 4, large, large)
    program = header.ljust(60_000, b"\0") + b"hsqs is the magic"
    path = tmp_path / "some.AppImage"
    path.write_bytes(program.ljust(end, b"\0") + b"hsqs, "[:gap].ljust(gap, b"x") + image.read_bytes())
    with pytest.raises(LayerError, match=rf"-o offset={end + gap}\)"):
        opened(path)
    with path.open("rb") as file:
        assert find_image(file.fileno()) == end + gap
    assert read(opened(path, offset=end + gap), b"one") == text(1, 1)


def test_paths_that_lead_to_no_image(tmp_path: Path, opened: Open) -> None:
    with pytest.raises(LayerError, match="is a directory"):
        opened(tmp_path)
    with pytest.raises(LayerError, match="No such file"):
        opened(tmp_path / "missing")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(LayerError, match="neither a file nor a block device"):
        opened(tmp_path / "fifo")


def test_a_truncated_image_says_how_much_is_missing(image: Path, tmp_path: Path, opened: Open) -> None:
    content = image.read_bytes()
    for length in (95, 96, 5000, len(content) // 2):
        path = tmp_path / "cut"
        path.write_bytes(content[:length])
        with pytest.raises(LayerError, match="truncated"):
            opened(path)


@pytest.mark.parametrize("name", ["zstandard", "lz4.block"])
def test_a_missing_library_is_named(
    tree: Path, tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    compressor = {"zstandard": "zstd", "lz4.block": "lz4"}[name]
    image = mksquashfs(tmp_path / "image.sqfs", tree / "dir", options=("-comp", compressor))
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LayerError, match=f"compressed with {compressor}.*{name.partition('.')[0]}"):
        opened(image)


def test_gzip_works_without_isal(
    tree: Path, image: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "isal.igzip_lib", None)
    assert read(opened(image), b"several") == (tree / "several").read_bytes()
