"""A thread in haste does not wait for the disk: operations that need a commit fail with EAGAIN."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cowfs.errors import NotYetFree
from cowfs.formats.ext3._engine import ffi, lib
from cowfs.layers.ext3 import Ext3Layer
from tests.support.ext3 import make, opened
from tests.support.mounts import eventually

MIB = 1 << 20


def facts(layer: Ext3Layer) -> Any:
    """Return all facts of the engine."""
    out = ffi.new("struct x3_facts *")
    lib.x3_facts(layer.image.handle, out)
    return out


@contextmanager
def hurried(layer: Ext3Layer) -> Iterator[None]:
    before = layer.hurry(True)
    try:
        yield
    finally:
        layer.hurry(before)


def relieve(layer: Ext3Layer, for_room: bool) -> None:
    """Run a call in another thread, which is not in haste."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(layer.relieve, for_room).result(timeout=20)


def fill(layer: Ext3Layer, name: bytes = b"large") -> int:
    """Fill the image with a file; return its size."""
    _, file = layer.create(layer.root, name, 0o600, 0, 0)
    size = 0
    for piece in (MIB, 4096):
        try:
            while True:
                size += file.pwrite(bytes(piece), size)
        except OSError as failure:
            assert failure.errno == errno.ENOSPC
    file.close()
    return size


def freed(layer: Ext3Layer) -> None:
    """All blocks are freed, but can be used only after the next commit."""
    fill(layer)
    layer.sync()
    found = layer.lookup(layer.root, b"large")
    assert found is not None
    layer.truncate(found[0], 0)
    assert facts(layer).held > 1000


def test_blocks_that_wait_for_a_commit_are_not_waited_for(tmp_path: Path) -> None:
    with opened(make(tmp_path / "image"), commit_seconds=0) as layer:
        freed(layer)
        _, file = layer.create(layer.root, b"small", 0o600, 0, 0)
        commits = facts(layer).commits
        with hurried(layer):
            with pytest.raises(NotYetFree) as failure:
                file.pwrite(b"text", 0)
            assert failure.value.errno == errno.ENOSPC
            assert facts(layer).commits == commits
            relieve(layer, for_room=True)
            assert file.pwrite(b"text", 0) == 4
        assert facts(layer).commits > commits
        file.close()


def test_who_is_in_no_hurry_waits(tmp_path: Path) -> None:
    with opened(make(tmp_path / "image"), commit_seconds=0) as layer:
        freed(layer)
        _, file = layer.create(layer.root, b"small", 0o600, 0, 0)
        assert file.pwrite(b"text", 0) == 4
        file.close()


def test_what_is_full_is_full(tmp_path: Path) -> None:
    """No blocks are reserved: a commit would not help, and is not requested."""
    with opened(make(tmp_path / "image"), commit_seconds=0) as layer:
        fill(layer)
        relieve(layer, for_room=True)
        _, file = layer.create(layer.root, b"small", 0o600, 0, 0)
        with hurried(layer), pytest.raises(OSError, match="No space") as failure:
            file.pwrite(b"text", 0)
        assert not isinstance(failure.value, NotYetFree)
        file.close()


def test_large_writes_leave_small_ones_some_room(tmp_path: Path) -> None:
    """A large write waits for the commit; a small one finds space at once."""
    with opened(make(tmp_path / "image"), commit_seconds=0) as layer:
        _, file = layer.create(layer.root, b"half", 0o600, 0, 0)
        for place in range(20):
            file.pwrite(bytes(MIB), place * MIB)
        layer.sync()
        file.truncate(0)
        with hurried(layer):
            with pytest.raises(NotYetFree):
                for place in range(64):
                    file.pwrite(bytes(MIB), place * MIB)
            _, small = layer.create(layer.root, b"small", 0o600, 0, 0)
            assert small.pwrite(bytes(8192), 0) == 8192
            small.close()
        file.close()


def test_commits_are_asked_for_before_anybody_has_to_wait(tmp_path: Path) -> None:
    """This happens when more blocks are reserved than usable."""
    with opened(make(tmp_path / "image"), commit_seconds=3600) as layer:
        _, file = layer.create(layer.root, b"most", 0o600, 0, 0)
        for place in range(36):
            file.pwrite(bytes(MIB), place * MIB)
        layer.sync()
        file.truncate(0)
        file.pwrite(b"x", 0)
        eventually(lambda: facts(layer).held < 1000, "what was freed can be used", 20)
        file.close()


def test_much_that_is_not_on_disk_is_told(tmp_path: Path) -> None:
    """Before the transaction reaches its limit, so that no operation must wait inside it."""
    with opened(make(tmp_path / "image"), commit_seconds=0) as layer, hurried(layer):
        commits = facts(layer).commits
        for number in range(5000):
            if layer.pressed[0]:
                break
            layer.mkdir(layer.root, b"%d" % number, 0o755, 0, 0)
        assert layer.pressed[0] and facts(layer).commits == commits
        relieve(layer, for_room=False)
        assert not layer.pressed[0] and facts(layer).commits > commits
