"""Compare the reader with the kernel's: every field of every inode of all kinds of images. Needs root."""

from __future__ import annotations

import os
import shutil
import stat
import struct
import subprocess
from contextlib import ExitStack
from pathlib import Path
from subprocess import DEVNULL, PIPE

import pytest

from cowfs.layers.squashfs import SquashfsLayer
from tests.support.squashforge import Entry, Forge
from tests.support.squashfs import (
    assert_equal,
    devices,
    kernel_view,
    mksquashfs,
    needs_mksquashfs,
    needs_tar2sqfs,
    noise,
    sample_tree,
    tar2sqfs,
)
from tests.support.system import needs_root

pytestmark = [needs_root, needs_mksquashfs, pytest.mark.root]


def compare(image: Path, *, content: bool = True) -> int:
    """Compare the whole image; return the number of names."""
    with ExitStack() as stack:
        try:
            theirs = stack.enter_context(kernel_view(image))
        except OSError as error:
            pytest.skip(f"this kernel does not mount such an image: {error}")
        ours = SquashfsLayer(os.fspath(image))
        stack.callback(ours.close)
        return assert_equal(ours, theirs, content=content)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_tree(tmp_path_factory.mktemp("squashfs") / "tree")


IMAGES = {
    "gzip": ("-comp", "gzip"),
    "lzo": ("-comp", "lzo"),
    "lz4": ("-comp", "lz4"),
    "xz": ("-comp", "xz", "-Xbcj", "x86"),
    "zstd": ("-comp", "zstd", "-b", "4K"),
    "uncompressed": ("-noI", "-noD", "-noF", "-noX", "-noId"),
    "no fragments": ("-no-fragments", "-b", "8K"),
    "tails": ("-tailends", "-no-exports"),
    "fragments": ("-always-use-fragments", "-b", "1M", "-nopad"),
    "no attributes": ("-no-xattrs",),
    "owners": ("-force-uid", "4294967294", "-force-gid", "70000", "-all-time", "4294967295"),
}


@pytest.mark.parametrize("which", IMAGES)
def test_images_of_mksquashfs(tree: Path, tmp_path: Path, which: str) -> None:
    image = mksquashfs(tmp_path / "image.sqfs", tree, options=IMAGES[which] + devices())
    assert compare(image) > 700


@needs_tar2sqfs
@pytest.mark.parametrize("options", [("-e",), ("-c", "xz", "-b", "4096"), ("-x", "-c", "lz4")])
def test_images_of_tar2sqfs(tree: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    assert compare(tar2sqfs(tmp_path / "image.sqfs", tree, *options)) > 700


def test_handles_are_the_kernels(tree: Path, tmp_path: Path) -> None:
    image = mksquashfs(tmp_path / "image.sqfs", tree)
    ours = SquashfsLayer(os.fspath(image))
    with kernel_view(image) as theirs:
        for name in (b"small", b"dir", b"link"):
            one, two = ours.lookup(ours.root, name), theirs.lookup(theirs.root, name)
            assert one and two
            handle = theirs.handle(two[0])
            assert handle is not None
            mine = ours.handle(one[0])
            assert mine is not None and mine._replace(place=b"") == handle
            assert ours.handle_ino(handle) == two[1].st_ino
    ours.close()


def test_a_sparse_file_of_five_gigabytes(tmp_path: Path) -> None:
    forge = Forge(block_size=1 << 20)
    words, start = [0] * 5121, forge.block(noise(3 << 20))
    for place in (0, 1024, 5000):
        words[place] = 1 << 20 | 1 << 24
    forge.fragments.append((forge.block(noise(1000)), 1000 | 1 << 24))
    stored = struct.pack("<5121I", *words)
    size = (5121 << 20) + 777
    file = forge.large_file(size, start, stored, number=2, fragment=0, tail=100)
    image = tmp_path / "image.sqfs"
    image.write_bytes(forge.finish(forge.directory([Entry(b"sparse", file, number=2)])))
    assert compare(image) == 2


@pytest.mark.nightly
def test_a_sparse_file_of_five_gigabytes_by_mksquashfs(tmp_path: Path) -> None:
    top = tmp_path / "tree"
    top.mkdir()
    with (top / "sparse").open("wb") as file:
        for place in (0, 1 << 30, (4 << 30) + 12345, (5 << 30) - 10):
            file.seek(place)
            file.write(noise(200_000, place & 0xFF))
        file.truncate((5 << 30) + 777)
    assert compare(mksquashfs(tmp_path / "image.sqfs", top, options=("-comp", "lz4"))) == 2


def test_a_directory_of_100_000_entries(tmp_path: Path) -> None:
    top = tmp_path / "tree"
    (top / "large").mkdir(parents=True)
    count = 0
    for part in range(4):  # a file of ext4 can have 65,000 names
        first = top / f"first{part}"
        first.write_bytes(b"")
        for number in range(part * 25_000, (part + 1) * 25_000):
            os.link(first, top / "large" / f"{number * 7919 % 1_000_003}-entry")
            count += 1
    image = mksquashfs(tmp_path / "image.sqfs", top, options=("-comp", "lz4"))
    ours = SquashfsLayer(os.fspath(image))
    with kernel_view(image) as theirs:
        one, two = ours.lookup(ours.root, b"large"), theirs.lookup(theirs.root, b"large")
        assert one and two
        for step in (7001, 997):  # at first by the index, then by the listing
            for number in range(0, count, step):
                for name in (b"%d-entry" % (number * 7919 % 1_000_003), b"%d-entry" % number):
                    mine, kernels = ours.lookup(one[0], name), theirs.lookup(two[0], name)
                    assert (mine and mine[1].st_ino) == (kernels and kernels[1].st_ino), name
        names = {entry.name for entry in ours.readdir(one[0])}
        assert names == {entry.name for entry in theirs.readdir(two[0])}
        assert len(names) == count
    ours.close()


def small_files(top: bytes, most: int, largest: int) -> tuple[list[bytes], int]:
    """The paths of about *most* files of at most *largest* bytes each, with the directories they are in;
    and how many files these are."""
    paths, count = [], 0
    for place, directories, names in os.walk(top):
        paths.append(place)
        for name in names:
            path = os.path.join(place, name)
            if os.lstat(path).st_size <= largest:
                paths.append(path)
                count += 1
        paths += [path for name in directories if os.path.islink(path := os.path.join(place, name))]
        if count >= most:
            break
    return paths, count


def pack(image: Path, paths: list[bytes]) -> Path:
    """Make an image of exactly these paths."""
    tar = ["tar", "--null", "--no-recursion", "--verbatim-files-from", "--xattrs", "-T", "-", "-cf", "-"]
    pack_: list[str | Path] = ["sqfstar", "-quiet", "-no-progress", "-comp", "lz4", "-processors", "2", image]
    with (
        subprocess.Popen(tar, stdin=PIPE, stdout=PIPE, stderr=DEVNULL) as packing,
        subprocess.Popen(pack_, stdin=packing.stdout, stdout=DEVNULL) as making,
    ):
        assert packing.stdin and packing.stdout
        packing.stdout.close()
        packing.stdin.write(b"\0".join(paths) + b"\0")
        packing.stdin.close()
        assert packing.wait() == 0 and making.wait() == 0
    return image


@pytest.mark.skipif(not shutil.which("sqfstar"), reason="needs sqfstar (squashfs-tools 4.5)")
@pytest.mark.timeout(240)
@pytest.mark.nightly
def test_a_real_tree_of_50_000_files(tmp_path: Path) -> None:
    """A large part of this system, without large files: real names, links, owners, sizes and contents."""
    paths, count = small_files(b"/usr", 50_000, 16 << 10)
    if count < 50_000:
        pytest.skip(f"this system has {count} small files only")
    assert compare(pack(tmp_path / "image.sqfs", paths)) >= len(paths)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_a_whole_system(tmp_path: Path) -> None:
    """With large files too."""
    options = ("-comp", "zstd", "-Xcompression-level", "1")
    image = mksquashfs(tmp_path / "image.sqfs", Path("/usr"), options=options)
    assert compare(image) > 50_000


def test_modes_are_all_kept(tmp_path: Path) -> None:
    top = tmp_path / "tree"
    top.mkdir()
    for mode in range(0, 0o10000, 0o111):
        (top / f"{mode:o}").write_bytes(b"")
        (top / f"{mode:o}").chmod(mode)
        assert stat.S_IMODE((top / f"{mode:o}").stat().st_mode) == mode
    assert compare(mksquashfs(tmp_path / "image.sqfs", top)) > 50
