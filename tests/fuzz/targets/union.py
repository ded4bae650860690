"""A union with a store that another program has changed: attributes, types, links, and bytes of its image.

An input consists of edits of the store, damage to the bytes of its image, and operations.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from cowfs.changes.diff import diff
from cowfs.errors import LayerError
from cowfs.formats.ext3.image import Image
from cowfs.layers.base import Key, LowerLayer, UpperLayer
from cowfs.layers.directory import DirectoryLayer
from cowfs.layers.ext3 import Ext3Layer
from cowfs.layers.squashfs import SquashfsLayer
from cowfs.overlay.attr import NewAttributes
from cowfs.overlay.dir import Owner
from cowfs.overlay.fs import OverlayOptions
from cowfs.overlay.node import Node
from cowfs.overlay.overlay import Overlay
from tests.ext3 import images
from tests.ext3.images import Shape
from tests.fuzz import bytes as plain
from tests.fuzz.driver import Run, Target
from tests.support.system import run

PREFIX = b"trusted.overlay."
NAMES = (b"opaque", b"redirect", b"metacopy", b"origin", b"impure", b"nlink", b"cowfs.links", b"cowfs.layer")
VALUES = (
    b"", b"y", b"x", b"\0", b"/", b"/d", b"/d/deep", b"/..", b"..", b".", b"d", b"d/deep", b"/big",
    b"big", b"/new", b"new",
    b"/d/../d", b"//", b"n" * 256, b"/" + b"/".join([b"d"] * 100), b"U+1", b"L-1", b"L+9999999999", b"0",
    b"1", b"2",
    b"9" * 20, b"/moved", b"moved", b"/moved/moved", b"/link", b"sym", b"/gone",
)  # fmt: skip
ROOM = 100
"""The maximum number of names to look at."""


class Source:
    """The bytes of an input, read one after the other; 0 after the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def number(self, below: int) -> int:
        """Return a number of one byte, or of two if the limit is that high."""
        size = 1 if below <= 256 else 2 if below <= 65536 else 4
        taken = self.take(size)
        return int.from_bytes(taken, "little") % below

    def take(self, size: int) -> bytes:
        """Return this number of bytes, or those that are left."""
        taken = self._data[self._at : self._at + size]
        self._at += size
        return taken

    def pick(self, among: Any) -> Any:
        """Return one of the choices."""
        return among[self.number(len(among))]


def _lower_tree(top: Path) -> None:
    (top / "d" / "deep" / "deeper").mkdir(parents=True)
    (top / "moved" / "in").mkdir(parents=True)
    (top / "big").write_bytes(b"0123456789abcdef" * 5000)
    (top / "file").write_bytes(b"file")
    (top / "d" / "one").write_bytes(b"one")
    (top / "d" / "deep" / "deeper" / "x").write_bytes(b"x")
    (top / "moved" / "in" / "y").write_bytes(b"y")
    for number in range(8):
        (top / "d" / f"n{number}").write_bytes(b"n")
    os.link(top / "d" / "one", top / "two")
    (top / "sym").symlink_to("d/deep")
    os.mkfifo(top / "fifo")


class Place:
    """The lowers, and an image of a store on them that contains everything a store may contain."""

    def __init__(self, place: Path, stack: ExitStack) -> None:
        _lower_tree(place / "lower")
        run("mksquashfs", place / "lower", place / "lower.sqfs", "-quiet", "-no-progress", "-comp", "gzip")
        fd = os.open(place / "lower", os.O_PATH | os.O_DIRECTORY)
        self.lowers: list[LowerLayer] = [
            DirectoryLayer(fd, "lower"),
            SquashfsLayer(str(place / "lower.sqfs")),
        ]
        for layer in self.lowers:
            stack.callback(layer.close)
        path = images.make(place / "image", Shape(1024, 256, mib=3, journal=1, inodes=256))
        self.image = path.read_bytes()
        self._directory = place / "store"
        with self.opened(keep=True) as layer:
            self._fill(layer)

    def _fill(self, layer: UpperLayer) -> None:
        for directory, name in ((layer.root, b"upper"), (layer.root, b"work")):
            layer.mkdir(directory, name, 0o755, 0, 0)
        work = self.find(layer, b"work")
        for name in (b"work", b"index"):
            layer.mkdir(work, name, 0o755, 0, 0)
        _use(self.union(layer))

    @contextmanager
    def directory(self) -> Iterator[DirectoryLayer]:
        """Return a new store in a directory."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(0o700)
        with closing(DirectoryLayer(os.open(self._directory, os.O_PATH | os.O_DIRECTORY), "store")) as layer:
            self._fill(layer)
            yield layer

    @contextmanager
    def opened(
        self, patch: Callable[[int], object] = lambda fd: None, *, keep: bool = False
    ) -> Iterator[Ext3Layer]:
        """Return a copy of the image, changed by *patch*; with *keep*, it replaces the image."""
        fd = os.memfd_create("image")
        try:
            os.write(fd, self.image)
            patch(fd)
            layer = Ext3Layer(Image(fd, "image", commit_seconds=0, cache_bytes=1 << 20))
            try:
                yield layer
            except BaseException:
                layer.image.abandon()
                raise
            with suppress(OSError):
                layer.close()
            if keep:
                self.image = os.pread(fd, 1 << 26, 0)
        finally:
            os.close(fd)

    def find(self, layer: UpperLayer, *names: bytes) -> Key:
        """Return the key of the inode at a path. ENOENT."""
        key: Key = layer.root
        for name in names:
            found = layer.lookup(key, name)
            if found is None:
                raise FileNotFoundError(name)
            key = found[0]
        return key

    def union(self, layer: UpperLayer) -> Overlay:
        """Open the union of the store and the lowers."""
        upper, work = self.find(layer, b"upper"), self.find(layer, b"work", b"work")
        index = self.find(layer, b"work", b"index")
        return Overlay(layer, upper, work, index, self.lowers, OverlayOptions(PREFIX, metacopy_from=4096))


def _use(fs: Overlay) -> None:
    """Create everything in a store that it may contain."""
    root = fs.root
    d = fs.resolve(root, b"d")
    fs.setattr(fs.resolve(root, b"big"), NewAttributes(mode=0o600))  # metacopy
    fs.rename(root, b"big", d, b"new")  # and a redirect
    fs.rename(root, b"moved", root, b"renamed")
    fs.unlink(d, b"n1")
    fs.setattr(fs.resolve(d, b"one"), NewAttributes(size=1))  # a hard link: the index
    fs.unlink(root, b"file")
    fs.mkdir(root, b"file", 0o755, Owner(0, 0))  # opaque
    node, _, file = fs.create(fs.resolve(root, b"file"), b"made", 0o644, Owner(1, 1))
    handle = fs.attach(node, file)
    fs.write(handle, b"made" * 3000, 0)
    fs.release_handle(handle)
    fs.symlink(root, b"link", b"target" * 30, Owner(0, 0))
    fs.setxattr(fs.resolve(root, b"two"), b"user.x", b"value")


def _keys(layer: UpperLayer, key: Key) -> list[tuple[Key, bytes, Key]]:
    """Yield (directory, name, inode) of all names below a directory of the store."""
    found: list[tuple[Key, bytes, Key]] = []
    pending = [key]
    while pending and len(found) < ROOM:
        directory = pending.pop()
        for name, _ in layer.readdir(directory)[:ROOM]:
            hit = layer.lookup(directory, name)
            if hit is not None:
                found.append((directory, name, hit[0]))
                if stat.S_ISDIR(hit[1].st_mode):
                    pending.append(hit[0])
    return found


def _edit(layer: UpperLayer, source: Source) -> None:
    """Change the store as its owner can."""
    directory, name, key = source.pick(_keys(layer, layer.root))
    how = source.number(8)
    if how < 4:
        value = source.pick(VALUES) if source.number(3) else source.take(source.number(64))
        layer.setxattr(key, PREFIX + source.pick(NAMES), value)
    elif how == 4:
        other = source.pick(_keys(layer, layer.root))[2]
        note = PREFIX + source.pick(NAMES)
        layer.setxattr(key, note, layer.getxattr(other, note))
    elif how == 5:
        other = source.pick(_keys(layer, layer.root))
        layer.rename(
            (directory, name), (other[0], other[1] if source.number(2) else b"other"), source.number(8)
        )
    elif how == 6:
        with suppress(OSError):
            layer.unlink(directory, name, None)
        kind = source.pick((stat.S_IFCHR, stat.S_IFREG, stat.S_IFIFO, stat.S_IFBLK))
        layer.mknod(directory, name, kind | 0o644, source.number(3), 0, 0)
    else:
        other = source.pick(_keys(layer, layer.root))
        layer.link(key, other[0], source.pick((b"d", b"new", b"n2", b"hard", b"file")))


def _nodes(fs: Overlay) -> list[tuple[Node, bytes, Node]]:
    """Return the visible part of the merged tree."""
    found: list[tuple[Node, bytes, Node]] = []
    pending = [fs.root]
    while pending and len(found) < ROOM:
        directory = pending.pop()
        names: list[bytes] = []
        with suppress(OSError):
            names = [entry.name for entry in fs.readdir(directory)]
            assert len(set(names)) == len(names), "a name twice"
        for name in names[:ROOM]:
            assert name not in {b"", b".", b".."} and not set(name) & {0, 47}, name
            with suppress(OSError):
                hit = fs.lookup(directory, name)
                if hit is None:
                    continue
                found.append((directory, name, hit[0]))
                _look(fs, hit[0])
                if hit[0].is_dir and hit[0] not in pending:
                    pending.append(hit[0])
    return found


def _look(fs: Overlay, node: Node) -> None:
    attr = fs.stat(node)
    fs.nlink(node, attr)
    for name in fs.listxattr(node):
        with suppress(OSError):
            fs.getxattr(node, name)
    if stat.S_ISLNK(attr.st_mode):
        fs.readlink(node)
    if stat.S_ISREG(attr.st_mode):
        handle = fs.open(node, os.O_RDONLY)
        try:
            handle.file.pread(5000, 0)
        finally:
            fs.release_handle(handle)


def _operate(fs: Overlay, source: Source, nodes: list[tuple[Node, bytes, Node]]) -> None:
    parent, name, node = source.pick(nodes)
    other, other_name, other_node = source.pick(nodes)
    new = source.pick((b"a", b"b" * 255, b"n1", b"d", other_name))
    how = source.number(12)
    if how == 0:
        handle = fs.open(node, source.pick((os.O_RDWR, os.O_WRONLY | os.O_TRUNC)))
        try:
            fs.write(handle, b"written" * 300, source.number(10_000))
        finally:
            fs.release_handle(handle)
    elif how == 1:
        fs.setattr(node, NewAttributes(mode=0o640))
    elif how == 2:
        fs.setattr(node, NewAttributes(size=source.number(10_000)))
    elif how == 3:
        fs.unlink(parent, name)
    elif how == 4:
        fs.rmdir(parent, name)
    elif how in {5, 6}:
        flags = source.pick((0, 0, 1, 2))
        if not (_above(node, other) or (flags & 2 and _above(other_node, parent))):
            target = other_name if source.number(2) or flags & 2 else new
            fs.lookup(parent, name)
            fs.lookup(other, target)
            fs.rename(parent, name, other, target, flags)
    elif how == 7:
        if fs.lookup(other, new) is None:
            fs.link(node, other, new)
    elif how == 8:
        if fs.lookup(parent, new) is None:
            fs.mkdir(parent, new, 0o755, Owner(0, 0))
    elif how == 9:
        fs.setxattr(node, source.pick((b"user.a", PREFIX + b"opaque")), source.take(20))
    elif how == 10:
        fs.copy_up(node)
    else:
        fs.symlink(parent, b"s", b"t", Owner(0, 0)) if fs.lookup(parent, b"s") is None else None


def _above(node: Node, below: Node | None) -> bool:
    while below is not None:
        if below is node:
            return True
        below = below.parent
    return False


def _one(place: Place, data: bytes) -> None:
    source = Source(data)
    edits, damages, operations = source.number(32), source.number(6), source.number(24)

    def patch(fd: int) -> None:
        for _ in range(damages):
            at = source.number(len(place.image) if source.number(2) else 200_000)
            os.pwrite(fd, source.take(1 + source.number(4)), at)

    with suppress(OSError, LayerError), place.directory() if edits & 8 else place.opened(patch) as layer:
        for _ in range(edits & 7):
            with suppress(OSError):
                _edit(layer, source)
        fs = place.union(layer)
        nodes = _nodes(fs)
        for _ in range(operations if nodes else 0):
            with suppress(OSError):
                _operate(fs, source, nodes)
        _nodes(fs)
        with suppress(OSError):
            for count, _ in enumerate(diff(layer, fs.root.upper, place.lowers, PREFIX, fs.index)):
                assert count < 10_000, "a diff without end"


@contextmanager
def _run() -> Iterator[Run]:
    place_in = os.environ.get("TMPDIR") or images.scratch()
    with tempfile.TemporaryDirectory(dir=place_in) as name, ExitStack() as stack:
        place = Place(Path(name), stack)
        yield lambda data: _one(place, data)


def _seeds() -> list[bytes]:
    choose = random.Random(0)
    sound = [bytes((choose.randrange(16), 0, 23)) + choose.randbytes(150) for _ in range(30)]
    return [b"", *sound, *(bytes((2, 2, 9)) + choose.randbytes(80) for _ in range(10))]


def _mutate(data: bytes, choose: random.Random) -> bytes:
    if choose.randrange(10) == 0:
        counts = choose.randrange(16), choose.randrange(3), choose.randrange(24)
        return bytes(counts) + choose.randbytes(200)
    return plain.mutate(data, choose)


TARGET = Target(
    _run,
    _seeds,
    ("cowfs.overlay", "cowfs.changes", "cowfs.layers", "cowfs.formats.ext3"),
    _mutate,
    largest=600,
)
