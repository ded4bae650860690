"""Ext3Layer and the kernel's ext3 read exactly what the other has written."""

from __future__ import annotations

import errno
import os
import random
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cowfs.layers.base import Key, LowerLayer, UpperLayer
from cowfs.layers.directory import open_directory
from cowfs.layers.ext3 import Ext3Layer
from cowfs.layers.squashfs import SquashfsLayer
from tests.contract.test_upper import fails
from tests.support import ext3
from tests.support.listing import find, names_of
from tests.support.system import run

T0 = 1_400_000_000_123_456_789
EXCHANGE, WHITEOUT = 2, 4
SEED = "hash_seed=01234567-89ab-cdef-0123-456789abcdef"
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)


def posix_acl(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NOBODY = 0xFFFFFFFF
ACL = posix_acl(
    (1, 7, NOBODY), (2, 6, 1000), (2, 1, 70000), (4, 5, NOBODY), (8, 4, 50), (16, 7, NOBODY), (32, 0, NOBODY)
)
MINIMAL_ACL = posix_acl((1, 6, NOBODY), (4, 0, NOBODY), (32, 4, NOBODY))


@pytest.fixture(autouse=True)
def no_umask() -> Iterator[None]:
    """Set the umask of the daemon."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def layer(tmp_path: Path) -> Iterator[Ext3Layer]:
    with ext3.opened(ext3.make(tmp_path / "image")) as opened:
        yield opened


def put(layer: UpperLayer, directory: Key, name: bytes, *parts: tuple[int, bytes], mode: int = 0o644) -> Key:
    """Create a file with data at these offsets."""
    key, file = layer.create(directory, name, mode, 0, 0)
    for offset, data in parts:
        file.pwrite(data, offset)
    file.close()
    return key


def content(layer: LowerLayer, key: Key) -> bytes:
    file = layer.open(key, os.O_RDONLY)
    try:
        return file.pread(16 << 20, 0)
    finally:
        file.close()


# --- life cycles


def test_an_open_file_outlives_its_name(layer: Ext3Layer) -> None:
    free = layer.statfs().ffree
    put(layer, layer.root, b"file", (0, b"content"))
    file = layer.open(find(layer, b"file"), os.O_RDWR)
    layer.unlink(layer.root, b"file", None)
    another = put(layer, layer.root, b"another")
    assert file.stat().st_nlink == 0
    assert file.pread(10, 0) == b"content"
    assert file.pwrite(b"!", 7) == 1
    layer.sync()
    assert layer.statfs().ffree == free - 2
    file.close()
    assert layer.statfs().ffree == free - 1
    layer.unlink(layer.root, b"another", None)
    layer.forget(another)
    assert layer.statfs().ffree == free


def test_only_the_key_that_was_told_of_keeps_an_inode(layer: Ext3Layer) -> None:
    """Keys from earlier lookups are still forgotten correctly."""
    mine = put(layer, layer.root, b"file", (0, b"content"))
    theirs = find(layer, b"file")
    assert mine == theirs
    layer.unlink(layer.root, b"file", mine)
    layer.forget(theirs)
    assert content(layer, mine) == b"content"
    free = layer.statfs().ffree
    layer.forget(mine)
    assert layer.statfs().ffree == free + 1
    with fails(errno.ESTALE):
        layer.stat(mine)


def test_what_is_replaced_lives_on(layer: Ext3Layer) -> None:
    put(layer, layer.root, b"old", (0, b"old"))
    put(layer, layer.root, b"new", (0, b"new"))
    file = layer.open(find(layer, b"old"), os.O_RDONLY)
    layer.rename((layer.root, b"new"), (layer.root, b"old"))
    assert file.pread(10, 0) == b"old"
    assert content(layer, find(layer, b"old")) == b"new"
    file.close()


def test_nothing_is_made_in_a_removed_directory(layer: Ext3Layer) -> None:
    folder = layer.mkdir(layer.root, b"d", 0o755, 0, 0)
    key = put(layer, layer.root, b"f")
    layer.rmdir(layer.root, b"d", folder)
    with fails(errno.ENOENT):
        layer.link(key, folder, b"x")
    with fails(errno.ENOENT):
        layer.rename((layer.root, b"f"), (folder, b"x"))
    assert (layer.stat(folder).st_nlink, layer.names(folder)) == (0, [])


def test_a_number_that_is_used_again_is_another_inodes(layer: Ext3Layer) -> None:
    old = layer.mkdir(layer.root, b"d", 0o755, 0, 0)
    layer.chmod(old, 0o2755)
    layer.chown(old, -1, 7)
    put(layer, old, b"x")
    layer.unlink(old, b"x", None)
    layer.rmdir(layer.root, b"d", old)
    assert layer.names(old) == []
    layer.forget(old)
    makers: list[Callable[[bytes], int]] = [
        lambda n: put(layer, layer.root, n),
        lambda n: layer.mkdir(layer.root, n, 0o755, 0, 0),
    ]
    for number, make in enumerate(makers):
        key, name = 0, b""
        for other in range(100):
            name = b"%d-%d" % (number, other)
            key = make(name)
            if key == old:
                break
        assert key == old, "the number comes again"
        if number == 0:
            with fails(errno.ENOTDIR):
                layer.names(key)
            layer.unlink(layer.root, name, None)
        else:
            assert layer.stat(put(layer, key, b"x")).st_gid == 0


def test_a_nameless_inode_gets_no_name(layer: Ext3Layer) -> None:
    key = put(layer, layer.root, b"f")
    layer.unlink(layer.root, b"f", key)
    with fails(errno.ENOENT):
        layer.link(key, layer.root, b"f")


def test_files_are_freed_when_the_layer_is_closed(tmp_path: Path) -> None:
    image = ext3.make(tmp_path / "image")
    with ext3.opened(image) as layer:
        free = layer.statfs().ffree
        layer.unlink(layer.root, b"x", put(layer, layer.root, b"x", (0, bytes(1 << 20))))
    with ext3.opened(image) as layer:
        assert layer.statfs().ffree == free


# --- files


def test_many_threads_write_one_file(layer: Ext3Layer) -> None:
    piece = 200_003
    parts = [bytes([number]) * piece for number in range(40)]
    key, file = layer.create(layer.root, b"f", 0o644, 0, 0)
    with ThreadPoolExecutor(8) as pool:
        assert set(
            pool.map(lambda n: file.pwrite(parts[n], n * piece), random.Random(1).sample(range(40), 40))
        )
    assert content(layer, key) == b"".join(parts)
    file.close()


def test_syncing_while_others_write(layer: Ext3Layer) -> None:
    """Any thread may call sync and File.fsync at any time."""
    stop = threading.Event()

    def sync() -> int:
        count = 0
        while not stop.is_set():
            layer.sync()
            count += 1
        return count

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(sync) for _ in range(2)]
        for number in range(100):
            key, file = layer.create(layer.root, b"f%d" % number, 0o644, 0, 0)
            file.pwrite(b"x" * number, 0)
            file.fsync(number % 2 == 0)
            file.close()
            layer.rename((layer.root, b"f%d" % number), (layer.root, b"g%d" % number))
            layer.forget(key)
        stop.set()
        assert all(future.result() for future in running)
    assert {b"g%d" % number for number in range(100)} <= set(names_of(layer, layer.root))


def test_copies_keep_their_holes(layer: Ext3Layer, tmp_path: Path) -> None:
    """Copies to and from files of the kernel, and from a squashfs."""
    noise = random.Random(3).randbytes(3 << 20)
    (tmp_path / "tree").mkdir()
    with (tmp_path / "tree/file").open("wb") as out:
        out.write(noise)
        out.seek(20 << 20)
        out.write(b"end")
    wanted = (tmp_path / "tree/file").read_bytes()
    run("mksquashfs", tmp_path / "tree", tmp_path / "squash", "-quiet", "-no-progress")
    sources: list[LowerLayer] = [
        open_directory(str(tmp_path / "tree")),
        SquashfsLayer(str(tmp_path / "squash")),
    ]
    key = 0
    for number, source in enumerate(sources):
        file = source.open(find(source, b"file"), os.O_RDONLY)
        key, target = layer.create(layer.root, b"copy%d" % number, 0o600, 0, 0)
        file.copy_to(target)
        file.close()
        assert target.stat().st_size == len(wanted)
        assert target.pread(len(wanted), 0) == wanted
        assert target.stat().st_blocks * 512 < 4 << 20
        target.close()
        source.close()
    ours = layer.open(key, os.O_RDONLY)
    back = open_directory(str(tmp_path))
    _, out_file = back.create(back.root, b"back", 0o600, os.geteuid(), os.getegid())
    ours.copy_to(out_file)
    out_file.close()
    ours.close()
    back.close()
    assert (tmp_path / "back").read_bytes() == wanted
    assert (tmp_path / "back").stat().st_blocks * 512 < 4 << 20


@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC])
def test_a_synchronous_file_is_on_disk_after_each_write(tmp_path: Path, flag: int) -> None:
    image = ext3.make(tmp_path / "image")
    with ext3.opened(image, commit_seconds=0) as layer:
        key = put(layer, layer.root, b"f")
        file = layer.open(key, os.O_RDWR | flag)
        file.pwrite(b"there", 0)
        (tmp_path / "crashed").write_bytes(image.read_bytes())
        file.close()
    run("e2fsck", "-p", tmp_path / "crashed", check=False)
    with ext3.opened(tmp_path / "crashed") as layer:
        assert content(layer, find(layer, b"f")) == b"there"


def test_opening_what_is_no_file(layer: Ext3Layer) -> None:
    with fails(errno.EISDIR):
        layer.open(layer.root, os.O_RDONLY)
    with fails(errno.ELOOP):
        layer.open(layer.symlink(layer.root, b"s", b"t", 0, 0), os.O_RDONLY)
    with fails(errno.ENXIO):
        layer.open(layer.mknod(layer.root, b"p", stat.S_IFIFO | 0o600, 0, 0, 0), os.O_RDONLY)
    with fails(errno.ENOTDIR):
        layer.open_directory(put(layer, layer.root, b"f"))


# --- refused operations


@pytest.mark.parametrize(
    "call",
    [
        lambda layer, key: layer.setxattr(key, b"user.x", b""),
        lambda layer, key: layer.removexattr(key, b"user.x"),
    ],
)
def test_user_attributes_are_for_files_and_directories(layer: Ext3Layer, call: object) -> None:
    assert callable(call)
    with fails(errno.EPERM):
        call(layer, layer.symlink(layer.root, b"s", b"t", 0, 0))


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (b"x", errno.EINVAL),
        (struct.pack("<I", 1), errno.EOPNOTSUPP),
        (posix_acl((1, 7, 0)), errno.EINVAL),
        (posix_acl((1, 7, 0), (2, 7, 5), (4, 7, 0), (32, 7, 0)), errno.EINVAL),
        (posix_acl((4, 7, 0), (1, 7, 0), (32, 7, 0)), errno.EINVAL),
        (posix_acl((1, 9, 0), (4, 7, 0), (32, 7, 0)), errno.EINVAL),
    ],
    ids=["short", "version 1", "cut off", "without a mask", "disorder", "permissions"],
)
def test_acls_that_are_none(layer: Ext3Layer, value: bytes, code: int) -> None:
    key = put(layer, layer.root, b"f")
    with fails(code):
        layer.setxattr(key, b"system.posix_acl_access", value)
    assert layer.listxattr(key) == []


def test_a_read_only_layer_changes_nothing(tmp_path: Path) -> None:
    image = ext3.make(tmp_path / "image")
    with ext3.opened(image) as layer:
        put(layer, layer.root, b"f", (0, b"x"))
    before = image.read_bytes()
    with ext3.opened(image, read_only=True) as layer:
        key = find(layer, b"f")
        assert content(layer, key) == b"x"
        for call in (
            lambda: layer.create(layer.root, b"n", 0o600, 0, 0),
            lambda: layer.unlink(layer.root, b"f", None),
            lambda: layer.chmod(key, 0o600),
            lambda: layer.open(key, os.O_RDWR),
        ):
            with fails(errno.EROFS):
                call()
    assert image.read_bytes() == before


# --- growing while in use


def test_an_image_grows_while_it_is_used(tmp_path: Path) -> None:
    """Files stay open, even without names, and keys stay valid."""
    image = ext3.make(tmp_path / "image", size=32 << 20)
    with ext3.opened(image) as layer:
        place = layer.mkdir(layer.root, b"work", 0o700, 0, 0)
        kept = put(layer, layer.root, b"kept", (0, b"kept"))
        opened = layer.open(kept, os.O_RDWR)
        gone = put(layer, layer.root, b"gone", (0, b"gone"))
        nameless = layer.open(gone, os.O_RDWR)
        layer.unlink(layer.root, b"gone", None)
        folder = layer.mkdir(layer.root, b"folder", 0o755, 0, 0)
        layer.rmdir(layer.root, b"folder", folder)
        before = layer.statfs()

        layer.suspend(place)
        os.truncate(image, 96 << 20)
        run("e2fsck", "-fp", image)
        run("resize2fs", "-f", image)
        layer.resume(place)

        after = layer.statfs()
        assert after.blocks > 2.5 * before.blocks
        assert after.ffree - before.ffree == after.files - before.files
        assert (opened.pread(10, 0), nameless.pread(10, 0)) == (b"kept", b"gone")
        assert (layer.stat(gone).st_nlink, layer.stat(folder).st_nlink) == (0, 0)
        assert names_of(layer, place) == []
        assert opened.pwrite(bytes(40 << 20), 0) == 40 << 20
        for file in (opened, nameless):
            file.close()
        layer.forget(folder)
        assert layer.statfs().ffree == after.ffree + 2
        assert layer.stat(place).st_nlink == 2


def test_an_image_moves_while_it_is_suspended(tmp_path: Path) -> None:
    image, other = ext3.make(tmp_path / "image"), tmp_path / "other"
    with ext3.opened(image) as layer:
        place = layer.mkdir(layer.root, b"work", 0o700, 0, 0)
        layer.suspend(place)
        ext3.sound(image)
        run("cp", "--sparse=always", image, other)
        with other.open("r+b") as moved:
            layer.resume(place, moved.fileno())
        put(layer, layer.root, b"f", (0, b"x"))
    with ext3.opened(other) as layer:
        assert content(layer, find(layer, b"f")) == b"x"


def test_a_full_image_cannot_hide_its_nameless_and_goes_on(tmp_path: Path) -> None:
    image = ext3.make(tmp_path / "image", block_size=1024, size=16 << 20)
    with ext3.opened(image) as layer:
        place = layer.mkdir(layer.root, b"p" * 200, 0o700, 0, 0)
        while layer.stat(place).st_size == 1024 and len(names_of(layer, place)) < 3:
            put(layer, place, b"%0250d" % len(names_of(layer, place)))
        keys = [put(layer, layer.root, b"f%d" % number) for number in range(20)]
        for number, key in enumerate(keys):
            layer.unlink(layer.root, b"f%d" % number, key)
        _, file = layer.create(layer.root, b"big", 0o600, 0, 0)
        with fails(errno.ENOSPC):
            for at in range(0, 1 << 30, 1024):
                file.pwrite(bytes(1024), at)
        with fails(errno.ENOSPC):
            layer.suspend(place)
        assert len(names_of(layer, place)) == 3
        assert {layer.stat(key).st_nlink for key in keys} == {0}
        file.close()


def test_what_is_inherited_may_change(layer: Ext3Layer) -> None:
    """The inherited attributes of a directory are cached only while they are valid."""
    folder = layer.mkdir(layer.root, b"d", 0o755, 0, 0)

    def inherited(name: bytes) -> tuple[int, bool]:
        key = put(layer, folder, name)
        return layer.stat(key).st_gid, b"system.posix_acl_access" in layer.listxattr(key)

    assert inherited(b"1") == (0, False)
    layer.chmod(folder, 0o2755)
    layer.chown(folder, -1, 7)
    assert inherited(b"2") == (7, False)
    layer.chown(folder, -1, 8)
    assert inherited(b"3") == (8, False)
    layer.setxattr(folder, b"system.posix_acl_default", ACL)
    assert inherited(b"4") == (8, True)
    layer.removexattr(folder, b"system.posix_acl_default")
    layer.chmod(folder, 0o755)
    assert inherited(b"5") == (0, False)


def test_nothing_comes_to_disk_without_its_acl(tmp_path: Path) -> None:
    """Both are one change, in one record of the redo log."""
    image, crashed = ext3.make(tmp_path / "image"), tmp_path / "crashed"
    with ext3.opened(image, commit_seconds=0) as layer:
        folder = layer.mkdir(layer.root, b"d", 0o755, 0, 0)
        layer.setxattr(folder, b"system.posix_acl_default", ACL)
        layer.sync()
        layer.mkdir(folder, b"made", 0o755, 0, 0)
        crashed.write_bytes(image.read_bytes())
    with ext3.opened(crashed) as layer:
        assert layer.image.facts().redone == 1
        found = layer.lookup(folder, b"made")
        assert found is not None
        assert {*layer.listxattr(found[0])} == {b"system.posix_acl_access", b"system.posix_acl_default"}


def test_a_file_without_room_for_its_acl_is_none(tmp_path: Path) -> None:
    image = ext3.make(tmp_path / "image", inode_size=128, size=16 << 20)
    with ext3.opened(image) as layer:
        folder = layer.mkdir(layer.root, b"d", 0o755, 0, 0)
        layer.setxattr(folder, b"system.posix_acl_default", ACL)
        _, file = layer.create(layer.root, b"big", 0o600, 0, 0)
        with fails(errno.ENOSPC):
            for at in range(0, 1 << 30, 4096):
                file.pwrite(bytes(4096), at)
        free, before = layer.statfs().ffree, layer.stat(folder)
        with fails(errno.ENOSPC):
            put(layer, folder, b"f")
        with fails(errno.ENOSPC):
            layer.mkdir(folder, b"f", 0o755, 0, 0)
        assert (layer.names(folder), layer.statfs().ffree) == ([], free)
        assert layer.stat(folder).st_mtime_ns == before.st_mtime_ns
        layer.unlink(layer.root, b"big", None)
        file.close()
        assert layer.listxattr(put(layer, folder, b"f")) == [b"system.posix_acl_access"], (
            "there is room at once"
        )
