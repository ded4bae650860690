"""Images as other makers than mksquashfs make them: what the kernel reads we read, and show the same.

Each peculiarity is forged, with what must be shown of it. As root, the kernel's own mount of the same
image is the judge of that: of every name, field, attribute and page. Where it fails we may show more.
"""

from __future__ import annotations

import logging
import os
import struct
from pathlib import Path

import pytest

from cowfs.layers.squashfs import SquashfsLayer
from tests.support.direct import Direct
from tests.support.peculiar_squashfs import MAKERS, RAW
from tests.support.squashcompare import differences, seen_by_kernel, seen_by_us
from tests.support.squashforge import DIRECTORY, NONE32, Entry, Forge
from tests.support.squashfs import (
    devices,
    kernel_root,
    mksquashfs,
    needs_mksquashfs,
    needs_tar2sqfs,
    noise,
    tar2sqfs,
    text,
)
from tests.support.system import needs_root, run

# --- a number that several inodes have


def numbered_alike() -> Forge:
    """Everything has the number 7: files, and directories with files."""
    forge = Forge()
    entries = [Entry(name, forge.small(name, 7), number=7) for name in (b"a", b"bb", b"ccc")]
    for name in (b"d", b"e"):
        below = forge.directory([Entry(b"in-" + name, forge.small(name, 7), number=7)], 7)
        entries.append(Entry(name, below, DIRECTORY, 7))
    entries.append(Entry(b"link", entries[0].ref, number=7))
    forge.directory(entries, 7)
    return forge


def test_inodes_with_one_number_are_told_apart(tmp_path: Path) -> None:
    """The kernel shows the one that it met first for all of them."""
    forge = numbered_alike()
    (tmp_path / "image.sqfs").write_bytes(forge.finish(forge.next_ref(-32)))
    layer = SquashfsLayer(os.fspath(tmp_path / "image.sqfs"))
    seen = seen_by_us(layer)
    assert [seen[b"/" + name]["pages"] for name in (b"a", b"bb", b"ccc", b"link")] == [
        [b"a"],
        [b"bb"],
        [b"ccc"],
        [b"a"],
    ]
    assert seen[b"/d"]["names"] == [b"in-d"] and seen[b"/e"]["names"] == [b"in-e"]
    found = {name: layer.lookup(layer.root, name) for name in (b"a", b"bb", b"ccc", b"d", b"e", b"link")}
    numbers = {name: value[1].st_ino for name, value in found.items() if value}
    assert numbers[b"a"] == numbers.pop(b"link")
    assert len({layer.stat(layer.root).st_ino, *numbers.values()}) == 6
    assert [layer.handle(value[0]) is not None for value in found.values() if value].count(True) == 0
    layer.close()


def test_a_union_does_not_take_inodes_with_one_number_for_one(tmp_path: Path) -> None:
    forge = numbered_alike()
    (tmp_path / "image.sqfs").write_bytes(forge.finish(forge.next_ref(-32)))
    (tmp_path / "store").mkdir()
    union = Direct(os.fspath(tmp_path / "store"), [os.fspath(tmp_path / "image.sqfs")])
    try:
        assert [union.read(path) for path in ("a", "bb", "d/in-d", "e/in-e")] == [b"a", b"bb", b"d", b"e"]
        union.write("bb", b"changed")
        assert [union.read(path) for path in ("a", "bb", "ccc")] == [b"a", b"changed", b"ccc"]
        union.remount()
        assert [union.read(path) for path in ("bb", "a", "ccc")] == [b"changed", b"a", b"ccc"]
    finally:
        union.close()


@pytest.mark.parametrize("links", [1, 2])
def test_a_copied_up_inode_is_not_taken_for_another_with_its_number(tmp_path: Path, links: int) -> None:
    """After a remount, whichever is met first; hard links are found by their number in the store."""
    forge = Forge()
    entries = []
    for name in (b"a", b"b"):
        start = forge.block(name * 9)
        body = struct.pack("<QQQIIIII", start, 9, 0, links, NONE32, 0, NONE32, 9 | RAW)
        ref = forge.inode(9, body, 7)
        entries += [Entry(name, ref, number=7), Entry(name + b"-too", ref, number=7)][:links]
    (tmp_path / "image.sqfs").write_bytes(forge.finish(forge.directory(entries, 9)))
    (tmp_path / "store").mkdir()
    union = Direct(os.fspath(tmp_path / "store"), [os.fspath(tmp_path / "image.sqfs")])
    wanted = {"a": b"a" * 9, "b": b"b" * 9}
    try:
        for changed in ("a", "b"):
            union.remount()
            union.write(changed, changed.upper().encode())
            wanted[changed] = changed.upper().encode() + changed.encode() * 8
            for order in (("a", "b"), ("b", "a")):
                union.remount()
                assert {name: union.read(name) for name in order} == wanted
    finally:
        union.close()


# --- real makers, with the options that others use


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tree in which each compressor, filter and strategy finds something to do."""
    top = tmp_path_factory.mktemp("makers") / "tree"
    (top / "empty").mkdir(parents=True)
    (top / "many").mkdir()
    for number in range(400):
        (top / "many" / f"a-rather-long-name-{number:05}").write_bytes(text(number, number))
    (top / "text").write_bytes(text(300_000))
    (top / "noise").write_bytes(noise(20_000))
    (top / "program").write_bytes(Path("/usr/bin/env").read_bytes())
    with (top / "sparse").open("wb") as sparse:
        sparse.write(text(10))
        sparse.truncate(700_000)
    (top / "link").symlink_to("many")
    os.link(top / "text", top / "many" / "text")
    if os.geteuid() == 0:
        for name in ("text", "noise", "many", "empty"):
            os.setxattr(top / name, "trusted.all", b"the same long value" * 5)
        os.setxattr(top / "text", "security.capability", bytes.fromhex("0100000200040000" + "00" * 12))
        os.setxattr(top / "link", "trusted.link", b"on a symlink", follow_symlinks=False)
    for at, path in enumerate(sorted(top.rglob("*"))):
        os.utime(path, (at, at), follow_symlinks=False)
    return top


OTHERS = {
    "snap": ("-comp", "xz", "-no-xattrs", "-no-fragments", "-all-root"),
    "snap of old": ("-comp", "lzo", "-no-fragments", "-Xalgorithm", "lzo1x_1_15"),
    "AppImage": ("-comp", "zstd", "-root-owned", "-b", "1M", "-Xcompression-level", "22", "-mkfs-time", "0"),
    "AppImage of old": ("-comp", "gzip", "-root-owned", "-all-time", "4294967295"),
    "Buildroot": ("-comp", "lz4", "-Xhc", "-b", "64K", "-no-exports"),
    "Yocto": ("-comp", "xz", "-no-exports", "-no-tailends", "-nopad", "-b", "256K"),
    "OpenWrt": ("-comp", "xz", "-Xbcj", "arm", "-Xdict-size", "25%", "-b", "256K", "-nopad", "-root-owned"),
    "live system": ("-comp", "xz", "-Xbcj", "x86", "-Xdict-size", "100%", "-b", "1M", "-tailends"),
    "all filters": ("-comp", "xz", "-Xbcj", "x86,arm,armthumb,powerpc,sparc", "-b", "32K"),
    "a small window": ("-comp", "gzip", "-Xwindow-size", "9", "-Xcompression-level", "1"),
    "strategies": ("-comp", "gzip", "-Xstrategy", "filtered,huffman_only,run_length_encoded,fixed"),
    "lzo slowly": ("-comp", "lzo", "-Xalgorithm", "lzo1x_999", "-Xcompression-level", "9"),
    "no owner": ("-force-uid", "4294967295", "-force-gid", "4294967295", "-no-duplicates"),
    "metadata alone": ("-noD", "-noF", "-b", "4K"),
    "data alone": ("-noI", "-noX", "-noId"),
}


@needs_root
@pytest.mark.root
@needs_mksquashfs
@pytest.mark.parametrize("which", OTHERS)
def test_images_as_others_make_them(tree: Path, tmp_path: Path, which: str) -> None:
    image = mksquashfs(tmp_path / "image.sqfs", tree, options=OTHERS[which] + devices())
    assert compare(image) == 416


@needs_root
@pytest.mark.root
@needs_tar2sqfs
@pytest.mark.parametrize(
    "options",
    [(), ("-T", "-e"), ("-c", "zstd", "-X", "level=19"), ("-c", "gzip", "-X", "window=9,fixed", "-k")],
)
def test_images_of_tar2sqfs(tree: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    assert compare(tar2sqfs(tmp_path / "image.sqfs", tree, *options)) == 409


@needs_root
@pytest.mark.root
@needs_tar2sqfs
@pytest.mark.parametrize(
    "options", [("-k", "-x"), ("-e", "-o", "-T"), ("-c", "lz4", "-X", "hc", "-b", "4096")]
)
def test_images_of_gensquashfs(tree: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    image = tmp_path / "image.sqfs"
    run("gensquashfs", "-q", "-D", tree, *options, image, timeout=120)
    assert compare(image) == 409


@needs_root
@pytest.mark.root
@needs_tar2sqfs
def test_an_image_that_gensquashfs_makes_of_a_description(tmp_path: Path) -> None:
    lines = [
        "slink /link 0777 1 2 target",
        "nod /disk 0660 0 6 b 8 17",
        "nod /large 0600 70000 80000 c 300 70000",
        "pipe /pipe 0644 0 0",
        "sock /socket 0600 5 6",
        "dir /deep 01777 4294967295 4294967295",
        *(f"dir /deep/{number:03} 0750 {number} {number + 1}" for number in range(300)),
        f"file /deep/file 06755 3 4 {tmp_path}/content",
    ]
    (tmp_path / "content").write_bytes(text(200_000))
    (tmp_path / "list").write_text("\n".join(lines) + "\n")
    image = tmp_path / "image.sqfs"
    run("gensquashfs", "-q", "-F", tmp_path / "list", "-d", "mtime=2000000000", image, timeout=60)
    assert compare(image) == 308


@pytest.mark.parametrize("which", MAKERS)
def test_what_must_be_shown(tmp_path: Path, which: str, caplog: pytest.LogCaptureFixture) -> None:
    image = MAKERS[which]()
    (tmp_path / "image.sqfs").write_bytes(image.raw)
    with caplog.at_level(logging.ERROR):
        layer = SquashfsLayer(os.fspath(tmp_path / "image.sqfs"))
        ours = seen_by_us(layer)
        layer.close()
    wrong = {
        (path, what): (value, ours.get(path, {}).get(what, "nothing"))
        for path, expected in image.shown.items()
        for what, value in expected.items()
        if ours.get(path, {}).get(what, "nothing") != value
    }
    assert not wrong


@needs_root
@pytest.mark.root
@pytest.mark.parametrize("which", MAKERS)
def test_the_kernel_shows_nothing_else(tmp_path: Path, which: str) -> None:
    path = tmp_path / "image.sqfs"
    path.write_bytes(MAKERS[which]().raw)
    compare(path)


def compare(path: Path) -> int:
    """Compare everything in the image; return the number of names."""
    layer = SquashfsLayer(os.fspath(path))
    try:
        ours = seen_by_us(layer)
    finally:
        layer.close()
    try:
        with kernel_root(path) as root:
            theirs = seen_by_kernel(root)
    except OSError as error:
        pytest.skip(f"this kernel does not mount such an image, but cowfs does: {error}")
    assert differences(ours, theirs) == []
    return len(theirs)
