"""Requests that arrive while others wait for a copy-up, the disk, or each other."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing
from pyfuse3 import FUSEError

from cowfs.fuse.adapter import Adapter
from cowfs.layers.kernel_file import KernelFile
from tests.fuse.conftest import BIG
from tests.fuse.kernel import CTX, ROOT, Kernel, Slow, changes
from tests.support.direct import Direct

EXPECTED = {
    *(errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR, errno.ESTALE),
    *(errno.EPERM, errno.EINVAL),  # a link to a directory, a directory renamed into itself
}


async def until(condition: Callable[[], bool]) -> None:
    """Wait until other tasks make *condition* true."""
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.001)


async def write(adapter: Adapter, ino: int, data: bytes = b"HEAD") -> None:
    """Open a file, write, and close it."""
    info = await adapter.open(ino, os.O_RDWR, CTX)
    await adapter.write(info.fh, 0, data)
    await adapter.release(info.fh)


async def read(adapter: Adapter, ino: int) -> bytes:
    """Return the whole content."""
    info = await adapter.open(ino, os.O_RDONLY, CTX)
    data = await adapter.read(info.fh, 0, 1 << 24)
    await adapter.release(info.fh)
    return data


async def test_others_go_on_while_a_file_is_copied_up(adapter: Adapter, kernel: Kernel, slow: Slow) -> None:
    big = await kernel.find("big")
    slow.let_go(b"file")  # small, but with a slow lower it is copied the same way
    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, adapter, big)
        await until(lambda: slow.begun == [b"big"])
        await write(adapter, await kernel.find("file"))
        assert (await adapter.getattr(big, CTX)).st_size == len(BIG)
        assert await read(adapter, big) == BIG
        assert b"big" in await kernel.list(int(ROOT))
        slow.let_go(b"big")
    assert await read(adapter, big) == b"HEAD" + BIG[4:]


async def test_the_same_file_is_copied_up_once(adapter: Adapter, kernel: Kernel, slow: Slow) -> None:
    big = await kernel.find("big")
    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(write, adapter, big, b"%d" % number)
        await until(lambda: bool(slow.begun))
        slow.let_go(b"big")
    assert slow.begun == [b"big"]
    assert (await read(adapter, big))[1:] == BIG[1:]


async def test_a_reader_from_before_sees_what_is_written(
    adapter: Adapter, kernel: Kernel, slow: Slow
) -> None:
    big = await kernel.find("big")
    info = await adapter.open(big, os.O_RDONLY, CTX)
    slow.let_go(b"big")
    await write(adapter, big)
    assert await adapter.read(info.fh, 0, 6) == b"HEAD45"
    await adapter.release(info.fh)


@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC])
async def test_others_go_on_while_a_write_waits_for_the_disk(
    adapter: Adapter, kernel: Kernel, monkeypatch: pytest.MonkeyPatch, flag: int
) -> None:
    file = await kernel.find("file")
    write_at_once, disk = KernelFile.pwrite, threading.Event()

    def pwrite(self: KernelFile, data: bytes, offset: int) -> int:
        assert disk.wait(10)
        return write_at_once(self, data, offset)

    info = await adapter.open(file, os.O_RDWR | flag, CTX)  # copies up, perhaps with pwrite
    monkeypatch.setattr(KernelFile, "pwrite", pwrite)
    written: list[int] = []

    async def writer() -> None:
        written.append(await adapter.write(info.fh, 0, b"HEAD"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer)
        await trio.testing.wait_all_tasks_blocked()
        assert await read(adapter, file) == b"file\n" and written == []
        disk.set()
    assert written == [4] and await read(adapter, file) == b"HEAD\n"
    await adapter.release(info.fh)


async def test_a_failed_copy_up_fails_one_request(adapter: Adapter, kernel: Kernel, slow: Slow) -> None:
    """A request that waited tries again itself; meanwhile the file is unchanged."""
    big = await kernel.find("big")
    slow.failing[b"big"] = OSError(errno.ENOSPC, "full")
    answers: list[int] = []

    async def attempt() -> None:
        try:
            await write(adapter, big)
            answers.append(0)
        except FUSEError as error:
            answers.append(error.errno)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attempt)
        nursery.start_soon(attempt)
        await until(lambda: bool(slow.begun))
        slow.let_go(b"big")
    assert sorted(answers) == [0, errno.ENOSPC]
    assert await read(adapter, big) == b"HEAD" + BIG[4:]


Act = Callable[[Adapter, int], Awaitable[Any]]
MEANWHILE: dict[str, tuple[Act, str | None, bytes]] = {
    "unlink": (lambda a, ino: a.unlink(ROOT, b"big", CTX), None, b""),
    "rename": (lambda a, ino: a.rename(ROOT, b"big", ROOT, b"moved", 0, CTX), "moved", b"HEAD"),
    "rename over": (lambda a, ino: a.rename(ROOT, b"big2", ROOT, b"big", 0, CTX), "big", BIG[::-1][:4]),
    "rename over another": (lambda a, ino: a.rename(ROOT, b"big", ROOT, b"file", 0, CTX), "file", b"HEAD"),
    "exchange": (lambda a, ino: a.rename(ROOT, b"big", ROOT, b"file", 2, CTX), "file", b"HEAD"),
    "link": (lambda a, ino: a.link(ino, ROOT, b"linked2", CTX), "linked2", b"HEAD"),
    "chmod": (lambda a, ino: a.setattr(ino, *changes(mode=0o600), None, CTX), "big", b"HEAD"),
    "truncate": (lambda a, ino: a.setattr(ino, *changes(size=2), None, CTX), "big", b"HE"),
    "setxattr": (lambda a, ino: a.setxattr(ino, b"user.x", b"y", CTX), "big", b"HEAD"),
    "open with O_TRUNC": (lambda a, ino: a.open(ino, os.O_WRONLY | os.O_TRUNC, CTX), "big", b""),
}


@pytest.mark.parametrize("what", MEANWHILE)
async def test_meanwhile(fs: Direct, adapter: Adapter, kernel: Kernel, slow: Slow, what: str) -> None:
    """A request that changes or removes a file waits for its copy-up, and then succeeds."""
    act, path, head = MEANWHILE[what]
    big = await kernel.find("big")
    for name in ("big2", "file"):
        await kernel.find(name)
    slow.let_go(b"big2")
    finished: list[str] = []

    async def meanwhile() -> None:
        answer = await act(adapter, big)
        if "open" in what:
            await adapter.release(answer.fh)
        finished.append(what)

    async def writer() -> None:
        info = await adapter.open(big, os.O_RDWR, CTX)
        finished.append("opened")
        await adapter.write(info.fh, 0, b"HEAD")
        await trio.sleep(0)
        await adapter.release(info.fh)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer)
        await until(lambda: b"big" in slow.begun)
        nursery.start_soon(meanwhile)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert finished == []
        slow.let_go(b"big")
    assert sorted(finished) == sorted(["opened", what])
    if path is None:
        assert (await adapter.lookup(ROOT, b"big", CTX)).st_ino == 0
    else:
        data = await read(adapter, await kernel.find(path))
        assert data[: len(head)] in {head, BIG[: len(head)]} if what == "truncate" else data[:4] == head[:4]
    before = fs.snapshot()
    await kernel.forget_all()
    fs.remount()
    assert {p: f.get("content") for p, f in fs.snapshot().items()} == {
        p: f.get("content") for p, f in before.items()
    }


async def test_a_second_copy_up_while_a_rename_waits(adapter: Adapter, kernel: Kernel, slow: Slow) -> None:
    """The first copy-up of the source fails, and another begins while the rename waits for the target."""
    big = await kernel.find("big")
    big2 = await kernel.find("big2")
    slow.failing[b"big"] = OSError(errno.ENOSPC, "full")
    answers: dict[str, int] = {}

    async def answered(name: str, request: Awaitable[Any]) -> None:
        try:
            await request
            answers[name] = 0
        except FUSEError as error:
            answers[name] = error.errno

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answered, "first", write(adapter, big))
        await until(lambda: b"big" in slow.begun)
        nursery.start_soon(answered, "target", write(adapter, big2, b"2222"))
        await until(lambda: b"big2" in slow.begun)
        nursery.start_soon(answered, "rename", adapter.rename(ROOT, b"big", ROOT, b"big2", 0, CTX))
        await trio.testing.wait_all_tasks_blocked(0.01)
        slow.let_go(b"big")
        await until(lambda: "first" in answers)
        slow.hold(b"big")
        nursery.start_soon(answered, "second", write(adapter, big))
        await until(lambda: slow.begun.count(b"big") == 2)
        slow.let_go(b"big2")
        await trio.testing.wait_all_tasks_blocked(0.01)
        slow.let_go(b"big")
    assert answers == {"first": errno.ENOSPC, "target": 0, "rename": 0, "second": 0}
    assert (await adapter.lookup(ROOT, b"big", CTX)).st_ino == 0
    assert (await read(adapter, await kernel.find("big2")))[:8] == b"HEAD4567"


async def test_forgotten_while_it_is_copied_up(
    fs: Direct, adapter: Adapter, kernel: Kernel, slow: Slow
) -> None:
    """The kernel may forget an inode before its copy-up ends."""
    before = len(fs.fs.nodes)
    big = await kernel.find("big")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, adapter, big)
        await until(lambda: slow.begun == [b"big"])
        await kernel.forget_all()
        slow.let_go(b"big")
    assert await read(adapter, await kernel.find("big")) == b"HEAD" + BIG[4:]
    await kernel.forget_all()
    assert len(fs.fs.nodes) == before, "a node stays for ever"


async def test_all_names_of_a_hard_link_wait(adapter: Adapter, kernel: Kernel, slow: Slow) -> None:
    linked, alias = await kernel.find("linked"), await kernel.find("alias")
    done: list[str] = []

    async def unlink() -> None:
        await adapter.unlink(ROOT, b"linked", CTX)
        done.append("unlink")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, adapter, linked)
        await until(lambda: bool(slow.begun))
        nursery.start_soon(unlink)
        nursery.start_soon(write, adapter, alias, b"ALIA")
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert done == []
        for name in (b"linked", b"alias"):
            slow.let_go(name)
    assert (await read(adapter, alias))[4:] == BIG[4:]
    assert (await adapter.getattr(alias, CTX)).st_nlink == 1


@pytest.mark.parametrize("seed", range(4))
async def test_eight_clients(fs: Direct, adapter: Adapter, kernel: Kernel, seed: int) -> None:
    """They do everything to a few names, and switch after each request; only errnos may result."""
    names = [b"file", b"big", b"big2", b"linked", b"alias", b"dir", b"x", b"y"]
    fs.union.overlay.options = type(fs.fs.options)(inline_up_to=0)

    async def client(number: int) -> None:
        chance = random.Random(seed * 100 + number)
        clerk = Kernel(adapter)
        for _ in range(60):
            await trio.sleep(0)
            try:
                await one(clerk, chance)
            except FUSEError as error:
                assert error.errno in EXPECTED, os.strerror(error.errno)
        await clerk.forget_all()

    async def one(clerk: Kernel, chance: random.Random) -> None:
        name, other = chance.choice(names), chance.choice(names)
        match chance.randrange(9):
            case 0:
                info, entry = await adapter.create(ROOT, name, 0o644, os.O_RDWR, CTX)
                clerk.took(entry)
                await adapter.write(info.fh, 0, b"new")
                await trio.sleep(0)
                await adapter.release(info.fh)
            case 1:
                await adapter.unlink(ROOT, name, CTX)
            case 2:
                await adapter.rename(ROOT, name, ROOT, other, chance.choice([0, 0, 1, 2]), CTX)
            case 3 | 4:
                await write(adapter, await clerk.find(name.decode()))
            case 5:
                clerk.took(await adapter.link(await clerk.find(name.decode()), ROOT, other, CTX))
            case 6:
                await clerk.list(int(ROOT), chance.choice([1, 3, 100]))
            case 7:
                ino = await clerk.find(name.decode())
                await adapter.setattr(ino, *changes(mode=0o600), None, CTX)
            case 8:
                clerk.took(await adapter.mkdir(ROOT, name, 0o755, CTX))
                await trio.sleep(0)
                await adapter.rmdir(ROOT, name, CTX)

    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(client, number)
    before = fs.snapshot()
    fs.remount()
    after = fs.snapshot()
    assert {p: (f["type"], f.get("content")) for p, f in before.items()} == {
        p: (f["type"], f.get("content")) for p, f in after.items()
    }
