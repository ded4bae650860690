"""Requests that need a commit wait for it, while others are served."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from pyfuse3 import FUSEError

from cowfs.errors import NotYetFree
from cowfs.fuse.adapter import Adapter
from cowfs.fuse.loop import RequestLoop
from tests.fuse.kernel import CTX, ROOT, Kernel
from tests.fuse.test_concurrency import until
from tests.support.direct import Direct
from tests.support.ext3 import make


class Disk:
    """A stand-in for the store's disk. The test decides when a commit ends."""

    def __init__(self, upper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[bool] = []
        self.done = threading.Event()
        self.refuses = 0
        """Let this number of further changes need a commit."""
        self._pwrite = upper.image.pwrite
        monkeypatch.setattr(upper, "relieve", self._relieve)
        monkeypatch.setattr(upper.image, "pwrite", self._write)

    def _relieve(self, for_room: bool) -> None:
        self.asked.append(for_room)
        assert self.done.wait(10)

    def _write(self, ino: int, data: bytes, offset: int) -> int:
        if self.refuses:
            self.refuses -= 1
            raise NotYetFree(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self._pwrite(ino, data, offset))


@pytest.fixture
def fs() -> Iterator[Direct]:
    place = Path(tempfile.mkdtemp(prefix="cowfs-fuse-", dir="/dev/shm"))
    (place / "lower").mkdir()
    direct = Direct(str(make(place / "store")), [str(place / "lower")])
    yield direct
    direct.close()
    shutil.rmtree(place)


@pytest.fixture
def adapter(fs: Direct) -> Adapter:
    return Adapter(fs.fs, RequestLoop())


@pytest.fixture
def kernel(adapter: Adapter) -> Kernel:
    return Kernel(adapter)


@pytest.fixture
def disk(fs: Direct, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(fs.fs.upper, monkeypatch)


async def test_a_write_without_room_waits_for_the_commit(
    adapter: Adapter, kernel: Kernel, disk: Disk
) -> None:
    info, _ = await adapter.create(ROOT, b"file", 0o644, os.O_RDWR, CTX)
    disk.refuses = 1
    written: list[int] = []

    async def write() -> None:
        written.append(await adapter.write(info.fh, 0, b"text"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        await until(lambda: disk.asked == [True])
        assert written == [] and await kernel.find("file")
        disk.done.set()
    assert written == [4] and await adapter.read(info.fh, 0, 9) == b"text"
    await adapter.release(info.fh)


async def test_it_is_not_tried_for_ever(adapter: Adapter, disk: Disk) -> None:
    info, _ = await adapter.create(ROOT, b"file", 0o644, os.O_RDWR, CTX)
    disk.refuses = 1000
    disk.done.set()
    with pytest.raises(FUSEError) as failure:
        await adapter.write(info.fh, 0, b"text")
    assert failure.value.errno == errno.ENOSPC and 1 < len(disk.asked) < 100
    await adapter.release(info.fh)


async def test_changes_wait_while_too_much_is_not_on_disk(
    fs: Direct, adapter: Adapter, kernel: Kernel, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    info, _ = await adapter.create(ROOT, b"file", 0o644, os.O_RDWR, CTX)
    pressed = [1]
    monkeypatch.setattr(adapter, "_pressed", pressed)
    done: list[str] = []

    async def write() -> None:
        await adapter.write(info.fh, 0, b"text")
        done.append("write")

    async def mkdir() -> None:
        await adapter.mkdir(ROOT, b"directory", 0o755, CTX)
        done.append("mkdir")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        nursery.start_soon(mkdir)
        await until(lambda: disk.asked == [False, False])
        assert done == [] and await kernel.find("file")
        pressed[0] = 0
        disk.done.set()
    assert sorted(done) == ["mkdir", "write"]
    await adapter.release(info.fh)
