"""The committing thread frees large unlinked files in steps; the tests call what it calls."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from cowfs.formats.ext3._engine import lib
from cowfs.layers.base import Key
from tests.ext3 import engine, images, recovery
from tests.ext3.engine import Engine
from tests.ext3.images import SMALL

BLOCKS = 1500


def attend(opened: Engine) -> None:
    """Do one step of the thread."""
    lib.x3_wait(opened.image.handle, 0)


def fragmented(opened: Engine, *names: bytes) -> list[Key]:
    """Create files with alternating blocks, which take several operations to free."""
    made = [opened.layer.create(opened.layer.root, name, 0o644, 0, 0) for name in names]
    for number in range(BLOCKS):
        for _, file in made:
            file.pwrite(b"x", number << 10)
    for _, file in made:
        file.close()
    return [key for key, _ in made]


def is_there(opened: Engine, key: Key) -> bool:
    try:
        opened.layer.stat(key)
    except OSError:
        return False
    return True


def free(opened: Engine) -> tuple[int, int]:
    facts = opened.image.facts()
    return facts.free_blocks, facts.free_inodes


@pytest.mark.parametrize("how", ["unlink", "rename", "release"])
def test_freed_in_steps(place: Path, how: str) -> None:
    """Its blocks count as free at once."""
    path = images.make(place / "image", SMALL)
    with engine.opened(path) as opened:
        layer, root = opened.layer, opened.layer.root
        engine.make_file(layer, b"small")
        empty = free(opened)
        large, _ = fragmented(opened, b"large", b"other")
        attend(opened)
        before = free(opened)
        if how == "unlink":
            layer.unlink(root, b"large", None)
        elif how == "rename":
            layer.rename((root, b"small"), (root, b"large"))
        else:
            layer.unlink(root, b"large", large)
            assert free(opened) == before
            layer.forget(large)
        assert is_there(opened, large)
        after = free(opened)
        assert after[0] >= before[0] + BLOCKS
        assert after[1] == before[1] + 1
        steps = 0
        while is_there(opened, large):
            attend(opened)
            steps += 1
            assert free(opened) == after
            assert steps < 100
        assert steps > 1
        layer.unlink(root, b"other", None)
        assert free(opened)[0] >= empty[0] - 1  # the directory may have grown
    assert images.unclean(path) is None


def test_nobody_attends(place: Path) -> None:
    """It is then freed at once."""
    path = images.make(place / "image", SMALL)
    with engine.opened(path) as opened:
        large, _ = fragmented(opened, b"large", b"other")
        opened.layer.unlink(opened.layer.root, b"large", None)
        assert not is_there(opened, large)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_crash_meanwhile(place: Path, steps: int) -> None:
    """The next recovery frees the rest."""
    path = images.make(place / "image", SMALL)
    with engine.opened(path) as opened:
        fragmented(opened, b"large", b"other")
        attend(opened)
        opened.layer.unlink(opened.layer.root, b"large", None)
        for _ in range(steps):
            attend(opened)
        wanted = free(opened)
        opened.layer.sync()
        for name in ("ours", "theirs"):
            shutil.copyfile(path, place / name)
    assert recovery.by_engine(place / "ours") is None
    assert images.recover(place / "theirs") is None
    for name in ("ours", "theirs"):
        with engine.opened(place / name, read_only=True) as again:
            assert free(again) == wanted


def test_room_for_others(place: Path) -> None:
    """An operation without space frees what it needs."""
    path = images.make(place / "image", SMALL)
    with engine.opened(path) as opened:
        layer, root = opened.layer, opened.layer.root
        fragmented(opened, b"large", b"other")
        key, file = layer.create(root, b"rest", 0o644, 0, 0)
        with pytest.raises(OSError, match="No space"):
            for number in range(100_000):
                file.pwrite(bytes(1024), number << 10)
        attend(opened)
        layer.unlink(root, b"large", None)
        end = layer.stat(key).st_size
        for number in range(BLOCKS):
            file.pwrite(bytes(1024), end + (number << 10))
        file.close()
        assert free(opened)[0] < 50
    assert images.unclean(path) is None


def test_inodes_for_others(place: Path) -> None:
    path = images.make(place / "image", SMALL)
    with engine.opened(path) as opened:
        layer, root = opened.layer, opened.layer.root
        fragmented(opened, b"large", b"other")
        with pytest.raises(OSError, match="No space"):
            for number in range(100_000):
                engine.make_file(layer, b"%d" % number)
        attend(opened)
        layer.unlink(root, b"large", None)
        engine.make_file(layer, b"one more")
    assert images.unclean(path) is None


def test_nothing_is_left_for_who_has_the_image_meanwhile(place: Path) -> None:
    path = images.make(place / "image", SMALL)
    with engine.opened(path) as opened:
        layer = opened.layer
        hidden = layer.mkdir(layer.root, b"hidden", 0o700, 0, 0)
        large, _ = fragmented(opened, b"large", b"other")
        attend(opened)
        layer.unlink(layer.root, b"large", None)
        wanted = free(opened)
        layer.suspend(hidden)
        assert images.unclean(path) is None
        layer.resume(hidden)
        assert free(opened) == wanted
        assert not is_there(opened, large)


def test_several_are_truncated_at_once(place: Path) -> None:
    """Operations do not wait for the truncation of another file."""
    path = images.make(place / "image", SMALL)
    names = [b"one", b"two", b"three"]
    with engine.opened(path) as opened:
        for _ in range(3):
            keys = fragmented(opened, *names)
            cut = [
                threading.Thread(target=opened.image.truncate, args=(key, 1024 * number))
                for number, key in enumerate(keys)
            ]
            for thread in cut:
                thread.start()
            for thread in cut:
                thread.join()
            assert [opened.layer.stat(key).st_size for key in keys] == [0, 1024, 2048]
            for name in names:
                opened.layer.unlink(opened.layer.root, name, None)
    assert images.unclean(path) is None
