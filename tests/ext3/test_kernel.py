"""The engine and the kernel use an image in turn: each sees exactly what the other wrote."""

from __future__ import annotations

import errno
import os
import random
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cowfs.layers.base import UpperLayer
from cowfs.layers.directory import open_directory
from tests.ext3 import engine, images, recovery
from tests.ext3.engine import make_file
from tests.ext3.images import MIDDLE, MODERN, OLD, SMALL, Shape
from tests.ext3.load import Load
from tests.ext3.model import Promises, judge
from tests.ext3.reader import ROOT, Image
from tests.support.listing import find, names_of
from tests.support.system import needs_root

pytestmark = needs_root
ACCESS, DEFAULT = b"system.posix_acl_access", b"system.posix_acl_default"
ANY = 0xFFFFFFFF
ENTRIES = (1, 6, ANY), (2, 7, 1000), (4, 4, ANY), (8, 5, 70_000), (16, 7, ANY), (32, 4, ANY)
ACL = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in ENTRIES)


@contextmanager
def by_kernel(path: Path) -> Iterator[UpperLayer]:
    """Mount the image with the kernel; yield it as a layer."""
    with images.kernel_mounted(path, path.with_name("mnt")) as top:
        layer = open_directory(str(top))
        try:
            yield layer
        finally:
            layer.close()


@contextmanager
def by_engine(path: Path) -> Iterator[UpperLayer]:
    """Open the image in this process."""
    with engine.opened(path) as opened:
        yield opened.layer


def agreed(path: Path) -> None:
    """Fail unless the image is sound, and both show what its bytes say."""
    assert images.unclean(path) is None
    for side in (by_kernel, by_engine):
        before = Image(path.read_bytes())
        with side(path) as layer:
            Load(layer, before, 0).check()
        assert images.unclean(path) is None, side
        assert Image(path.read_bytes()).tree() == before.tree(), side


@pytest.mark.parametrize("shape", [MODERN, MIDDLE, SMALL, OLD], ids=str)
def test_taking_turns(place: Path, shape: Shape) -> None:
    path = images.make(place / "image", shape)
    sides: list[Callable[[Path], object]] = [by_engine, by_kernel]
    for turn in range(6):
        before = Image(path.read_bytes())
        with sides[turn % 2](path) as layer:  # type: ignore[attr-defined]
            load = Load(layer, before, 100 + turn)
            load.check()
            load.run(150)
            load.check()
            load.release()
        wrong = images.unclean(path)
        assert wrong is None, f"turn {turn}: {wrong}"
        number = load.model.operation
        assert judge(load.model.states, Promises(number, number), Image(path.read_bytes())) is None
    agreed(path)


@pytest.mark.parametrize("shape", [MODERN, SMALL, OLD], ids=str)
def test_an_index_of_the_kernel_stays_one(place: Path, shape: Shape) -> None:
    """In a large directory with the kernel's index, names change, and the kernel finds each."""
    path = images.make(place / "image", shape)
    chance = random.Random(3)
    names = [b"%d-%s" % (number, b"x" * chance.randrange(60)) for number in range(1000)]
    with by_kernel(path) as layer:
        directory = layer.mkdir(layer.root, b"large", 0o755, 0, 0)
        for name in names:
            layer.mknod(directory, name, stat.S_IFIFO | 0o600, 0, 0, 0)
        target = layer.mkdir(layer.root, b"other", 0o755, 0, 0)
    assert indexed(path, b"large")
    present = set(names)
    for turn in range(3):
        with by_engine(path) as layer:
            directory, target = find(layer, b"large"), find(layer, b"other")
            for name in chance.sample(sorted(present), 200):
                if chance.random() < 0.5:
                    layer.unlink(directory, name, None)
                else:
                    layer.rename((directory, name), (directory, name + b"r"))
                    present.add(name + b"r")
                present.discard(name)
            for number in range(300):
                name = b"new%d-%d" % (turn, number) + b"y" * chance.randrange(100)
                layer.link(find(layer, b"large", min(present)), directory, name)
                present.add(name)
            moved = sorted(present)[0]
            layer.rename((directory, moved), (target, moved))
            layer.rename((target, moved), (directory, moved))
        assert images.unclean(path) is None
        with by_kernel(path) as layer:
            directory = find(layer, b"large")
            assert sorted(names_of(layer, directory)) == sorted(present)
            for name in present:
                assert layer.lookup(directory, name) is not None, name
            assert layer.lookup(directory, b"absent") is None
            for name in chance.sample(sorted(present), 100):
                layer.unlink(directory, name, None)
                present.discard(name)
    agreed(path)


def indexed(path: Path, name: bytes) -> bool:
    """Return whether the directory with this name in the root has an index."""
    image = Image(path.read_bytes())
    return bool(image.inode(image.names(image.inode(ROOT))[name]).flags & 0x1000)


@pytest.mark.parametrize("shape", [MODERN, SMALL, OLD], ids=str)
def test_a_large_directory_of_the_engine(place: Path, shape: Shape) -> None:
    """Fail unless the kernel finds every name, and can change the directory."""
    path = images.make(place / "image", shape)
    names = [b"%d%s" % (number, b"n" * (number % 40)) for number in range(1500)]
    with by_engine(path) as layer:
        directory = layer.mkdir(layer.root, b"large", 0o755, 0, 0)
        for name in names:
            layer.mknod(directory, name, stat.S_IFIFO | 0o600, 0, 0, 0)
        for name in names[::3]:
            layer.unlink(directory, name, None)
    assert images.unclean(path) is None
    with by_kernel(path) as layer:
        directory = find(layer, b"large")
        for number, name in enumerate(names):
            assert (layer.lookup(directory, name) is None) == (number % 3 == 0), name
        for name in names[::3]:
            layer.mknod(directory, name, stat.S_IFIFO | 0o600, 0, 0, 0)
        for name in names[1::3]:
            layer.unlink(directory, name, None)
    agreed(path)


@pytest.mark.parametrize("shape", [MODERN, SMALL, OLD], ids=str)
def test_xattr_blocks_that_inodes_share(place: Path, shape: Shape) -> None:
    """The kernel shares a block of equal attributes; changing one inode's must not change the others'."""
    path = images.make(place / "image", shape)
    value, names = b"v" * 700, [b"%d" % number for number in range(12)]
    with by_kernel(path) as layer:
        for name in names:
            key = make_file(layer, name)
            layer.setxattr(key, b"user.shared", value)
    image = Image(path.read_bytes())
    inodes = image.names(image.inode(ROOT))
    blocks = [image.inode(inodes[name]).acl_block for name in names]
    assert blocks[0] and len(set(blocks)) < len(blocks), "the kernel has shared nothing"
    with by_engine(path) as layer:
        keys = [find(layer, name) for name in names]
        layer.setxattr(keys[0], b"user.shared", b"w" * 650)
        layer.setxattr(keys[1], b"user.more", b"m" * 100)
        layer.removexattr(keys[2], b"user.shared")
        layer.unlink(layer.root, names[3], None)
        layer.unlink(layer.root, names[4], keys[4])
        layer.forget(keys[4])
        for key in keys[5:]:
            assert layer.getxattr(key, b"user.shared") == value
    agreed(path)
    with by_engine(path) as layer:
        for name in names[5:]:
            layer.unlink(layer.root, name, None)
    agreed(path)


@pytest.mark.parametrize("shape", [MODERN, OLD], ids=str)
def test_acls_in_both_directions(place: Path, shape: Shape) -> None:
    path = images.make(place / "image", shape)
    for turn, side in enumerate((by_kernel, by_engine)):
        with side(path) as layer:
            key, file = layer.create(layer.root, b"file%d" % turn, 0o640, 0, 0)
            file.close()
            directory = layer.mkdir(layer.root, b"directory%d" % turn, 0o750, 0, 0)
            layer.setxattr(key, ACCESS, ACL)
            layer.setxattr(directory, DEFAULT, ACL)
        agreed(path)
    with by_kernel(path) as one:
        kernels = {name: seen(one, name) for name in (b"file0", b"file1", b"directory0", b"directory1")}
    with by_engine(path) as two:
        assert {name: seen(two, name) for name in kernels} == kernels
    assert kernels[b"file0"] == kernels[b"file1"]
    assert kernels[b"directory0"] == kernels[b"directory1"]
    assert kernels[b"file0"][1][ACCESS] == ACL


def seen(layer: UpperLayer, name: bytes) -> tuple[int, dict[bytes, bytes]]:
    """Return mode and attributes."""
    key = find(layer, name)
    attr = layer.stat(key)
    return attr.st_mode, {xattr: layer.getxattr(key, xattr) for xattr in layer.listxattr(key)}


DEVICES = [(0, 0), (1, 3), (8, 17), (255, 255), (256, 1), (1, 256), (4095, 1_048_575)]


def test_devices_times_and_owners(place: Path) -> None:
    """Attributes of all sizes that fit into the format."""
    path = images.make(place / "image", MODERN)
    times = [
        0,
        -1,
        1_000_000_000_123_456_789,
        (1 << 31) * 10**9,
        (1 << 33) * 10**9 + 999_999_999,
        (1 - (1 << 31)) * 10**9,
    ]
    owners = [(0, 0), (65_535, 65_536), (4_294_967_294, 1), (1, 4_294_967_294)]
    for side in (by_engine, by_kernel):
        with side(path) as layer:
            top = layer.mkdir(layer.root, side.__name__.encode(), 0o755, 0, 0)
            for number, device in enumerate(DEVICES):
                for kind in (stat.S_IFCHR, stat.S_IFBLK):
                    name = b"device%d-%d" % (number, kind)
                    layer.mknod(top, name, kind | 0o640, os.makedev(*device), *owners[number % 4])
            for number, time in enumerate(times):
                key = make_file(layer, b"time%d" % number, top)
                layer.utimens(key, time, time + 1)
        agreed(path)
    with by_kernel(path) as layer:
        for number, device in enumerate(DEVICES):
            for side in (by_engine, by_kernel):
                attr = layer.stat(
                    find(layer, side.__name__.encode(), b"device%d-%d" % (number, stat.S_IFCHR))
                )
                assert attr.st_rdev == os.makedev(*device)
                assert (attr.st_uid, attr.st_gid) == owners[number % 4]
        for number, time in enumerate(times):
            attr = layer.stat(find(layer, b"by_engine", b"time%d" % number))
            assert (attr.st_atime_ns, attr.st_mtime_ns) == (time, time + 1), time


@pytest.mark.parametrize("shape", [MODERN, OLD], ids=str)
def test_times_have_bounds(place: Path, shape: Shape) -> None:
    """Times before 1901, and after 2038 or 2446, become the nearest times that an inode can store."""
    path = images.make(place / "image", shape)
    bounds = [
        -1 << 40,
        -1 << 31,
        0,
        1 << 31,
        9_223_372_036,
        9_223_372_037,
        13 << 30,
        (1 << 34) - (1 << 31),
        1 << 40,
    ]
    times = [bound * 10**9 + more for bound in bounds for more in (-(10**9), -1, 0, 1, 10**9)]
    for side in (by_engine, by_kernel):
        with side(path) as layer:
            for number, time in enumerate(times):
                key = make_file(layer, b"%s%d" % (side.__name__.encode(), number), layer.root)
                layer.utimens(key, time, time + 1)
        agreed(path)
    for side in (by_engine, by_kernel):
        with side(path) as layer:
            for number, time in enumerate(times):
                seen = [
                    layer.stat(find(layer, b"%s%d" % (maker, number)))
                    for maker in (b"by_engine", b"by_kernel")
                ]
                ours, kernels = ((attr.st_atime_ns, attr.st_mtime_ns) for attr in seen)
                assert ours == kernels, time


@pytest.mark.parametrize("shape", [MODERN, SMALL, OLD], ids=str)
def test_files_of_every_depth(place: Path, shape: Shape) -> None:
    """Direct to triple indirect blocks, beyond 2 GiB, and up to the limits of the format."""
    path = images.make(place / "image", shape)
    width = shape.block_size // 4
    last = 12 + width + width**2 + width**3 - 1
    borders = [0, 11, 12, 12 + width - 1, 12 + width, 12 + width + width**2 - 1, 12 + width + width**2]
    offsets = [index * shape.block_size for index in borders] + [(1 << 31) - 50, (1 << 31) + 5, (1 << 32) + 7]
    limit = min((last + 1) * shape.block_size, (1 << 32) * 512)  # i_blocks counts 512 bytes in 32 bits
    for side in (by_engine, by_kernel):
        with side(path) as layer:
            _key, file = layer.create(layer.root, side.__name__.encode(), 0o600, 0, 0)
            for offset in offsets:
                data = b"at %d." % offset
                assert file.pwrite(data, offset) == len(data)
            for offset in offsets:
                data = b"at %d." % offset
                assert file.pread(len(data), offset) == data
            segments = list(file.segments(file.stat().st_size))
            assert len(segments) == len({start // shape.block_size for start, _ in segments})
            with pytest.raises(OSError) as caught:
                file.pwrite(b"x" * 10, limit)
            assert caught.value.errno == errno.EFBIG
            file.close()
        agreed(path)
    contents = []
    for side in (by_engine, by_kernel):
        with side(path) as layer:
            for name in (b"by_engine", b"by_kernel"):
                file = layer.open(find(layer, name), os.O_RDONLY)
                contents.append((file.stat().st_size, file.stat().st_blocks, list(file.segments(1 << 62))))
                file.close()
    assert contents.count(contents[0]) == 4
    for cut in (offsets[-2], 12 * shape.block_size + 1, 0):
        for side, name in ((by_engine, b"by_kernel"), (by_kernel, b"by_engine")):
            with side(path) as layer:
                layer.truncate(find(layer, name), cut)
            agreed(path)


@pytest.mark.parametrize("count", [20_000, pytest.param(100_000, marks=pytest.mark.nightly)])
def test_very_many_names(place: Path, count: int) -> None:
    """One creates names, the other removes half, and both find the rest."""
    path = images.make(place / "image", Shape(4096, 256, mib=64, journal=4, inodes=1024))
    with by_engine(path) as layer:
        directory = layer.mkdir(layer.root, b"large", 0o755, 0, 0)
        keys = []
        for number in range(count // 20_000 + 1):  # an inode has 32,000 names at most
            key = make_file(layer, b"file%d" % number)
            keys.append(key)
        for number in range(count):
            layer.link(keys[number // 20_000], directory, b"name%d" % number)
    assert images.unclean(path) is None
    with by_kernel(path) as layer:
        directory = find(layer, b"large")
        assert len(layer.readdir(directory)) == count
        for number in range(0, count, 2):
            layer.unlink(directory, b"name%d" % number, None)
    with by_engine(path) as layer:
        directory = find(layer, b"large")
        assert sorted(names_of(layer, directory)) == sorted(
            b"name%d" % number for number in range(1, count, 2)
        )
        for number in range(1, count, 4):
            layer.unlink(directory, b"name%d" % number, None)
    agreed(path)


def test_as_many_links_as_the_format_has(place: Path) -> None:
    """EMLINK at 65000 names of a file, like the kernel's ext4 driver; the ext3 driver's limit was 32000."""
    path = images.make(place / "image", Shape(4096, 256, mib=24, journal=4, inodes=1024))
    with by_engine(path) as layer:
        key = make_file(layer, b"file")
        directory = layer.mkdir(layer.root, b"large", 0o755, 0, 0)
        for number in range(33_000):
            layer.link(key, directory, b"%d" % number)
        assert layer.stat(key).st_nlink == 33_001
    with by_kernel(path) as layer:
        key, directory = find(layer, b"file"), find(layer, b"large")
        with pytest.raises(OSError) as caught:
            for number in range(33_000, 70_000):
                layer.link(key, directory, b"%d" % number)
        assert caught.value.errno == errno.EMLINK
        most = layer.stat(key).st_nlink
    with by_engine(path) as layer:
        key, directory = find(layer, b"file"), find(layer, b"large")
        assert layer.stat(key).st_nlink == most
        with pytest.raises(OSError) as caught:
            layer.link(key, directory, b"more")
        assert caught.value.errno == errno.EMLINK
        layer.unlink(directory, b"1", None)
        layer.link(key, directory, b"more")
        assert layer.stat(key).st_nlink == most
    assert images.unclean(path) is None


@pytest.mark.parametrize("shape", [MODERN, SMALL], ids=str)
def test_what_the_kernel_left_in_its_log(place: Path, shape: Shape) -> None:
    """The engine replays the journal of an image that the kernel had mounted at a power cut."""
    path, copy = images.make(place / "image", shape), place / "copy"
    with by_kernel(path) as layer:
        _key, file = layer.create(layer.root, b"file", 0o600, 0, 0)
        file.pwrite(b"data" * 1000, 0)
        file.fsync(False)
        file.close()
        os.sync()
        copy.write_bytes(path.read_bytes())
    assert recovery.by_engine(copy) is None
    with by_engine(copy) as layer:
        file = layer.open(find(layer, b"file"), os.O_RDONLY)
        assert file.pread(5000, 0) == b"data" * 1000
        file.close()
    agreed(copy)


@pytest.mark.parametrize("shape", [MODERN, SMALL], ids=str)
def test_the_kernel_recovers_what_the_engine_left(place: Path, shape: Shape) -> None:
    """The kernel recovers an abandoned image, and frees files in use without names."""
    path = images.make(place / "image", shape)
    base = Image(path.read_bytes())
    with engine.opened(path) as opened:
        load = Load(opened.layer, base, 9)
        load.run(300)
        load.commit()
        assert load.model.orphans
        promised = load.model.operation
        load.run(20, commit_every=1000, sync_every=1000)
        opened.image.abandon()
    with by_kernel(path):
        pass
    assert images.unclean(path) is None
    wrong = judge(load.model.states, Promises(promised, load.model.operation), Image(path.read_bytes()))
    assert wrong is None, wrong
