"""Long operations run in steps, and other requests, which may change the tree, run in between."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from pyfuse3 import FUSEError

from cowfs.fuse import adapter as adapter_module
from cowfs.fuse import threads
from cowfs.fuse.adapter import Adapter
from cowfs.fuse.loop import RequestLoop
from cowfs.layers.kernel_file import KernelFile
from tests.fuse.kernel import CTX, ROOT, Kernel, changes, fake_readdir_reply
from tests.fuse.test_concurrency import until
from tests.support.direct import Direct

NAMES = 1500
DEPTH = 60


@pytest.fixture
def fs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Direct]:
    """A union in which each step takes longer than other requests should wait."""
    if os.geteuid() != 0:
        pytest.skip("needs root: whiteouts on tmpfs")
    place = Path(tempfile.mkdtemp(prefix="cowfs-fuse-", dir="/dev/shm"))
    (place / "lower/big").mkdir(parents=True)
    (place / "lower/empty").mkdir()
    for number in range(NAMES):
        (place / f"lower/big/{number}").touch()
    (place / "lower" / "/".join(["d"] * DEPTH)).mkdir(parents=True)
    monkeypatch.setattr(threads, "SLICE", -1.0)
    monkeypatch.setattr(threads, "_PAUSE", 0.0)
    monkeypatch.setattr(adapter_module, "SLICE", -1.0)
    fake_readdir_reply(monkeypatch)
    direct = Direct(str(place / "store"), [str(place / "lower")])
    yield direct
    direct.close()
    shutil.rmtree(place)


@pytest.fixture
def adapter(fs: Direct) -> Adapter:
    """The adapter of the union."""
    return Adapter(fs.fs, RequestLoop())


@pytest.fixture
def kernel(adapter: Adapter) -> Kernel:
    """The credentials of the caller."""
    return Kernel(adapter)


async def served_during(adapter: Adapter, act: Callable[[], Awaitable[Any]]) -> int:
    """Return the number of other requests that are answered during a request."""
    done, count = trio.Event(), 0

    async def do() -> None:
        try:
            await act()
        finally:
            done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(do)
        while not done.is_set():
            await adapter.getattr(ROOT, CTX)
            count += 1
            await trio.lowlevel.checkpoint()
    return count


def whiten(fs: Direct) -> None:
    for number in range(NAMES):
        fs.unlink(f"big/{number}")


REMOVALS: dict[str, Callable[[Adapter], Awaitable[None]]] = {
    "rmdir": lambda adapter: adapter.rmdir(ROOT, b"big", CTX),
    "rename": lambda adapter: adapter.rename(ROOT, b"empty", ROOT, b"big", 0, CTX),
}


@pytest.mark.parametrize("what", REMOVALS)
async def test_a_directory_of_whiteouts_goes(fs: Direct, adapter: Adapter, kernel: Kernel, what: str) -> None:
    """The check for emptiness yields to others, and so does the removal of the content afterwards."""
    whiten(fs)
    await kernel.find("big")
    await kernel.find("empty")
    assert await served_during(adapter, lambda: REMOVALS[what](adapter)) > NAMES
    assert fs.fs.rubbish
    assert await served_during(adapter, lambda: until(lambda: not fs.fs.rubbish)) > 10
    assert fs.fs.upper.names(fs.fs.work) == [b"#whiteout"]
    assert fs.listdir("") == (["d", "empty"] if what == "rmdir" else ["big", "d"])
    if what == "rmdir":
        fs.mkdir("big")
    assert fs.listdir("big") == []


@pytest.mark.parametrize("what", REMOVALS)
async def test_a_name_that_comes_meanwhile_counts(
    fs: Direct, adapter: Adapter, kernel: Kernel, what: str
) -> None:
    """Requests for the directory are served too; locking it is up to the kernel."""
    whiten(fs)
    big = await kernel.find("big")
    await kernel.find("empty")
    failed: list[int] = []

    async def remove() -> None:
        try:
            await REMOVALS[what](adapter)
        except FUSEError as error:
            failed.append(error.errno)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(remove)
        for _ in range(NAMES // 2):
            await trio.lowlevel.checkpoint()
        assert not failed
        kernel.took(await adapter.mkdir(big, b"new", 0o755, CTX))
    assert failed == [errno.ENOTEMPTY]
    assert fs.listdir("big") == ["new"]


async def test_a_directory_that_is_not_empty(adapter: Adapter, kernel: Kernel) -> None:
    """The first name shows that it is not empty."""
    await kernel.find("big")

    async def remove() -> None:
        with pytest.raises(FUSEError) as caught:
            await adapter.rmdir(ROOT, b"big", CTX)
        assert caught.value.errno == errno.ENOTEMPTY

    assert await served_during(adapter, remove) < 10


async def test_copying_up_far_down(fs: Direct, adapter: Adapter, kernel: Kernel) -> None:
    bottom = await kernel.find("/".join(["d"] * DEPTH))

    async def make() -> None:
        kernel.took(await adapter.mkdir(bottom, b"new", 0o755, CTX))

    assert await served_during(adapter, make) > DEPTH
    assert fs.listdir("/".join(["d"] * DEPTH)) == ["new"]


async def test_forgetting_thousands(fs: Direct, adapter: Adapter, kernel: Kernel) -> None:
    big = await kernel.find("big")
    await kernel.list(big)
    known = len(fs.fs.nodes)
    assert known > NAMES
    assert await served_during(adapter, kernel.forget_all) > NAMES
    assert len(fs.fs.nodes) == 1


CUTS: dict[str, Callable[[Adapter, int], Awaitable[Any]]] = {
    "truncate": lambda adapter, ino: adapter.setattr(ino, *changes(size=5), None, CTX),
    "open": lambda adapter, ino: adapter.open(ino, os.O_WRONLY | os.O_TRUNC, CTX),
}


@pytest.mark.parametrize("what", CUTS)
async def test_cutting_a_large_file(
    fs: Direct, adapter: Adapter, kernel: Kernel, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Other requests are served while a thread frees the blocks; changes of the file wait."""
    fs.create("large", bytes(20 << 20))
    large = await kernel.find("large")
    gate, begun = threading.Event(), threading.Event()
    truncate = KernelFile.truncate

    def slow(self: KernelFile, size: int) -> None:
        begun.set()
        assert gate.wait(20)
        truncate(self, size)

    monkeypatch.setattr(KernelFile, "truncate", slow)
    order: list[str] = []

    async def cut() -> None:
        opened = await CUTS[what](adapter, large)
        order.append("cut")
        if what == "open":
            await adapter.release(opened.fh)

    async def change() -> None:
        await adapter.setattr(large, *changes(mode=0o600), None, CTX)
        order.append("changed")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cut)
        await until(begun.is_set)
        nursery.start_soon(change)
        assert (await adapter.getattr(large, CTX)).st_size == 20 << 20
        await kernel.find("big/7")
        assert order == []
        gate.set()
    assert sorted(order) == ["changed", "cut"]
    assert (await adapter.getattr(large, CTX)).st_size == (5 if what == "truncate" else 0)


async def test_the_last_close_of_a_large_file(
    fs: Direct, adapter: Adapter, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread frees its blocks, after the close or when the kernel forgets the inode."""
    fs.create("large", bytes(20 << 20))
    fs.forget()
    large = await kernel.find("large")
    opened = await adapter.open(large, os.O_RDONLY, CTX)
    later: list[Callable[[], None]] = []
    fs.fs.upper.later = later.append
    free = fs.fs.upper.statfs().bfree
    await adapter.unlink(ROOT, b"large", CTX)
    await adapter.release(opened.fh)
    await kernel.forget_all()
    assert len(later) == 2
    assert fs.fs.upper.statfs().bfree < free + (10 << 20) // 4096
    for call in later:
        call()
    assert fs.fs.upper.statfs().bfree > free + (10 << 20) // 4096
