"""cowfs and the kernel write the same to an ext3 image, and read each other's."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfs.layers.base import UpperLayer
from tests.support import ext3
from tests.support.listing import find
from tests.support.system import needs_root
from tests.unit.test_ext3_layer import (
    ACL,
    CAPABILITY,
    EXCHANGE,
    MINIMAL_ACL,
    SEED,
    T0,
    WHITEOUT,
    put,
)


@pytest.fixture(autouse=True)
def no_umask() -> Iterator[None]:
    """Set the umask of the daemon."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture(params=ext3.GEOMETRIES, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def geometry(request: pytest.FixtureRequest) -> tuple[int, int]:
    pair: tuple[int, int] = request.param
    return pair


def populate(layer: UpperLayer) -> None:
    """Create a tree with every type of file, through all calls."""
    root, noise = layer.root, random.Random(7).randbytes(200_000)
    put(layer, root, b"empty")
    put(layer, root, b"small", (0, b"content"), mode=0o4751)
    put(layer, root, b"large", (0, noise), (300_000, noise))
    put(layer, root, b"sparse", (5 << 20, b"middle"), (4 << 30, b"end"))
    put(layer, root, b"n" * 255, (0, b"long"))
    layer.truncate(put(layer, root, b"cut", (0, noise)), 50_001)
    layer.truncate(put(layer, root, b"grown", (0, b"begin")), 100_000)
    deep = root
    for _ in range(30):
        deep = layer.mkdir(deep, b"deep", 0o1755, 5, 6)
    many = layer.mkdir(root, b"many", 0o700, 0, 0)
    for number in range(700):
        put(layer, many, b"some-name-%d" % (number * number))
    for number in range(0, 700, 3):
        layer.unlink(many, b"some-name-%d" % (number * number), None)
    layer.symlink(root, b"short", b"t", 1, 2)
    layer.symlink(root, b"fifty-nine", b"t" * 59, 1, 2)
    layer.symlink(root, b"sixty", b"t" * 60, 1, 2)
    layer.symlink(root, b"long", b"t" * 1000, 0xFFFF, 0x10000)
    for name, kind, rdev in (
        (b"null", stat.S_IFCHR, os.makedev(1, 3)),
        (b"new", stat.S_IFCHR, os.makedev(300, 7)),
        (b"block", stat.S_IFBLK, os.makedev(259, 70000)),
        (b"whiteout", stat.S_IFCHR, 0),
        (b"fifo", stat.S_IFIFO, 0),
        (b"socket", stat.S_IFSOCK, 0),
    ):
        layer.mknod(root, name, kind | 0o640, rdev, 70000, 4_000_000_000)
    _link_and_move(layer)
    _set_attributes(layer)


def _link_and_move(layer: UpperLayer) -> None:
    root = layer.root
    place = layer.mkdir(root, b"place", 0o755, 0, 0)
    linked = put(layer, root, b"linked", (0, b"linked"))
    for number in range(5):
        layer.link(linked, place, b"link%d" % number)
    layer.unlink(root, b"linked", None)
    for name in (b"a", b"b", b"c", b"d", b"e"):
        put(layer, place, name, (0, name))
        layer.mkdir(place, name + b"dir", 0o750, 0, 0)
    other = layer.mkdir(root, b"other", 0o755, 0, 0)
    layer.rename((place, b"a"), (other, b"moved"))
    layer.rename((place, b"b"), (place, b"c"))
    layer.rename((place, b"d"), (other, b"left-a-whiteout"), WHITEOUT)
    layer.rename((place, b"adir"), (other, b"moved-dir"))
    layer.rename((place, b"bdir"), (place, b"cdir"))
    layer.rename((place, b"ddir"), (other, b"dir-left-a-whiteout"), WHITEOUT)
    layer.rename((place, b"e"), (place, b"edir"), EXCHANGE)
    layer.rename((place, b"cdir"), (other, b"moved"), EXCHANGE)
    layer.rmdir(other, b"moved-dir", None)


def _set_attributes(layer: UpperLayer) -> None:
    root = layer.root
    dressed = layer.mkdir(root, b"dressed", 0o755, 0, 0)
    layer.setxattr(dressed, b"trusted.overlay.opaque", b"y")
    for number in range(12):
        layer.setxattr(dressed, b"user.number%d" % number, b"v" * number)
    layer.removexattr(dressed, b"user.number7")
    file = put(layer, root, b"capable", (0, b"x"))
    layer.setxattr(file, b"security.capability", CAPABILITY)
    layer.setxattr(file, b"user.big", b"B" * 700)
    layer.setxattr(file, b"user.empty", b"")
    layer.setxattr(file, b"trusted.overlay.origin", bytes(range(29)))
    shared = layer.symlink(root, b"dressed-link", b"x", 0, 0)
    layer.setxattr(shared, b"trusted.overlay.origin", b"")
    owned = layer.mkdir(root, b"acls", 0o2770, 0, 4321)
    layer.chmod(owned, 0o2770)
    layer.setxattr(owned, b"system.posix_acl_default", ACL)
    inside = put(layer, owned, b"inherits", mode=0o640)
    layer.mkdir(owned, b"inherits-too", 0o751, 7, 7)
    layer.symlink(owned, b"inherits-not", b"t", 7, 7)
    layer.setxattr(put(layer, root, b"acl"), b"system.posix_acl_access", ACL)
    layer.setxattr(put(layer, root, b"minimal-acl"), b"system.posix_acl_access", MINIMAL_ACL)
    layer.chmod(inside, 0o604)
    given = put(layer, root, b"given", (0, b"x"), mode=0o6775)
    layer.setxattr(given, b"security.capability", CAPABILITY)
    layer.chown(given, 12, 100_000)
    written = put(layer, root, b"written")
    layer.setxattr(written, b"security.capability", CAPABILITY)
    opened = layer.open(written, os.O_RDWR)
    opened.pwrite(b"x", 0)
    opened.close()
    for name in (b"small", b"short", b"null", b"place"):
        layer.utimens(find(layer, name), T0, T0 + 1)
    layer.utimens(find(layer, b"empty"), -1_000_000_001, 2_147_483_647_000_000_000)
    layer.utimens(find(layer, b"large"), 0, 3_000_000_000_000_000_001)


# --- the same tree


@needs_root
def test_what_we_write_the_kernel_reads(tmp_path: Path, geometry: tuple[int, int]) -> None:
    image = ext3.make(tmp_path / "image", *geometry)
    with ext3.opened(image) as ours:
        populate(ours)
        before, room = ext3.describe(ours), ours.statfs()
    with ext3.mounted(image, "ro") as kernels:
        assert ext3.differences(before, ext3.describe(kernels)) == []
        assert kernels.statfs() == room
    with ext3.opened(image, read_only=True) as again:
        assert ext3.differences(before, ext3.describe(again)) == []


@needs_root
def test_what_the_kernel_writes_we_read(tmp_path: Path, geometry: tuple[int, int]) -> None:
    image = ext3.make(tmp_path / "image", *geometry)
    with ext3.mounted(image) as kernels:
        populate(kernels)
        before, room = ext3.describe(kernels), kernels.statfs()
    with ext3.opened(image) as ours:
        assert ext3.differences(before, ext3.describe(ours)) == []
        assert ours.statfs() == room


@needs_root
def test_both_make_the_same_of_the_same_calls(tmp_path: Path, geometry: tuple[int, int]) -> None:
    """Everything is equal except places on disk and times; directories split where the kernel splits them."""
    described = []
    for opened in (ext3.opened, ext3.mounted):
        image = ext3.make(tmp_path / opened.__name__, *geometry, more=("-E", f"root_owner=0:0,{SEED}"))
        with opened(image) as layer:
            populate(layer)
            described.append(ext3.describe(layer))
    times = ("st_ino", "handle", "st_ctime_ns", "st_atime_ns", "st_mtime_ns")
    assert ext3.differences(*described, ignore=times) == []
    for path in ("./small", "./short", "./null", "./place", "./empty", "./large"):
        one, two = (tree[path] for tree in described)
        assert (one["st_atime_ns"], one["st_mtime_ns"]) == (two["st_atime_ns"], two["st_mtime_ns"]), path


@needs_root
def test_both_go_on_with_what_the_other_has_left(tmp_path: Path, geometry: tuple[int, int]) -> None:
    """Indexed directories, shared xattr blocks and large files, which the other one changes."""
    image = ext3.make(tmp_path / "image", *geometry)
    with ext3.mounted(image) as kernels:
        populate(kernels)
    with ext3.opened(image) as ours:
        _change(ours)
        before = ext3.describe(ours)
    with ext3.mounted(image) as kernels:
        assert ext3.differences(before, ext3.describe(kernels)) == []
        _change(kernels, b"again")
        before = ext3.describe(kernels)
    ext3.sound(image)
    with ext3.opened(image) as ours:
        assert ext3.differences(before, ext3.describe(ours)) == []


def _change(layer: UpperLayer, suffix: bytes = b"") -> None:
    many = find(layer, b"many")
    for number in range(500):
        put(layer, many, b"another-%d" % number + suffix, (0, b"x" * number))
    for number in range(0, 700, 7):
        name = b"some-name-%d" % (number * number)
        if layer.lookup(many, name) is not None:
            layer.rename((many, name), (many, b"renamed-" + name))
    for name in (b"dressed", b"capable", b"acls", b"dressed-link"):
        layer.setxattr(find(layer, name), b"trusted.more" + suffix, b"more")
    large = layer.open(find(layer, b"large"), os.O_RDWR)
    large.pwrite(b"over", 250_000)
    large.truncate(400_000)
    large.close()
    layer.truncate(find(layer, b"sparse"), 4 << 20)
    deep = find(layer, *[b"deep"] * (28 if suffix else 29))
    layer.rmdir(deep, b"deep", None)


@needs_root
def test_handles_are_the_kernels(tmp_path: Path) -> None:
    """An origin or index entry of one engine is found by the other."""
    image = ext3.make(tmp_path / "image")
    with ext3.opened(image) as ours:
        key = put(ours, ours.root, b"file")
        handle = ours.handle(key)
        assert ours.handle_ino(handle) == ours.stat(key).st_ino
        assert any(handle.uuid)
    with ext3.mounted(image) as kernels:
        key = find(kernels, b"file")
        assert kernels.handle(key) == handle
        assert kernels.handle_ino(handle) == kernels.stat(key).st_ino
