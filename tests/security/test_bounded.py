"""No content of an image costs unbounded time or memory: walks end, and say why."""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from cowfs.formats.ext3.directory import LARGE
from cowfs.layers.ext3 import Ext3Layer
from cowfs.layers.ext3_file import Key
from cowfs.overlay.file import seek
from cowfs.overlay.handle import Handle
from cowfs.overlay.node import Node
from tests.ext3 import images
from tests.ext3.reader import Image as Reader
from tests.support.direct import Direct
from tests.support.ext3 import open_ext3
from tests.support.mounts import Mounted, cowfs, mounted, project_root
from tests.support.squashforge import Entry, Forge, place
from tests.support.system import needs_fuse, needs_root, run

pytestmark = pytest.mark.timeout(60)

# -- directories that are in two places


def tree(top: Path) -> Path:
    """Make the content of the image: a store of the kernel's overlayfs."""
    for name in ("upper/a/b/c", "upper/x", "upper/y", "upper/big", "work"):
        (top / name).mkdir(parents=True)
    (top / "upper/a/file").write_text("text")
    return top


def debugfs(image: Path, *requests: str) -> None:
    for request in requests:
        run("debugfs", "-w", "-R", request, image)


LOOPS: dict[str, tuple[tuple[str, ...], str]] = {
    "itself": (("ln /upper/a /upper/a/again",), "upper/a/again"),
    "above": (("ln /upper/a /upper/a/b/c/again",), "upper/a/b/c/again"),
    "the root": (("ln / /upper/a/again",), "upper/a/again"),
    "the root in itself": (("ln / /again",), "again"),
    "elsewhere": (("ln /upper/a /upper/x/again",), "upper/x/again"),
    "twice in one": (("ln /upper/a/b /upper/a/again",), "upper/a/again"),
    "each in the other": (
        ("ln /upper/x /upper/y/x", "ln /upper/y /upper/x/y", "unlink /upper/y"),
        "upper/x/y",
    ),
}
"""The damage to the image, and the name that then leads elsewhere."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bounded")
    return images.make(place / "image", images.Shape(1024, mib=20, journal=4), tree(place / "tree"))


@pytest.fixture
def image(original: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "image"
    run("cp", "--sparse=always", original, copy)
    return copy


def walk(layer: Ext3Layer, most: int = 1000) -> tuple[int, list[tuple[str, int]]]:
    """Look at every name: how many there were, and which of them failed with what."""
    failed, count, waiting = [], 0, [(layer.root, "")]
    while waiting:
        directory, path = waiting.pop()
        for name, _ in layer.readdir(directory):
            count += 1
            assert count < most, "the walk does not end"
            here = f"{path}/{os.fsdecode(name)}".lstrip("/")
            try:
                found = layer.lookup(directory, name)
            except OSError as error:
                failed.append((here, error.errno or 0))
                continue
            if found is not None and stat.S_ISDIR(found[1].st_mode):
                waiting.append((found[0], here))
    return count, failed


@pytest.mark.parametrize("kind", LOOPS)
def test_a_directory_is_in_one_place(image: Path, kind: str) -> None:
    requests, name = LOOPS[kind]
    debugfs(image, *requests)
    layer = open_ext3(str(image), read_only=True)
    try:
        _, failed = walk(layer)
    finally:
        layer.close()
    assert (name, errno.EUCLEAN) in failed
    assert {code for _, code in failed} == {errno.EUCLEAN}
    assert len(failed) <= 2


@needs_root
@pytest.mark.parametrize("kind", LOOPS)
def test_diff_of_a_loop_ends_and_says_why(image: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "lower").mkdir()
    debugfs(image, *LOOPS[kind][0])
    done = cowfs("diff", image, "--lower", tmp_path / "lower", timeout=20)
    if kind == "the root in itself":  # which is no store then
        assert done.returncode
        return
    assert done.returncode == 2, done
    assert f"{image}: damaged: directory " in done.stderr
    assert done.stderr.count("\n") == 1


@needs_root
@needs_fuse
@pytest.mark.parametrize("kind", ["itself", "elsewhere", "twice in one", "the root"])
def test_a_mounted_loop_is_an_error_there_alone(image: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "lower").mkdir()
    requests, name = LOOPS[kind]
    debugfs(image, *requests)
    with mounted(tmp_path / "lower", tmp_path / "at", image, quiet=False) as here:
        name = name.removeprefix("upper/")
        with pytest.raises(OSError) as caught:
            os.stat(here.path / name)
        assert caught.value.errno == errno.EUCLEAN
        found = run("find", here.path, timeout=20, check=False)
        assert found.stdout.count("\n") < 20
        run("du", "-s", here.path, timeout=20, check=False)
        os.rename(here.path / "x", here.path / "a/x" if kind != "elsewhere" else here.path / "y/x")
        assert (here.path / "a/file").read_text() == "text"
        for _ in range(100):
            os.listdir(here.path / "a")
        assert here.log.read_text().count(" ERROR ") == 1
        assert here.log.read_text().count("\n") < 10


def test_who_moves_directories_in_a_lower_makes_no_circle(tmp_path: Path) -> None:
    """The owner moves two directories into each other, one after the other, while it is mounted."""
    lower = tmp_path / "lower"
    (lower / "a/b").mkdir(parents=True)
    (tmp_path / "store").mkdir()
    union = Direct(str(tmp_path / "store"), [str(lower)])
    try:
        union.mkdir("made")
        a, b = union.find("a"), union.find("a/b")
        union.fs.readdir(b)
        for _ in range(3):
            os.rename(lower / "a/b", lower / "b")
            os.rename(lower / "a", lower / "b/a")
            a = look_up(union, b, b"a") or a
            os.rename(lower / "b/a", lower / "a")
            os.rename(lower / "b", lower / "a/b")
            b = look_up(union, a, b"b") or b
        for node in (a, b):
            steps, walk = 0, node
            while walk.parent is not None:
                steps, walk = steps + 1, walk.parent
                assert steps < 20, "it is above itself"
        with suppress(OSError):
            union.fs.rename(union.fs.root, b"made", b, b"made")
    finally:
        union.close()


def look_up(union: Direct, directory: Node, name: bytes) -> Node | None:
    try:
        found = union.fs.lookup(directory, name)
    except OSError:
        return None
    if found is None:
        return None
    union.fs.readdir(found[0])  # so that the layer holds on to it
    return union.take(found[0])


# -- numbers


class Forged:
    """An image whose bytes are changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = bytearray(path.read_bytes())
        self.image = Reader(self.data)
        self.size = len(self.data)

    def __enter__(self) -> Forged:
        return self

    def __exit__(self, *_: object) -> None:
        self.path.write_bytes(self.data)
        if self.size > len(self.data):
            os.truncate(self.path, self.size)

    def put(self, at: int, form: str, *values: int) -> None:
        struct.pack_into(f"<{form}", self.data, at, *values)

    def superblock(self, at: int, form: str, *values: int) -> None:
        self.put(1024 + at, form, *values)

    def group(self, number: int, at: int, value: int) -> None:
        self.put((self.image.first_block + 1) * self.image.block_size + 32 * number + at, "I", value)

    def inode(self, ino: int, at: int, form: str, *values: int) -> None:
        self.put(self.image.place(ino) + at, form, *values)

    def pointers(self, block: int, *numbers: int) -> None:
        size = self.image.block_size
        self.data[block * size : (block + 1) * size] = struct.pack(f"<{size // 4}I", *numbers)


def many_groups(forged: Forged) -> None:
    """A sparse file of 4 TiB, in groups of 32 blocks: 4 GiB of descriptors."""
    groups = (1 << 27) - 1
    forged.superblock(0, "I", 8 * groups)
    forged.superblock(4, "I", 32 * groups + 1)
    forged.superblock(32, "I", 32)
    forged.superblock(40, "I", 8)
    forged.size = 1 << 42


def two_groups_with_one_bitmap(forged: Forged) -> None:
    forged.group(1, 0, forged.image.group(0)[0])


def two_groups_with_one_table(forged: Forged) -> None:
    forged.group(1, 8, forged.image.group(0)[2])


def a_bitmap_in_the_table(forged: Forged) -> None:
    forged.group(0, 0, forged.image.group(0)[2] + 1)


def a_bitmap_that_is_the_descriptors(forged: Forged) -> None:
    forged.group(0, 4, forged.image.first_block + 1)


def one_bitmap_for_both(forged: Forged) -> None:
    forged.group(0, 4, forged.image.group(0)[0])


def circle_of_orphans(forged: Forged) -> None:
    bitmap = forged.image.group(0)[1] * forged.image.block_size
    for ino, following in ((50, 51), (51, 52), (52, 51)):
        forged.data[bitmap + (ino - 1) // 8] |= 1 << (ino - 1) % 8
        forged.inode(ino, 0, "H", stat.S_IFREG | 0o644)
        forged.inode(ino, 20, "I", following)
    forged.superblock(232, "I", 50)


def a_journal_with_a_block_twice(forged: Forged) -> None:
    blocks = [block for _, block in forged.image.mapping(forged.image.inode(8))]
    forged.inode(8, 40 + 4 * 5, "I", blocks[4])


REFUSED = (
    many_groups,
    two_groups_with_one_bitmap,
    two_groups_with_one_table,
    a_bitmap_in_the_table,
    a_bitmap_that_is_the_descriptors,
    one_bitmap_for_both,
    circle_of_orphans,
    a_journal_with_a_block_twice,
)


@pytest.mark.parametrize("forge", REFUSED, ids=lambda forge: forge.__name__)
def test_what_mke2fs_does_not_make_is_refused_at_once(image: Path, forge: Callable[[Forged], None]) -> None:
    with Forged(image) as forged:
        forge(forged)
    before = image.stat().st_mtime_ns, image.stat().st_blocks
    program = (
        "import resource, sys; from tests.support.ext3 import open_ext3\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (256 << 20, 256 << 20))\n"
        "for read_only in (True, False):\n"
        "    try: open_ext3(sys.argv[1], read_only=read_only)\n"
        "    except OSError as error: print(error.errno)\n"
    )
    said = run(sys.executable, "-c", program, image, cwd=project_root(), timeout=20).stdout.split()
    assert len(said) == 2, "it was opened"
    assert set(map(int, said)) <= {errno.EINVAL, errno.EBADMSG, errno.EUCLEAN}
    assert (image.stat().st_mtime_ns, image.stat().st_blocks) == before


@contextmanager
def file_in(image: Path) -> Iterator[tuple[Forged, int]]:
    """An image to forge, and the inode of upper/a/file in it."""
    layer = open_ext3(str(image), read_only=True)
    key = layer.root
    for name in (b"upper", b"a", b"file"):
        found = layer.lookup(key, name)
        assert found is not None
        key = found[0]
    layer.close()
    with Forged(image) as forged:
        yield forged, int(key)


def inside(image: Forged) -> dict[str, int]:
    """Blocks that are the filesystem's own."""
    bitmap, inodes, table = image.image.group(0)
    return {
        "descriptors": image.image.first_block + 1,
        "superblock": image.image.first_block,
        "a copy of it": image.image.first_block + image.image.blocks_per_group,
        "a bitmap": bitmap,
        "the other": inodes,
        "inodes": table,
        "the journal": next(image.image.mapping(image.image.inode(8)))[1],
        "nowhere": image.image.blocks,
    }


@pytest.mark.parametrize("how", ["data", "indirect", "attributes"])
@pytest.mark.parametrize("where", [
    "descriptors", "superblock", "a copy of it", "a bitmap", "the other", "inodes", "the journal", "nowhere"
])  # fmt: skip
def test_no_file_has_what_is_the_filesystem_s(image: Path, where: str, how: str) -> None:
    with file_in(image) as (forged, ino):
        block = inside(forged)[where]
        at = {"data": 40, "indirect": 40 + 4 * 12, "attributes": 104}[how]
        forged.inode(ino, at, "I", block)
        forged.inode(ino, 4, "I", 100_000)
    with file_layer(image) as (layer, key):
        with pytest.raises(OSError) as caught:
            if how == "attributes":
                layer.listxattr(key)
            else:
                layer.image.pwrite(key, b"x" * 100_000, 0)
        assert caught.value.errno == errno.EUCLEAN


@contextmanager
def file_layer(image: Path) -> Iterator[tuple[Ext3Layer, int]]:
    layer = open_ext3(str(image), commit_seconds=0)
    try:
        key = layer.root
        for name in (b"upper", b"a", b"file"):
            found = layer.lookup(key, name)
            assert found is not None
            key = found[0]
        yield layer, key
    finally:
        layer.image.abandon()


def test_a_file_of_one_block_a_thousand_million_times(image: Path) -> None:
    """The pointers lead to themselves: a search for a hole takes no longer than others can wait."""
    with file_in(image) as (forged, ino):
        free = forged.image.blocks - 3
        forged.pointers(free, *[free] * 256)
        forged.inode(ino, 4, "I", 0xFFFFFFFF)
        forged.inode(ino, 108, "I", 3)
        forged.inode(ino, 40, "15I", *[free] * 15)
    with file_layer(image) as (layer, key):
        node = Node(5, stat.S_IFREG, None, b"file", Key(key), ())
        fs = SimpleNamespace(upper=layer, lowers=(), stat=lambda node: layer.stat(node.upper))
        handle = Handle(node, layer.open(key, os.O_RDONLY), writable=False)
        before = time.monotonic()
        with suppress(OSError):  # EFBIG: it is said to be longer than any file can be
            assert seek(fs, handle, 0, os.SEEK_HOLE) == layer.stat(key).st_size  # type: ignore[arg-type]
        assert time.monotonic() - before < 5
        assert seek(fs, handle, 1000, os.SEEK_DATA) == 1000  # type: ignore[arg-type]
        handle.close()


def test_a_size_that_no_file_has(image: Path) -> None:
    with file_in(image) as (forged, ino):
        forged.inode(ino, 108, "I", 0x80000000)
    with pytest.raises(OSError) as caught, file_layer(image):
        pass
    assert caught.value.errno == errno.EUCLEAN


# -- very many names


def huge_ext3(image: Path, count: int, *, indexed: bool, length: int = 8) -> None:
    """Let upper/big hold *count* names of one file: written as a file, which is then called a directory."""
    with file_in(image) as (_, ino):
        pass
    size = 1024
    per_block = (size - 8) // (8 + (length + 3) // 4 * 4)
    record = 8 + (length + 3) // 4 * 4
    with image.with_name("names").open("wb") as out:
        for first in range(0, count, per_block):
            block = bytearray()
            for number in range(first, min(first + per_block, count)):
                name = b"%0*d" % (length, number)
                block += struct.pack("<IHBB", ino, record, length, 1) + name + bytes(record - 8 - length)
            struct.pack_into("<H", block, len(block) - record + 4, size - len(block) + record)
            out.write(block.ljust(size, b"\0"))
    debugfs(image, f"write {image.with_name('names')} /big")
    layer = open_ext3(str(image), read_only=True)
    found, top = layer.lookup(layer.root, b"big"), layer.lookup(layer.root, b"upper")
    assert found is not None
    assert top is not None
    layer.close()
    big, parent = int(found[0]), int(top[0])
    debugfs(image, "rmdir /upper/big", "ln /big /upper/big", "unlink /big", f"sif <{big}> mode 040755",
            f"sif <{big}> links_count 2")  # fmt: skip
    with Forged(image) as forged:
        first = next(forged.image.mapping(forged.image.inode(big)))[1] * size
        head = struct.pack("<IHBB4sIHBB4s", big, 12, 1, 2, b".", parent, size - 12, 2, 2, b"..")
        forged.data[first : first + len(head)] = head
        at = forged.data.find(b"big", forged.image.group(0)[2])  # its entry says that it is a file
        forged.data[at - 1] = 2
    image.with_name("names").unlink()
    if indexed:
        assert run("e2fsck", "-fyD", image, check=False, timeout=100).returncode in {0, 1}


def longest_wait(here: Mounted, call: Callable[[], object]) -> tuple[float, float]:
    """Return the longest wait of another client for the daemon while *call* ran, and how long *call* took."""
    waits, done = [0.0], threading.Event()

    def ask() -> None:
        while not done.is_set():
            before = time.monotonic()
            os.statvfs(here.path)
            waits.append(time.monotonic() - before)

    other = threading.Thread(target=ask)
    other.start()
    before = time.monotonic()
    try:
        call()
    finally:
        took = time.monotonic() - before
        done.set()
        other.join()
    return max(waits), took


def first_of(path: Path) -> str:
    with os.scandir(path) as entries:
        return next(entries).name


NAMES = 400_000


@needs_root
@needs_fuse
@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["squashfs", "directory", "ext3", "ext3 without an index"])
def test_others_are_served_while_a_huge_directory_is_listed(tmp_path: Path, kind: str) -> None:
    """The same while a name is looked up in it."""
    lower, store = tmp_path / "lower", tmp_path / "store"
    lower.mkdir()
    if kind == "squashfs":
        lower.rmdir()
        lower.write_bytes(huge_squashfs(NAMES))
    elif kind == "directory":
        (lower / "big").mkdir()
        (lower / "big/file").touch()
        for number in range(60_000):
            os.link(lower / "big/file", lower / f"big/{number:08}")
    else:
        store = images.make(store, images.Shape(1024, mib=64, journal=4), tree(tmp_path / "tree"))
        huge_ext3(store, NAMES, indexed=kind == "ext3")
    with mounted(lower, tmp_path / "at", store) as here:
        waited = [
            longest_wait(here, lambda: first_of(here.path / "big")),
            longest_wait(here, lambda: [os.path.exists(here.path / f"big/{name}") for name in ("none", "x")]),
            longest_wait(here, lambda: os.stat(here.path / "big/00012345")),
        ]
    for wait, took in waited:  # by itself it is some milliseconds; but machines are busy
        assert wait < max(0.3, took / 3), waited


def huge_squashfs(count: int) -> bytes:
    forge = Forge()
    file = forge.small(b"text")
    entries = [Entry(b"%08d" % number, file) for number in range(256)]
    begin = len(forge.listings)
    for first in range(0, count, 256):
        for at, entry in enumerate(entries):
            entry.name = b"%08d" % (first + at)
        forge.group(entries)
    block, offset = place(begin, forge.chunk)
    big = forge.large_directory(block, offset, len(forge.listings) - begin + 3, number=2)
    return forge.finish(forge.directory([Entry(b"big", big, 1)]))


def test_names_in_a_large_directory_are_found(image: Path) -> None:
    """Made, found, moved and removed by the index alone, as in any other directory."""
    layer = open_ext3(str(image), commit_seconds=0)
    key = layer.root
    for name in (b"upper", b"big"):
        found = layer.lookup(key, name)
        assert found is not None
        key = found[0]
    names = [b"%06d-%s" % (number, b"n" * 200) for number in range(6000)]
    _, file = layer.create(key, b"file", 0o600, 0, 0)
    file.close()
    made = layer.lookup(key, b"file")
    assert made is not None
    for name in names:
        layer.link(made[0], key, name)
    layer.close()
    layer = open_ext3(str(image), commit_seconds=0)
    assert layer.stat(key).st_size > LARGE
    try:
        listed = layer.names(key)
        assert callable(listed)
        assert sorted(listed()) == sorted([*names, b"file"])
        assert {entry.name for entry in layer.readdir(key)} == {*names, b"file"}
        for name in names[::7]:
            assert layer.lookup(key, name) is not None
            assert layer.lookup(key, name + b"?") is None
        assert layer.lookup(key, b".") is None
        layer.mkdir(key, b"dir", 0o755, 0, 0)
        assert layer.lookup(key, b"dir") is not None
        layer.rename((key, b"dir"), (key, b"moved"))
        assert layer.lookup(key, b"dir") is None
        assert layer.lookup(key, b"moved") is not None
        layer.rename((key, names[0]), (key, b"new name"))
        with pytest.raises(FileExistsError):
            layer.link(made[0], key, names[1])
        layer.rmdir(key, b"moved", None)
        layer.mkdir(key, b"dir", 0o755, 0, 0)
        assert layer.lookup(key, b"dir") is not None
        layer.rmdir(key, b"dir", None)
        for name in (*names[1:], b"new name"):
            layer.unlink(key, name, None)
        assert [entry.name for entry in layer.readdir(key)] == [b"file"]
    finally:
        layer.close()
    assert images.unclean(image) is None


def test_a_directory_of_the_same_block_again_and_again(image: Path) -> None:
    """Two gibibytes of it, which say nothing new: it is damaged, and that is known soon."""
    with file_in(image) as (forged, ino):
        free = forged.image.blocks - 3
        names = next(forged.image.mapping(forged.image.inode(2)))[1]
        above = free - 1
        forged.pointers(free, *[names] * 256)
        forged.pointers(above, *[free] * 256)
        forged.pointers(above - 1, *[above] * 256)
        forged.inode(ino, 0, "H", stat.S_IFDIR | 0o755)
        forged.inode(ino, 4, "I", 0x7FFFFC00)
        forged.inode(ino, 40, "15I", *[names] * 12, free, above, above - 1)
    layer = open_ext3(str(image), read_only=True)
    try:
        before = time.monotonic()
        listed = layer.names(Key(ino))
        assert callable(listed)
        with pytest.raises(OSError) as caught:
            listed()
        assert caught.value.errno == errno.EUCLEAN
        with pytest.raises(OSError) as caught:
            layer.lookup(Key(ino), b"none")
        assert caught.value.errno == errno.EFBIG
        assert time.monotonic() - before < 20
    finally:
        layer.close()
