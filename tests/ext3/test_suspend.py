"""Another program changes a suspended image: after it is resumed, keys and orphans are valid."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tests.ext3 import engine, images
from tests.ext3.images import MODERN, OLD, SMALL, Shape
from tests.ext3.load import Load
from tests.ext3.model import Promises, judge
from tests.ext3.reader import Image
from tests.support.system import run


@pytest.mark.parametrize("shape", [MODERN, SMALL, OLD], ids=str)
def test_grown_under_a_load(place: Path, shape: Shape) -> None:
    path = images.make(place / "image", shape)
    with engine.opened(path) as opened:
        hidden = opened.layer.mkdir(opened.layer.root, b"hidden", 0o700, 0, 0)
        opened.layer.sync()
        opened.image.checkpoint()
        load = Load(opened.layer, Image(path.read_bytes()), 11)
        load.spared.add(hidden)
        orphans = 0
        for turn in range(3):
            load.run(150)
            orphans += len(load.model.orphans)
            before = opened.layer.statfs().blocks
            opened.layer.suspend(hidden)
            assert images.unclean(path) is None, "it is clean, for others to change"
            os.truncate(path, path.stat().st_size + (4 << 20))
            run("e2fsck", "-fp", path)  # resize2fs requires it, unless the last check was in this second
            run("resize2fs", "-f", path)
            assert run("e2fsck", "-fp", path, check=False).returncode == 0
            opened.layer.resume(hidden)
            assert opened.layer.statfs().blocks > before, f"turn {turn}"
            assert opened.layer.names(hidden) == []
            load.model.see(hidden, opened.layer.stat(hidden))  # files were in it meanwhile
            load.model.settle([hidden])
            load.check()
        assert orphans
        load.run(100)
        load.release()
        load.check()
    assert images.unclean(path) is None
    number = load.model.operation
    assert judge(load.model.states, Promises(number, number), Image(path.read_bytes())) is None


def test_others_wait_meanwhile(place: Path) -> None:
    """Requests of another thread during the suspension are done after it."""
    path = images.make(place / "image", MODERN)
    with engine.opened(path) as opened:
        layer = opened.layer
        hidden = layer.mkdir(layer.root, b"hidden", 0o700, 0, 0)
        key = engine.make_file(layer, b"file")
        file = layer.open(key, os.O_RDWR)
        layer.suspend(hidden)
        begun, done = threading.Event(), threading.Event()

        def write() -> None:
            begun.set()
            file.pwrite(b"data", 0)
            file.fsync(False)
            done.set()

        thread = threading.Thread(target=write)
        thread.start()
        begun.wait()
        assert not done.wait(0.05)
        assert images.unclean(path) is None
        layer.resume(hidden)
        thread.join(10)
        assert done.is_set()
        assert file.pread(10, 0) == b"data"
        file.close()
    assert images.unclean(path) is None


def test_back_to_something_else(place: Path) -> None:
    """If the image is no filesystem any more, everything fails with EIO, and nothing is written."""
    path = images.make(place / "image", MODERN)
    with engine.opened(path) as opened:
        layer = opened.layer
        hidden = layer.mkdir(layer.root, b"hidden", 0o700, 0, 0)
        layer.suspend(hidden)
        path.write_bytes(bytes(16 << 20))
        with pytest.raises(OSError):
            layer.resume(hidden)
        with pytest.raises(OSError):
            layer.mkdir(layer.root, b"more", 0o700, 0, 0)
        with pytest.raises(OSError):
            layer.names(hidden)
        opened.image.abandon()
    assert path.read_bytes() == bytes(16 << 20)
