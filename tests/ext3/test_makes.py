"""Changes suit each make of ext3: e2fsck and the kernel agree after every operation."""

from __future__ import annotations

import errno
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from cowfs.layers.base import UpperLayer
from cowfs.store.e2fsprogs import tools
from tests.ext3 import engine, images
from tests.ext3.engine import make_file
from tests.ext3.load import Load
from tests.ext3.makes import MAKES, Make
from tests.ext3.model import Promises, judge
from tests.ext3.operations import ACL, DEFAULT_ACL
from tests.ext3.reader import ROOT, Image
from tests.ext3.test_kernel import agreed, by_engine, by_kernel
from tests.support.listing import find
from tests.support.system import needs_root

each_make = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
NAMES = [
    name % number
    for number in range(1500)
    for name in (b"\xe9\xff%d-\x80", b"n\xc3\xa4me-%d-" + b"\xe4\xb8\xad" * (number % 20))
]
"""UTF-8 and Latin-1 names; the index has two levels with the smallest blocks, one with the largest."""


def small_attribute(layer: UpperLayer) -> None:
    layer.setxattr(make_file(layer, b"file"), b"trusted.overlay.opaque", b"y")


def large_attribute(layer: UpperLayer) -> None:
    layer.setxattr(find(layer, b"file"), "user.\u00e9".encode(), b"v" * 700)


def acl(layer: UpperLayer) -> None:
    layer.setxattr(layer.mkdir(layer.root, b"directory", 0o755, 0, 0), DEFAULT_ACL, ACL)


def no_attribute(layer: UpperLayer) -> None:
    for name in (b"trusted.overlay.opaque", "user.\u00e9".encode()):
        layer.removexattr(find(layer, b"file"), name)


def large_file(layer: UpperLayer) -> None:
    file = layer.open(find(layer, b"file"), os.O_RDWR)
    file.pwrite(b"end", (1 << 31) - 3)  # 2 GiB exactly
    file.close()


def larger_file(layer: UpperLayer) -> None:
    layer.truncate(find(layer, b"file"), (1 << 31) + 1)


def no_large_file(layer: UpperLayer) -> None:
    layer.truncate(find(layer, b"file"), 10)


def many_names(layer: UpperLayer) -> None:
    key, directory = find(layer, b"file"), find(layer, b"directory")
    for name in NAMES:
        layer.link(key, directory, name)


def fewer_names(layer: UpperLayer) -> None:
    directory = find(layer, b"directory")
    for name in NAMES[::3]:
        layer.unlink(directory, name, None)


def renamed(layer: UpperLayer) -> None:
    directory = find(layer, b"directory")
    layer.rename((directory, NAMES[1]), (layer.root, NAMES[1]), 0, find(layer, b"directory", NAMES[1]))
    layer.rename((directory, NAMES[2]), (directory, NAMES[4]), 0, find(layer, b"directory", NAMES[2]))
    layer.rename((layer.root, b"directory"), (layer.root, NAMES[0]), 0, directory)


STEPS: tuple[Callable[[UpperLayer], None], ...] = (
    small_attribute, large_attribute, acl, no_attribute, large_file, larger_file, no_large_file,
    many_names, fewer_names, renamed,
)  # fmt: skip


@each_make
def test_e2fsck_agrees_after_every_operation(place: Path, make: Make) -> None:
    path = make.make(place / "image")
    assert images.unclean(path) is None, "before"
    with engine.opened(path) as opened:
        for step in STEPS:
            step(opened.layer)
            opened.image.suspend()
            wrong = images.unclean(path)
            assert wrong is None, f"{step.__name__}: {wrong}"
            opened.image.resume()
    assert Image(path.read_bytes()).unset_features() == []


@each_make
def test_a_load_on_it(place: Path, make: Make) -> None:
    """Do every operation; compare with the model, the bytes, and the kernel if it can mount the image."""
    path = make.make(place / "image")
    tolerated = frozenset({errno.ENOSPC, errno.EFBIG})
    with engine.opened(path) as opened:
        few = opened.image.facts().inodes < 50
        load = Load(opened.layer, Image(path.read_bytes()), 7, tolerate=tolerated, files=4 if few else 60)
        load.run(150)
        load.check()
        load.release()
    assert images.unclean(path) is None
    number, read = load.model.operation, Image(path.read_bytes())
    assert judge(load.model.states, Promises(number, number), read) is None
    assert read.unset_features() == []


for_kernel = {name: make for name, make in MAKES.items() if make.for_kernel}


@needs_root
@pytest.mark.parametrize("make", for_kernel.values(), ids=for_kernel)
def test_the_kernel_and_the_engine_find_each_others_names(place: Path, make: Make) -> None:
    """Engine and kernel change each other's indexed directories with non-ASCII names."""
    path = make.make(place / "image")
    for turn, side in enumerate((by_engine, by_kernel)):
        with side(path) as layer:
            key = make_file(layer, b"file%d" % turn)
            layer.setxattr(key, "user.\u00e9".encode(), b"v" * 700)
            directory = layer.mkdir(layer.root, b"of%d" % turn, 0o755, 0, 0)
            for name in NAMES:
                layer.link(key, directory, name)
        assert images.unclean(path) is None
    for turn, side in enumerate((by_kernel, by_engine)):
        with side(path) as layer:
            key, directory = find(layer, b"file%d" % turn), find(layer, b"of%d" % turn)
            for name in NAMES:
                assert layer.lookup(directory, name) is not None, name
            for name in NAMES[::2]:
                layer.unlink(directory, name, None)
            for name in NAMES[::2]:
                layer.link(key, directory, name + b"\xff")
            assert layer.getxattr(key, "user.\u00e9".encode()) == b"v" * 700
        assert images.unclean(path) is None
    agreed(path)
    with by_kernel(path) as one:
        kernels = one.statfs()
    with by_engine(path) as two:
        assert two.statfs() == kernels


@each_make
def test_what_a_crash_leaves_is_recovered(place: Path, make: Make) -> None:
    path = make.make(place / "image")
    tolerated = frozenset({errno.ENOSPC, errno.EFBIG})
    with engine.opened(path) as opened:
        few = opened.image.facts().inodes < 50
        load = Load(opened.layer, Image(path.read_bytes()), 8, tolerate=tolerated, files=4 if few else 60)
        load.run(60)
        load.commit()
        promised = load.model.operation
        load.run(20, commit_every=1000, sync_every=1000)
        opened.image.abandon()
    copy = shutil.copyfile(path, place / "copy")
    with engine.opened(copy):  # recovers the image
        pass
    assert images.unclean(copy) is None
    assert images.recover(path) is None
    for recovered in (path, copy):
        read = Image(recovered.read_bytes())
        wrong = judge(load.model.states, Promises(promised, load.model.operation), read)
        assert wrong is None, wrong


@each_make
def test_it_grows_under_its_users(place: Path, make: Make) -> None:
    path = make.make(place / "image")
    with engine.opened(path) as opened:
        layer, before = opened.layer, opened.layer.statfs()
        for step in (small_attribute, acl, many_names):
            step(layer)
        opened.image.suspend()
        os.truncate(path, path.stat().st_size + (24 << 20) & -65536)
        with path.open("r+b") as file:
            tools.resize(file.fileno(), str(path), "-f")
        opened.image.resume()
        assert layer.statfs().blocks > before.blocks
        for step in (large_attribute, fewer_names, renamed):
            step(layer)
    assert images.unclean(path) is None


SEC, LATE = 10**9, (1 << 33) * 10**9 + 5


@needs_root
@pytest.mark.parametrize("extra", [0, 4, 8, 16, 24, 28])
def test_an_inode_with_fewer_fields_than_others(place: Path, extra: int) -> None:
    """Bytes after i_extra_isize are used only for attributes, as in the kernel."""
    path = Make().make(place / "image")
    with by_engine(path) as layer:
        for name in (b"touched", b"dressed"):
            layer.utimens(make_file(layer, name), SEC, SEC)
    read, junk = Image(path.read_bytes()), b"\xab" if extra else b"\0"
    inodes = read.names(read.inode(ROOT))
    data = bytearray(path.read_bytes())
    for name in (b"touched", b"dressed"):
        at = read.place(inodes[name]) + 128
        data[at : at + 128] = struct.pack("<HH", extra, 0) + bytes(extra)[4:] + junk * (128 - max(extra, 4))
    path.write_bytes(data)
    assert images.unclean(path) is None
    agreed_on_times(path, b"touched", b"dressed")
    with by_engine(path) as layer:
        layer.utimens(find(layer, b"touched"), LATE, LATE)
        layer.chmod(find(layer, b"touched"), 0o640)
    read = Image(path.read_bytes())
    assert read.inode(inodes[b"touched"]).raw[128 + max(extra, 4) :] == junk * (128 - max(extra, 4))
    with by_engine(path) as layer:
        layer.setxattr(find(layer, b"dressed"), b"user.x", b"in the inode")
        layer.utimens(find(layer, b"dressed"), LATE, LATE)
    assert images.unclean(path) is None
    agreed_on_times(path, b"touched", b"dressed")
    for side in (by_kernel, by_engine):
        with side(path) as layer:
            assert layer.getxattr(find(layer, b"dressed"), b"user.x") == b"in the inode"


def agreed_on_times(path: Path, *names: bytes) -> None:
    """Engine and kernel read the same attributes."""
    shown = []
    for side in (by_kernel, by_engine):
        with side(path) as layer:
            attrs = [layer.stat(find(layer, name)) for name in names]
            shown.append([(a.st_mode, a.st_atime_ns, a.st_mtime_ns, a.st_ctime_ns, a.st_size) for a in attrs])
    assert shown[0] == shown[1]


def test_the_superblock_has_a_wrong_account_of_what_is_free(place: Path) -> None:
    """As the kernel leaves it after a crash: only the group descriptors are correct."""
    changes = "set_super_value free_blocks_count 0", "set_super_value free_inodes_count 0"
    path = Make(changes=changes).make(place / "image")
    with engine.opened(path, read_only=True) as opened:
        facts = opened.image.facts()
        assert facts.free_blocks > 1000 < facts.free_inodes
    with engine.opened(path) as opened:
        small_attribute(opened.layer)
        large_file(opened.layer)
    assert images.unclean(path) is None
