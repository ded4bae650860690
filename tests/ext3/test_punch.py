"""Holes are punched and flags set as by the kernel's ext3; e2fsck finds no error."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from cowfs.layers.ext3_file import Ext3File
from cowfs.linux import files, inode_flags
from tests.ext3 import engine, images
from tests.ext3.images import MODERN, OLD, SMALL, Shape
from tests.support.system import needs_root, run

STEPS = 60


@contextmanager
def kernels(path: Path, at: Path) -> Iterator[int]:
    """A file in an image that the kernel has mounted."""
    at.mkdir()
    run("mount", "-o", "loop", path, at)
    try:
        fd = os.open(at / "file", os.O_RDWR | os.O_CREAT)
        try:
            yield fd
        finally:
            os.close(fd)
    finally:
        run("umount", at)


def places(unit: int, rng: random.Random) -> tuple[int, int]:
    """Return a range that begins or ends inside a block or not, with direct or indirect pointers."""
    per = unit // 4
    at = rng.choice([0, 12, 12 + per, 12 + 3 * per, 12 + per + 5]) + rng.randrange(-6, 7)
    length = rng.choice([1, 2, 7, per, 2 * per + 3])
    start = max(at, 0) * unit + rng.choice([0, 0, 1, unit - 1, rng.randrange(unit)])
    return start, max(length * unit + rng.choice([0, 0, -1, 1, -rng.randrange(unit)]), 1)


@needs_root
@pytest.mark.parametrize("shape", [MODERN, SMALL, OLD], ids=str)
def test_holes_are_the_kernels(place: Path, shape: Shape) -> None:
    ours, theirs = images.make(place / "ours", shape), images.make(place / "theirs", shape)
    rng = random.Random(7)
    with kernels(theirs, place / "at") as fd, engine.opened(ours) as opened:
        file = opened.layer.open(engine.make_file(opened.layer, b"file"), os.O_RDWR)
        unit = opened.layer.fill_unit
        for step in range(STEPS):
            start, length = places(unit, rng)
            if step % 3 == 0:
                data = rng.randbytes(min(length, 200_000))
                assert os.pwrite(fd, data, start) == file.pwrite(data, start)
            elif step % 5 == 4:
                os.ftruncate(fd, start)
                file.truncate(start)
            else:
                files.fallocate(fd, start, length, files.PUNCH_HOLE)
                file.fallocate(files.PUNCH_HOLE, start, length)
            size = os.fstat(fd).st_size
            assert file.stat().st_size == size
            # The kernel keeps an indirect block that becomes empty, unless all of it is removed at once.
            assert file.stat().st_blocks <= os.fstat(fd).st_blocks, step
            assert [*file.segments(size)] == [*files.segments(fd, size)], step
            assert file.pread(size + 1, 0) == os.pread(fd, size + 1, 0), step
        file.fallocate(files.PUNCH_HOLE, 0, file.stat().st_size)
        assert file.stat().st_blocks == 0
        file.close()
    images.unclean(ours)


def test_nothing_else_is_allocated(place: Path) -> None:
    """Like all files of ext3, they have no allocated unwritten blocks."""
    with engine.opened(images.make(place / "image", MODERN)) as opened:
        file = opened.layer.open(engine.make_file(opened.layer, b"file"), os.O_RDWR)
        assert isinstance(file, Ext3File)
        for mode in (0, 1, 0x10, 0x11, 0x8, 0x20):
            with pytest.raises(OSError) as caught:
                file.fallocate(mode, 0, 4096)
            assert caught.value.errno == errno.EOPNOTSUPP
        assert file.stat().st_size == 0
        file.close()


@needs_root
def test_flags_are_the_kernels(place: Path) -> None:
    """Each flag alone, on a file and a directory, is kept, ignored, or refused with the same errno."""
    ours, theirs = images.make(place / "ours", MODERN), images.make(place / "theirs", MODERN)
    at = place / "at"
    at.mkdir()
    run("mount", "-o", "loop", theirs, at)
    try:
        (at / "file").touch()
        (at / "directory").mkdir()
        with engine.opened(ours) as opened:
            layer = opened.layer
            keys = {
                "file": engine.make_file(layer, b"file"),
                "directory": layer.mkdir(layer.root, b"directory", 0o755, 0, 0),
            }
            for name, key in keys.items():
                fd = os.open(at / name, os.O_RDONLY)
                for flag in (1 << bit for bit in range(32)):
                    if flag == inode_flags.JOURNAL_DATA:  # needs a privilege
                        continue
                    said = []
                    ways: list[tuple[Callable[[int], None], Callable[[], int]]] = [
                        (partial(inode_flags.put, fd), partial(inode_flags.get, fd)),
                        (partial(layer.setflags, key), partial(layer.getflags, key)),
                    ]
                    for put, get in ways:
                        try:
                            put(flag)
                            said.append(get())
                            put(0)
                        except OSError as failure:
                            said.append(-(failure.errno or 0))
                    assert said[0] == said[1], (name, hex(flag), said)
                os.close(fd)
            layer.setflags(keys["directory"], inode_flags.NODUMP | inode_flags.APPEND | 0x10000)
            below = engine.make_file(layer, b"below", keys["directory"])
            assert layer.getflags(below) == inode_flags.NODUMP, "inherited, but for what is for directories"
    finally:
        run("umount", at)
    images.unclean(ours)
