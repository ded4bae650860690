"""An unreadable image is reported with its format, and with advice."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from cowfs.errors import LayerError
from cowfs.formats.erofs import MAGIC
from cowfs.formats.squashfs.image import open_image
from cowfs.store.format.identity import identify_lower


def at(place: int, magic: bytes) -> bytes:
    return (bytes(place) + magic).ljust(40_000, b"\0")


def old(order: str, magic: bytes, major: int, minor: int) -> bytes:
    return (magic + bytes(24) + struct.pack(f"{order}HH", major, minor)).ljust(40_000, b"\0")


def erofs(blocks: int, inodes: int = 5, block_log: int = 12, devices: int = 0) -> bytes:
    head = struct.pack("<4sIIBBHQQII", MAGIC, 0, 0, block_log, 0, 36, inodes, 1_700_000_000, 0, blocks)
    return at(1024, head.ljust(80, b"\0") + struct.pack("<IHHH", 8 if devices else 0, 0, devices, 1))


REPACK = "unsquashfs -d DIR FILE, mksquashfs DIR NEW"
MOUNT = "mount -o loop,ro FILE DIR"


@pytest.mark.parametrize(
    ("content", "what", "advice"),
    [
        (old("<", b"hsqs", 3, 2), "squashfs version 3.2", REPACK),
        (old("<", b"hsqs", 1, 1), "squashfs version 1.1", REPACK),
        (old("<", b"hsqs", 1, 0), "damaged squashfs superblock", "copy it again"),
        (old(">", b"sqsh", 3, 0), "damaged squashfs superblock", "copy it again"),
        (
            old(">", b"sqsh", 4, 0),
            "big-endian squashfs version 4.0, but that is never big-endian",
            "copy it again",
        ),
        (old(">", b"sqsh", 1, 2), "big-endian squashfs version 1.2", REPACK),
        (old("<", b"shsq", 3, 0), "damaged squashfs superblock", "copy it again"),
        (old(">", b"qshs", 3, 4), "big-endian squashfs version 3.4", REPACK),
        (old("<", b"hsqt", 3, 0), "a squashfs image of DD-WRT", "sasquatch"),
        (old(">", b"tqsh", 2, 0), "a squashfs image of DD-WRT", "sasquatch"),
        (at(0, b"QFI\xfb"), "a qcow2 disk image", "qemu-img convert"),
        (at(0, b"070701"), "a cpio archive", "cpio -id -D DIR <FILE"),
        (at(0, b"\xfd7zXZ\0"), "xz-compressed data", "unxz FILE"),
        (at(1080, b"\x53\xef"), "an ext2, ext3 or ext4 filesystem", MOUNT),
        (at(0, b"-rom1fs-"), "a romfs image", MOUNT),
    ],
)
def test_each_kind_is_named_with_what_to_do(tmp_path: Path, content: bytes, what: str, advice: str) -> None:
    image = tmp_path / "image"
    image.write_bytes(content)
    for read in (identify_lower, open_image):
        with pytest.raises(LayerError) as caught:
            read(str(image))
        assert what in str(caught.value) and advice in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (erofs(100), "truncated EROFS image: 40000 of 409600 bytes"),
        (erofs(1 << 31), "truncated EROFS image"),
        (erofs(2, inodes=0), "damaged EROFS superblock"),
        (erofs(2, block_log=60), "damaged EROFS superblock"),
        (erofs(2)[:1100], "truncated EROFS image"),
        (erofs(2, devices=1), "parts of this EROFS image are on other devices"),
    ],
)
def test_an_erofs_that_cannot_be_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    image = tmp_path / "image"
    image.write_bytes(content)
    with pytest.raises(LayerError, match=why):
        identify_lower(str(image))


def test_an_erofs_is_known_by_its_superblock(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(erofs(2))
    first = identify_lower(str(image))
    assert first.kind == "erofs" and "5 inodes, made 2023-11-14" in first.description
    image.write_bytes(erofs(3))
    assert identify_lower(str(image)).fingerprint != first.fingerprint
    image.write_bytes(bytes(4096) + erofs(2))
    assert identify_lower(str(image), 4096).fingerprint == first.fingerprint
    with pytest.raises(LayerError, match=r"an EROFS image .root can mount it, from a file: --engine kernel"):
        open_image(str(image), 4096)
