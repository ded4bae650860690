"""LowerLayer: a layer shows the same as the kernel shows of the same tree."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cowfs.layers.base import File, Key, LowerLayer
from cowfs.layers.directory import open_directory
from cowfs.types import FileHandle
from tests.contract.factories import Kind
from tests.support import tree
from tests.support.listing import names_of
from tests.support.tree import Node, directory, link, symlink

BIG = bytes(range(256)) * 2000
TREE: tree.Tree = {
    "file": b"content\n",
    "empty": b"",
    "big": BIG,
    "sparse": Node(data=b"start", size=3 << 20),
    "dir/sub/deep/leaf": b"leaf\n",
    "dir/other": b"other\n",
    "emptydir": directory(0o1755),
    "linked": b"linked\n",
    "dir/alias": link("linked"),
    "sym": symlink("dir/other"),
    "longsym": symlink("x" * 1000),
    "dangling": symlink("nowhere"),
    "fifo": Node("fifo"),
    "socket": Node("socket"),
    "n" * 255: b"long name\n",
    "new\nline": b"n\n",
    os.fsdecode(b"not \xff utf-8"): b"u\n",
    "moded": Node(data=b"m", mode=0o6751),
    "dressed": Node(data=b"d", xattrs={"user.color": b"red\0", "user.empty": b""}),
    "dresseddir": directory(xattrs={"user.place": b"here"}),
}
FOR_ROOT: tree.Tree = {
    "char": Node("char", rdev=os.makedev(1, 3)),
    "block": Node("block", rdev=os.makedev(259, 70000)),
    "whiteout": tree.whiteout(),
    "owned": Node(data=b"o", uid=70000, gid=80000),
    "trusted": Node(data=b"t", xattrs={"trusted.overlay.opaque": b"y", "security.test": b"s"}),
}


class Place:
    """A layer, and the directory that it must equal."""

    def __init__(self, layer: LowerLayer, path: Path, kind: Kind) -> None:
        self.layer = layer
        self.path = path
        self.kind = kind

    def find(self, path: str) -> Key:
        """Return the key of a path below the root."""
        key = self.layer.root
        for name in filter(None, path.split("/")):
            found = self.layer.lookup(key, os.fsencode(name))
            assert found is not None, f"{path!r} is not found"
            key = found[0]
        return key

    def paths(self) -> Iterator[str]:
        """Return every path of the tree."""
        for folder, names, files in os.walk(self.path):
            for name in names + files:
                yield os.path.relpath(os.path.join(folder, name), self.path)


@pytest.fixture
def place(lower_kind: Kind, tmp_path: Path, nobody_path: Path) -> Iterator[Place]:
    """The tree, opened as a layer of each kind."""
    base = tmp_path / "tree" if lower_kind.privileged else nobody_path / "tree"
    contents = {**TREE, **FOR_ROOT} if lower_kind.privileged else TREE
    tree.build(base, contents)
    assert lower_kind.lower
    with lower_kind.lower(base) as layer:
        yield Place(layer, base, lower_kind)


def test_lookup_finds_everything(place: Place) -> None:
    for path in place.paths():
        assert place.find(path) is not None


@pytest.mark.parametrize("name", [b"missing", b"File", b"m" * 255, b"\xff", b"n" * 254])
def test_lookup_of_a_missing_name_is_none(place: Place, name: bytes) -> None:
    assert place.layer.lookup(place.layer.root, name) is None


def test_lookup_of_a_name_too_long(place: Place) -> None:
    with pytest.raises(OSError) as caught:
        place.layer.lookup(place.layer.root, b"n" * 256)
    assert caught.value.errno == errno.ENAMETOOLONG


def test_lookup_in_a_file(place: Place) -> None:
    with pytest.raises(OSError) as caught:
        place.layer.lookup(place.find("file"), b"x")
    assert caught.value.errno == errno.ENOTDIR


def test_attributes(place: Place) -> None:
    for path in [".", *place.paths()]:
        attr = place.layer.stat(place.find("" if path == "." else path))
        real = os.lstat(place.path / path)
        for name in ("st_mode", "st_uid", "st_gid"):
            assert getattr(attr, name) == getattr(real, name), f"{path}: {name}"
        tick = place.kind.tick_ns
        assert attr.st_mtime_ns == real.st_mtime_ns // tick * tick
        if stat.S_ISREG(real.st_mode) or stat.S_ISLNK(real.st_mode):
            assert attr.st_size == real.st_size, path
        if not stat.S_ISDIR(real.st_mode):
            assert attr.st_nlink == real.st_nlink, path
            assert attr.st_rdev == real.st_rdev, path


def test_lookup_gives_the_attributes_too(place: Place) -> None:
    for name in os.listdir(place.path):
        found = place.layer.lookup(place.layer.root, os.fsencode(name))
        assert found is not None
        key, attr = found
        again = place.layer.stat(key)
        assert (attr.st_ino, attr.st_mode, attr.st_size) == (again.st_ino, again.st_mode, again.st_size)


def test_inode_numbers(place: Place) -> None:
    """A key is the same for all names of an inode and at each lookup, and different for each inode."""
    seen: dict[int, tuple[int, int]] = {}
    for path in place.paths():
        ino = place.layer.stat(place.find(path)).st_ino
        real = os.lstat(place.path / path)
        assert seen.setdefault(ino, (real.st_dev, real.st_ino)) == (real.st_dev, real.st_ino), path
        assert place.layer.stat(place.find(path)).st_ino == ino
        assert place.layer.stat(place.find(path)).st_dev == place.layer.dev
    assert len(seen) == len({os.lstat(place.path / path).st_ino for path in place.paths()})


def test_readdir_lists_each_name_once(place: Place) -> None:
    for folder in ("", "dir", "dir/sub", "emptydir"):
        entries = place.layer.readdir(place.find(folder))
        names = [os.fsdecode(entry.name) for entry in entries]
        assert sorted(names) == sorted(os.listdir(place.path / folder))
        for entry in entries:
            mode = os.lstat(os.path.join(place.path, folder, os.fsdecode(entry.name))).st_mode
            assert entry.type in {0, stat.S_IFMT(mode)}


def test_readdir_of_a_file(place: Place) -> None:
    with pytest.raises(OSError) as caught:
        place.layer.readdir(place.find("file"))
    assert caught.value.errno == errno.ENOTDIR


def test_readlink(place: Place) -> None:
    for name in ("sym", "longsym", "dangling"):
        assert place.layer.readlink(place.find(name)) == os.fsencode(os.readlink(place.path / name))
    with pytest.raises(OSError) as caught:
        place.layer.readlink(place.find("file"))
    assert caught.value.errno == errno.EINVAL


def test_xattrs(place: Place) -> None:
    for path in place.paths():
        key = place.find(path)
        names = [n for n in os.listxattr(place.path / path, follow_symlinks=False) if n != "security.selinux"]
        listed = [os.fsdecode(n) for n in place.layer.listxattr(key) if n != b"security.selinux"]
        assert sorted(listed) == sorted(names), path
        for name in names:
            real = os.getxattr(place.path / path, name, follow_symlinks=False)
            assert place.layer.getxattr(key, os.fsencode(name)) == real
    for path in ("file", "dressed", "dir", "sym"):
        with pytest.raises(OSError) as caught:
            place.layer.getxattr(place.find(path), b"user.none")
        assert caught.value.errno in {errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM}


@pytest.mark.parametrize("name", ["file", "empty", "big", "sparse", "n" * 255])
def test_content(place: Place, name: str) -> None:
    real = (place.path / name).read_bytes()
    file = place.layer.open(place.find(name), os.O_RDONLY)
    try:
        assert file.pread(len(real) + 10, 0) == real
        for offset, size in ((0, 1), (1, 100), (4095, 2), (130_000, 70_000), (len(real) - 1, 5)):
            if offset >= 0:
                assert file.pread(size, offset) == real[offset : offset + size]
        assert file.pread(10, len(real)) == b""
        assert file.pread(10, len(real) + (1 << 30)) == b""
        assert file.pread(0, 0) == b""
        assert file.stat().st_size == len(real)
    finally:
        file.close()
        file.close()


@pytest.mark.parametrize("name", ["file", "empty", "big", "sparse"])
def test_segments_hold_all_the_data(place: Place, name: str) -> None:
    real = (place.path / name).read_bytes()
    file = place.layer.open(place.find(name), os.O_RDONLY)
    try:
        rebuilt = bytearray(len(real))
        before = 0
        for start, stop in file.segments(len(real)):
            assert before <= start < stop <= len(real)
            rebuilt[start:stop] = file.pread(stop - start, start)
            before = stop
        assert bytes(rebuilt) == real
        assert all(stop <= 3 for _start, stop in file.segments(3))
        for begin in {0, 3, len(real) // 2, max(len(real) - 1, 0), len(real)}:
            rest = bytearray(len(real))
            for start, stop in file.segments(len(real), begin):
                rest[start:stop] = real[start:stop]
            assert rest[begin:] == real[begin:]
    finally:
        file.close()


@pytest.mark.parametrize("name", ["file", "empty", "big", "sparse"])
@pytest.mark.parametrize("size", [None, 0, 3, 200_000])
def test_copying_a_file_out(place: Place, name: str, size: int | None) -> None:
    """Copy all of a file, or its beginning, to another layer's file; holes stay holes."""
    real = (place.path / name).read_bytes()
    wanted = len(real) if size is None else min(size, len(real))
    with open_there(place.path.parent / "target") as target:
        file = place.layer.open(place.find(name), os.O_RDONLY)
        try:
            file.copy_to(target, wanted if size is not None else None)
        finally:
            file.close()
        assert target.stat().st_size == wanted
        assert target.pread(len(real) + 1, 0) == real[:wanted]
        assert target.stat().st_blocks * 512 < 1 << 20 or name != "sparse"


@contextmanager
def open_there(directory: Path) -> Iterator[File]:
    """Return a new file of a directory layer, to copy to."""
    directory.mkdir()
    layer = open_directory(str(directory))
    _key, file = layer.create(layer.root, b"copy", 0o600, os.geteuid(), os.getegid())
    try:
        yield file
    finally:
        file.close()
        layer.close()


def test_a_lower_file_cannot_be_written(place: Place) -> None:
    file = place.layer.open(place.find("file"), os.O_RDONLY)
    try:
        with pytest.raises(OSError) as caught:
            file.pwrite(b"x", 0)
        assert caught.value.errno == errno.EBADF
    finally:
        file.close()
    assert (place.path / "file").read_bytes() == b"content\n"


def test_handles_name_inodes(place: Place) -> None:
    handles: dict[FileHandle, int] = {}
    for path in place.paths():
        key = place.find(path)
        handle = place.layer.handle(key)
        if handle is None:
            pytest.skip("this layer has no file handles")
        ino = place.layer.stat(key).st_ino
        assert place.layer.handle_ino(handle) == ino
        assert handles.setdefault(handle, ino) == ino
        assert place.layer.handle(place.find(path)) == handle


def test_foreign_handles_name_nothing(place: Place) -> None:
    handle = place.layer.handle(place.find("file"))
    if handle is None:
        pytest.skip("this layer has no file handles")
    assert place.layer.handle_ino(handle._replace(uuid=bytes(15) + b"\1")) is None
    assert place.layer.handle_ino(FileHandle(0xFF, b"?", handle.uuid)) is None


def test_names(place: Place) -> None:
    for folder in ("", "dir", "emptydir"):
        key = place.find(folder)
        assert sorted(names_of(place.layer, key)) == sorted(entry.name for entry in place.layer.readdir(key))


def test_statfs(place: Place) -> None:
    stats = place.layer.statfs()
    assert stats.bsize > 0
    assert stats.frsize > 0
    assert stats.blocks > 0
    assert stats.namemax in {255, 256}  # squashfs has 256, like the kernel
    assert stats.bavail <= stats.bfree <= stats.blocks


def test_deep_directories(place: Place) -> None:
    """Lookups step by step work with paths of any length."""
    key, names = place.layer.root, []
    for name in (b"dir", b"sub", b"deep"):
        found = place.layer.lookup(key, name)
        assert found is not None
        key = found[0]
        names.append([entry.name for entry in place.layer.readdir(key)])
    assert names[-1] == [b"leaf"]


def test_many_keys_stay_valid(tmp_path: Path, nobody_path: Path, lower_kind: Kind) -> None:
    """Use more directories than a layer may keep open."""
    base = tmp_path / "wide" if lower_kind.privileged else nobody_path / "wide"
    tree.build(base, {f"d{number}/sub/file": b"%d" % number for number in range(700)})
    assert lower_kind.lower
    with lower_kind.lower(base) as layer:
        here = Place(layer, base, lower_kind)
        keys = [here.find(f"d{number}/sub") for number in range(700)]
        before = len(os.listdir("/proc/self/fd"))
        for number in (*range(700), *range(0, 700, 7)):
            found = layer.lookup(keys[number], b"file")
            assert found is not None
            file = layer.open(found[0], os.O_RDONLY)
            assert file.pread(10, 0) == b"%d" % number
            file.close()
        for key in keys:
            layer.forget(key)
        assert len(os.listdir("/proc/self/fd")) <= max(before, 1100)
