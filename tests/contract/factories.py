"""The kinds of layers. A new kind needs an entry here, and must pass both suites unchanged."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from cowfs.layers.base import LowerLayer, UpperLayer
from cowfs.layers.directory import open_directory
from cowfs.layers.shared_directory import SharedDirectoryLayer
from cowfs.layers.slow import SlowLayer
from cowfs.layers.squashfs import SquashfsLayer
from cowfs.layers.tar import TarLayer
from cowfs.overlay.aufs import AufsStore
from tests.support.asking import Asking, serve
from tests.support.system import NOBODY, run


@dataclass(frozen=True)
class Kind:
    """A kind of layer. *lower* opens a layer that shows a directory; *upper* opens an empty layer."""

    name: str
    lower: Callable[[Path], AbstractContextManager[LowerLayer]] | None
    upper: Callable[[Path], AbstractContextManager[UpperLayer]] | None
    privileged: bool = True
    """Whether it can change owners, create devices, and see trusted.*."""
    tick_ns: int = 1
    """The resolution of its times."""
    rootless: bool = False
    """Whether an upper has all these features without root."""
    longest_name: int = 255
    is_aufs: bool = False
    """Whether it interprets whiteouts and attributes of overlayfs."""

    def __str__(self) -> str:
        return self.name


@contextmanager
def _directory(path: Path) -> Iterator[UpperLayer]:
    layer = open_directory(str(path))
    try:
        yield layer
    finally:
        layer.close()


@contextmanager
def _directory_of_nobody(path: Path) -> Iterator[UpperLayer]:
    """Run as an unprivileged user, or unchanged if the test run is unprivileged."""
    root = os.geteuid() == 0
    if root:
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
    try:
        layer = open_directory(str(path), privileged=False)
        try:
            yield layer
        finally:
            layer.close()
    finally:
        if root:
            os.seteuid(0)
            os.setegid(0)


@contextmanager
def _squashfs(path: Path) -> Iterator[LowerLayer]:
    """Make a squashfs image of the directory and open it."""
    image = path.with_name(f"{path.name}.squashfs")
    run("mksquashfs", path, image, "-quiet", "-no-progress", "-noappend", timeout=120)
    layer = SquashfsLayer(str(image))
    try:
        yield layer
    finally:
        layer.close()


@contextmanager
def _tar(path: Path) -> Iterator[LowerLayer]:
    """Make an archive of the directory with GNU tar, which leaves out sockets."""
    (path / "socket").unlink(missing_ok=True)
    archive = path.with_name(f"{path.name}.tar")
    xattrs = ("--xattrs", "--xattrs-include=*")
    run("tar", *xattrs, "--sparse", "--format=pax", "-C", path, "-cf", archive, ".", timeout=120)
    layer = TarLayer(str(archive))
    try:
        yield layer
    finally:
        layer.close()


@contextmanager
def _slow(path: Path) -> Iterator[LowerLayer]:
    """Open a directory as a slow layer, which is asked in many threads."""
    layer = SlowLayer(SharedDirectoryLayer(os.open(path, os.O_PATH | os.O_DIRECTORY), os.fspath(path)))
    serve(layer)
    try:
        yield cast(LowerLayer, Asking(layer))
    finally:
        layer.close()


@contextmanager
def _slow_squashfs(path: Path) -> Iterator[LowerLayer]:
    with _squashfs(path) as image:
        layer = SlowLayer(image)
        serve(layer)
        yield cast(LowerLayer, Asking(layer))


def _ext3(block_size: int, inode_size: int) -> Kind:
    name = f"ext3, blocks of {block_size}, inodes of {inode_size}"

    @contextmanager
    def lower(path: Path) -> Iterator[LowerLayer]:
        """Make an image with the directory, written by the kernel."""
        from tests.support import ext3

        image = ext3.make(path.with_name(f"{path.name}.ext3"), block_size, inode_size)
        with ext3.mounted(image) as layer:
            layer.rmdir(layer.root, b"lost+found", None)
            run("cp", "-a", f"{path}/.", layer.name)
        with ext3.opened(image) as layer:
            yield layer

    @contextmanager
    def upper(path: Path) -> Iterator[UpperLayer]:
        from tests.support import ext3

        with ext3.opened(ext3.make(path / "upper.ext3", block_size, inode_size)) as layer:
            layer.rmdir(layer.root, b"lost+found", None)
            yield layer

    tick_ns = 1 if inode_size > 128 else 1_000_000_000
    return Kind(name, lower, upper, tick_ns=tick_ns, rootless=True)


def _aufs(kind: Kind) -> Kind:
    """Open a branch of aufs in another kind of layer, without what is beside the branch."""

    @contextmanager
    def upper(path: Path) -> Iterator[UpperLayer]:
        assert kind.upper
        with kind.upper(path) as inner:
            layer = AufsStore(inner)
            layer.root = layer.branch
            yield layer

    return replace(kind, name=f"aufs in {kind}", lower=None, upper=upper, longest_name=242, is_aufs=True)


KINDS = [
    Kind("directory", _directory, _directory),
    Kind("directory of nobody", _directory_of_nobody, _directory_of_nobody, privileged=False),
    Kind("squashfs", _squashfs, None, tick_ns=1_000_000_000),
    Kind("tar", _tar, None),
    Kind("slow directory", _slow, None),
    Kind("slow squashfs", _slow_squashfs, None, tick_ns=1_000_000_000),
    *(_ext3(block_size, inode_size) for block_size in (1024, 4096) for inode_size in (128, 256)),
]
KINDS += [_aufs(kind) for kind in (KINDS[0], KINDS[-1])]
LOWERS = [kind for kind in KINDS if kind.lower]
UPPERS = [kind for kind in KINDS if kind.upper]
