"""Images of versions 1 to 3 in both byte orders, compared with their tree and with unsquashfs."""

from __future__ import annotations

import os
import shutil
import stat
import struct
from contextlib import closing
from pathlib import Path

import pytest

from cowfs.errors import LayerError
from cowfs.formats.squashfs.find import find_image
from cowfs.layers.squashfs import SquashfsLayer
from cowfs.lowers import open_lower
from cowfs.store.format.identity import identify_lower
from cowfs.store.format.kernel import commands
from tests.support.old_squashfs import KINDS, MADE, VENDORS, Node, Writer, old_image, sample, sqlzma
from tests.support.system import run

pytestmark = pytest.mark.skipif(not shutil.which("unsquashfs"), reason="needs unsquashfs")


def _compare(layer: SquashfsLayer, key: int, node: Node, version: int, seen: dict[Node, int]) -> None:
    """Fail unless the inode at *key* is *node*, recursively."""
    attr = layer.stat(key)
    is_timed = version == 3 or stat.S_ISDIR(node.mode) or stat.S_ISREG(node.mode)
    assert (attr.st_mode, attr.st_uid, attr.st_gid) == (node.mode, node.uid, node.gid)
    assert attr.st_mtime_ns == (node.mtime if is_timed else MADE) * 10**9
    assert attr.st_rdev == node.rdev
    assert layer.listxattr(key) == []
    assert seen.setdefault(node, attr.st_ino) == attr.st_ino
    # Version 2 does not store it.
    assert attr.st_nlink == (node.nlink if version == 3 else 1)
    handle = layer.handle(key)
    assert handle is not None and layer.handle_ino(handle) == attr.st_ino
    if stat.S_ISREG(node.mode):
        assert attr.st_size == len(node.content)
        file = layer.open(key, os.O_RDONLY)
        assert bytes(file.pread(1 << 20, 0)) == node.content
        assert bytes(file.pread(3, 4095)) == node.content[4095:4098]
    elif stat.S_ISLNK(node.mode):
        assert layer.readlink(key) == node.content
    elif stat.S_ISDIR(node.mode):
        listed = {entry.name: entry for entry in layer.readdir(key)}
        assert listed.keys() == node.names.keys()
        assert layer.lookup(key, b"absent") is None
        for name, child in node.names.items():
            found = layer.lookup(key, name)
            assert found is not None
            _compare(layer, found[0], child, version, seen)


def _compare_unpacked(path: bytes, node: Node, is_timed: bool) -> None:
    """Fail unless the output of unsquashfs is *node*, because the image proves nothing otherwise."""
    got = os.lstat(path)
    as_root = os.geteuid() == 0
    if as_root:
        assert (got.st_mode, got.st_uid, got.st_gid) == (node.mode, node.uid, node.gid), path
        assert got.st_rdev == node.rdev
    if is_timed or stat.S_ISDIR(node.mode) or stat.S_ISREG(node.mode):
        assert got.st_mtime == node.mtime, path
    if stat.S_ISREG(node.mode):
        assert Path(os.fsdecode(path)).read_bytes() == node.content
        assert got.st_nlink == (node.nlink if is_timed else 1)  # it takes those of version 2 for several
    elif stat.S_ISLNK(node.mode):
        assert os.readlink(path) == node.content
    elif stat.S_ISDIR(node.mode):
        names = set(os.listdir(path))
        wanted = (
            node.names if as_root else {n: c for n, c in node.names.items() if c.mode >> 12 not in (2, 6)}
        )
        assert names == wanted.keys()
        for name, child in wanted.items():
            _compare_unpacked(path + b"/" + name, child, is_timed)


@pytest.mark.parametrize("kind", KINDS)
def test_old_images_are_read_as_unsquashfs_reads_them(tmp_path: Path, kind: str) -> None:
    image = tmp_path / "image"
    image.write_bytes(old_image(kind))
    major = int(kind[0])
    unpacked = tmp_path / "unpacked"
    run("unsquashfs", "-no-progress", "-no-exit-code", "-d", unpacked, image)
    _compare_unpacked(bytes(unpacked), sample(), major == 3)
    with closing(SquashfsLayer(str(image))) as layer:
        _compare(layer, layer.root, sample(), major, {})
        facts = dict(layer.summary())
        assert layer.identity().fingerprint == identify_lower(str(image)).fingerprint
    order = "big" if "big" in kind else "little"
    assert facts["format"] == f"squashfs {kind[:3]}, {order}-endian"
    assert (facts["inodes"], facts["compression"]) == ("186", "gzip")


@pytest.mark.parametrize("kind", VENDORS)
def test_lzma_of_vendors_is_read(tmp_path: Path, kind: str) -> None:
    """No program here reads it: the writer follows the vendors' sources, and gzip gives the same tree."""
    firmware = tmp_path / "firmware"
    firmware.write_bytes(b"loader" * 100 + old_image(kind))
    with firmware.open("rb") as file:
        assert find_image(file.fileno()) == 600
    with closing(SquashfsLayer(str(firmware), offset=600)) as layer:
        _compare(layer, layer.root, sample(), int(kind[0]), {})
        assert dict(layer.summary())["compression"] == "lzma"
    lower = {"kind": "squashfs", "path": str(firmware), "offset": 600, "fingerprint": "f"}
    with pytest.raises(LayerError, match="the kernel does not mount squashfs"):
        commands("/store", "directory", "trusted.overlay.", "f00", [lower], [])
    if os.geteuid() == 0:
        with pytest.raises(LayerError, match="the kernel does not mount squashfs"):
            open_lower(str(firmware), engine="kernel", offset=600)


def test_what_no_description_is_known_of_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(Writer((3, 0), "<", pack=lambda data: b"\0" + sqlzma(data)[14:]).finish(sample()))
    with pytest.raises(
        LayerError, match=r"squashfs version 3\.0, compressed in a way of its vendor.*sasquatch"
    ):
        SquashfsLayer(str(image))


def test_old_images_are_found_in_firmware(tmp_path: Path) -> None:
    firmware = tmp_path / "firmware"
    firmware.write_bytes(b"loader sqsh hsqs" * 100 + old_image("3.1 big checked") + bytes(1000))
    with firmware.open("rb") as file:
        assert find_image(file.fileno()) == 1600
    with closing(SquashfsLayer(str(firmware), offset=1600)) as layer:
        _compare(layer, layer.root, sample(), 3, {})


def _forged(version: tuple[int, int], at: int, layout: str, value: int) -> bytes:
    order = ">"
    raw = bytearray(Writer(version, order).finish(Node(0o40755, names={b"a": Node(0o100644, b"a")})))
    struct.pack_into(order + layout, raw, at, value)
    return bytes(raw)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (_forged((3, 1), 28, "H", 1), "big-endian squashfs version 1.1 is not supported"),
        (_forged((3, 1), 30, "H", 2), "big-endian squashfs version 3.2 is not supported"),
        (_forged((3, 1), 28, "H", 4), "big-endian squashfs version 4.1, but that is never big-endian"),
        (_forged((3, 1), 0, "I", 0x73717368)[:118], "truncated: a squashfs image has at least 119 bytes"),
        (_forged((3, 1), 63, "Q", 1 << 40), "truncated squashfs image"),
        (_forged((2, 1), 8, "I", 1 << 30), "truncated squashfs image"),
        (_forged((3, 1), 37, "B", 0), "no owners"),
        (_forged((3, 1), 37, "B", 200), "200 owners at"),
        (_forged((3, 1), 38, "B", 200), "group table at"),
        (_forged((2, 1), 20, "I", 5), "damaged squashfs superblock"),
        (_forged((3, 0), 34, "H", 30), "block size 4096 with logarithm 30"),
        (_forged((3, 1), 87, "Q", 100), "inode table at 0x64"),
        (_forged((3, 1), 111, "Q", 100), "export table at 0x64"),
    ],
)
def test_an_old_superblock_that_cannot_be_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    image = tmp_path / "image"
    image.write_bytes(content)
    for read in (SquashfsLayer, identify_lower):
        with pytest.raises(LayerError, match=says):
            read(str(image))
