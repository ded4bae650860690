"""The same state machine on a store of aufs in an image, which an independent reader of aufs checks."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from cowfs.converting import convert
from cowfs.offline_changes import Lowers
from tests.model.test_model import EXAMPLES, LAYER, PATHS, UnionMachine, _errno_of, compare
from tests.model.tree import EXCHANGE, NOREPLACE
from tests.support import ext3, tree
from tests.support.direct import Direct
from tests.support.system import run

Seen = dict[str, tuple[object, ...]]


class AufsMachine(UnionMachine):
    """The store is a copy of an image that aufs has used."""

    empty: Path
    slow = False

    def __init__(self) -> None:
        super().__init__()
        run("cp", "--sparse=always", self.empty, self.place / "store")

    @initialize(top=LAYER, bottom=LAYER, two=st.booleans(), caching=st.booleans(), slow=st.booleans())
    def build(
        self, top: dict[str, tree.Node], bottom: dict[str, tree.Node], two: bool, caching: bool, slow: bool
    ) -> None:
        self.slow = slow
        super().build(top, bottom, two, caching, slow)

    def look(self) -> None:
        self.model.root.mtime = None  # the branch had its own
        super().look()

    @rule(old=PATHS, new=PATHS, flags=st.sampled_from([0, 0, 0, NOREPLACE, EXCHANGE]))
    def rename(self, old: str, new: str, flags: int) -> None:
        """Like the union it belongs to, but a directory of a lower stays in its place."""
        got = _errno_of(lambda: self.fs.rename(old, new, flags))
        if got == "EXDEV":
            nodes = [self.fs.find(path) for path in (old, *([new] if flags & EXCHANGE else []))]
            assert any(node.is_dir and node.lowers for node in nodes)
        else:
            assert got == _errno_of(lambda: self.model.rename(old, new, flags))
        self.look()
        self.fs.done()

    def by_the_kernel(self) -> None:
        image = self.place / "image"
        (self.place / "store").rename(image)
        ext3.sound(image)
        (self.place / "store").mkdir()
        run("mount", "-o", "loop,ro", image, self.place / "store")
        try:
            layers = [self.place / "store", *map(Path, self.lowers)]
            if not self.slow:  # hard links get their names when no request waits for it
                told = self.model.snapshot()
                assert seen(layers) == {path: _facts(told[path]) for path in told if path != "."}
            left = {p.name for p in (layers[0] / ".wh..wh.cowfs/work/work").iterdir()}
            assert left <= {".wh.#whiteout"}
        finally:
            run("umount", self.place / "store")
        if self.slow:
            Direct(str(image), self.lowers).close()  # now they get their names
        self.there_and_back(image, "overlayfs", "aufs")

    def there_and_back(self, image: Path, *formats: str) -> None:
        """The converted store shows the same tree. Inodes may have other numbers."""
        told = self.model.snapshot()
        told["."]["mtime"] = None
        for target in formats:
            convert(str(image), target, Lowers(self.lowers), tell=lambda _: None)
            ext3.sound(image)
            union = Direct(str(image), self.lowers)
            try:
                assert compare(told, union.snapshot(), None) == [], target
            finally:
                union.close()


class ConvertedMachine(AufsMachine):
    """The store is one of overlayfs, with redirects, metacopies and an index, and is converted at the end."""

    def look(self) -> None:
        UnionMachine.look(self)

    @rule(old=PATHS, new=PATHS, flags=st.sampled_from([0, 0, 0, NOREPLACE, EXCHANGE]))
    def rename(self, old: str, new: str, flags: int) -> None:
        self.both(lambda: self.fs.rename(old, new, flags), lambda: self.model.rename(old, new, flags))

    def by_the_kernel(self) -> None:
        self.there_and_back(self.place / "store", "aufs", "overlayfs")


def seen(merged: list[Path], path: str = "") -> Seen:
    """Return what aufs shows of a directory: its branch first, then lowers of overlayfs."""
    shown: Seen = {}
    names = {name for layer in merged for name in os.listdir(layer) if not name.startswith(".wh.")}
    for name in names if path else names - {"lost+found"}:
        found: list[Path] = []
        for layer in merged:
            there = layer / name
            if os.path.lexists(layer / f".wh.{name}"):
                break
            if not os.path.lexists(there):
                continue
            info = there.lstat()
            if stat.S_ISCHR(info.st_mode) or (found and not stat.S_ISDIR(info.st_mode)):
                break
            found.append(there)
            if not stat.S_ISDIR(info.st_mode) or _is_opaque(there):
                break
        if found:
            child = f"{path}/{name}" if path else name
            with _opened(found[0].parent) as fd:
                shown[child] = _facts(tree.facts_of(fd, os.fsencode(name), os.fstat(fd).st_dev, False))
            if found[0].is_dir() and not found[0].is_symlink():
                shown |= seen(found, child)
    return shown


def _is_opaque(directory: Path) -> bool:
    return (directory / ".wh..wh..opq").exists() or "trusted.overlay.opaque" in os.listxattr(directory)


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def _facts(node: dict[str, Any]) -> tuple[object, ...]:
    """Return what to compare, without our notes of inode numbers, which aufs does not know."""
    xattrs = {name: value for name, value in node["xattrs"].items() if not name.startswith("trusted.cowfs.")}
    return (xattrs, *(node.get(key) for key in ("type", "mode", "owner", "size", "content", "target")))


@pytest.fixture(scope="module", autouse=True)
def empty(tmp_path_factory: pytest.TempPathFactory) -> None:
    """An image to copy."""
    ConvertedMachine.empty = ext3.make(tmp_path_factory.mktemp("model") / "none", size=16 << 20)
    AufsMachine.empty = ext3.make(tmp_path_factory.mktemp("model") / "empty", size=16 << 20)
    run("debugfs", "-w", "-R", "mkdir .wh..wh.plnk", AufsMachine.empty)


AufsMachine.TestCase.settings = settings(UnionMachine.TestCase.settings, max_examples=max(EXAMPLES // 60, 1))
ConvertedMachine.TestCase.settings = AufsMachine.TestCase.settings
TestConverted = pytest.mark.timeout(600)(
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: trusted attributes of the lowers")(
        ConvertedMachine.TestCase
    )
)
TestModel = pytest.mark.timeout(600)(
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the kernel mounts the store")(
        AufsMachine.TestCase
    )
)
