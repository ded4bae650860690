"""The adapter's errors, references and listings, whatever the union does."""

from __future__ import annotations

import errno
import logging
import os
import random
import stat
from collections.abc import Awaitable, Callable
from typing import Any

import pyfuse3
import pytest
from pyfuse3 import FUSEError

from cowfs.fuse import libfuse, loop
from cowfs.fuse.adapter import Adapter
from cowfs.fuse.quotas import Bounds
from tests.fuse.kernel import CTX, ROOT, Kernel, Page, changes
from tests.support.direct import Direct


async def errno_of(request: Awaitable[Any]) -> int:
    """Return the errno of a request's reply; 0 for success."""
    try:
        await request
    except FUSEError as error:
        return int(error.errno)
    return 0


async def test_errors_are_answered(adapter: Adapter, kernel: Kernel) -> None:
    file, folder = await kernel.find("file"), await kernel.find("dir")
    gone = 1 << 50
    answers = {
        "lookup in a file": (adapter.lookup(file, b"x", CTX), errno.ENOTDIR),
        "lookup too long": (adapter.lookup(ROOT, b"n" * 256, CTX), errno.ENAMETOOLONG),
        "lookup in nothing": (adapter.lookup(gone, b"x", CTX), errno.ESTALE),
        "getattr of nothing": (adapter.getattr(gone, CTX), errno.ESTALE),
        "unlink missing": (adapter.unlink(ROOT, b"missing", CTX), errno.ENOENT),
        "unlink a directory": (adapter.unlink(ROOT, b"dir", CTX), errno.EISDIR),
        "rmdir a file": (adapter.rmdir(ROOT, b"file", CTX), errno.ENOTDIR),
        "rmdir not empty": (adapter.rmdir(ROOT, b"dir", CTX), errno.ENOTEMPTY),
        "mkdir over": (adapter.mkdir(ROOT, b"file", 0o755, CTX), errno.EEXIST),
        "create over": (adapter.create(ROOT, b"file", 0o644, os.O_WRONLY, CTX), errno.EEXIST),
        "symlink over": (adapter.symlink(ROOT, b"file", b"x", CTX), errno.EEXIST),
        "mknod a device 0:0 over": (adapter.mknod(ROOT, b"file", stat.S_IFCHR, 0, CTX), errno.EEXIST),
        "link a directory": (adapter.link(folder, ROOT, b"x", CTX), errno.EPERM),
        "rename missing": (adapter.rename(ROOT, b"missing", ROOT, b"x", 0, CTX), errno.ENOENT),
        "rename with odd flags": (adapter.rename(ROOT, b"file", ROOT, b"x", 64, CTX), errno.EINVAL),
        "exchange, but whiteout": (adapter.rename(ROOT, b"file", ROOT, b"dir", 2 | 4, CTX), errno.EINVAL),
        "exchange, but not over": (adapter.rename(ROOT, b"file", ROOT, b"dir", 2 | 1, CTX), errno.EINVAL),
        "rename into itself": (adapter.rename(ROOT, b"dir", folder, b"x", 0, CTX), errno.EINVAL),
        "readlink of a file": (adapter.readlink(file, CTX), errno.EINVAL),
        "getxattr": (adapter.getxattr(file, b"user.none", CTX), errno.ENODATA),
        "the same again": (adapter.getxattr(file, b"security.capability", CTX), errno.ENODATA),
        "and again": (adapter.getxattr(file, b"security.capability", CTX), errno.ENODATA),
        "removexattr": (adapter.removexattr(file, b"user.none", CTX), errno.ENODATA),
        "open a directory": (adapter.open(folder, os.O_RDONLY, CTX), errno.EISDIR),
        "flush": (adapter.flush(1), errno.ENOSYS),
    }
    got = {what: await errno_of(request) for what, (request, _) in answers.items()}
    assert got == {what: wanted for what, (_, wanted) in answers.items()}


async def test_a_missing_name_may_be_cached(adapter: Adapter) -> None:
    entry = await adapter.lookup(ROOT, b"missing", CTX)
    assert entry.st_ino == 0
    assert entry.entry_timeout > 1000


REQUESTS: dict[str, Callable[[Adapter, int, int, int], Awaitable[Any]]] = {
    "lookup": lambda a, ino, fh, dh: a.lookup(ROOT, b"other", CTX),
    "getattr": lambda a, ino, fh, dh: a.getattr(ino, CTX),
    "setattr": lambda a, ino, fh, dh: a.setattr(ino, *changes(mode=0o600), None, CTX),
    "setattr of the size": lambda a, ino, fh, dh: a.setattr(ino, *changes(size=3), None, CTX),
    "readlink": lambda a, ino, fh, dh: a.readlink(ino, CTX),
    "mknod": lambda a, ino, fh, dh: a.mknod(ROOT, b"n", stat.S_IFIFO, 0, CTX),
    "mkdir": lambda a, ino, fh, dh: a.mkdir(ROOT, b"n", 0o755, CTX),
    "symlink": lambda a, ino, fh, dh: a.symlink(ROOT, b"n", b"x", CTX),
    "link": lambda a, ino, fh, dh: a.link(ino, ROOT, b"n", CTX),
    "unlink": lambda a, ino, fh, dh: a.unlink(ROOT, b"file", CTX),
    "rmdir": lambda a, ino, fh, dh: a.rmdir(ROOT, b"dir", CTX),
    "rename": lambda a, ino, fh, dh: a.rename(ROOT, b"file", ROOT, b"n", 0, CTX),
    "open": lambda a, ino, fh, dh: a.open(ino, os.O_RDONLY, CTX),
    "open to write": lambda a, ino, fh, dh: a.open(ino, os.O_RDWR, CTX),
    "create": lambda a, ino, fh, dh: a.create(ROOT, b"n", 0o644, os.O_WRONLY, CTX),
    "write": lambda a, ino, fh, dh: a.write(fh, 0, b"x"),
    "read": lambda a, ino, fh, dh: a.read(1 << 40, 0, 10),
    "readdir": lambda a, ino, fh, dh: a.readdir(dh, 0, Page(10)),  # type: ignore[arg-type]
    "statfs": lambda a, ino, fh, dh: a.statfs(CTX),
    "getxattr": lambda a, ino, fh, dh: a.getxattr(ino, b"user.x", CTX),
    "listxattr": lambda a, ino, fh, dh: a.listxattr(ino, CTX),
    "setxattr": lambda a, ino, fh, dh: a.setxattr(ino, b"user.x", b"", CTX),
    "removexattr": lambda a, ino, fh, dh: a.removexattr(ino, b"user.x", CTX),
    "release": lambda a, ino, fh, dh: a.release(1 << 40),
}


class Broken:
    """A union in which everything except finding nodes raises an exception."""

    def __init__(self, fs: Any, error: Exception) -> None:
        self._fs = fs
        self._error = error

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._fs, name)
        if not callable(value) or name == "nodes":
            return value

        def broken(*_args: Any, **_kwargs: Any) -> Any:
            raise self._error

        return broken


@pytest.mark.parametrize("what", REQUESTS)
async def test_no_exception_ends_the_mount(
    adapter: Adapter, kernel: Kernel, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The reply to an unexpected exception is EIO, and its traceback is in the log."""
    ino = await kernel.find("file")
    info = await adapter.open(ino, os.O_RDONLY, CTX)
    listing = await adapter.opendir(await kernel.find("dir"), CTX)
    whole = adapter._fs
    adapter._fs = Broken(whole, ZeroDivisionError("a bug"))  # type: ignore[assignment]
    with caplog.at_level(logging.ERROR):
        assert await errno_of(REQUESTS[what](adapter, ino, info.fh, listing)) == errno.EIO
    adapter._fs = whole
    assert any(record.exc_info for record in caplog.records), "no traceback was logged"
    caplog.clear()
    await adapter.release(info.fh)


async def test_forget_never_fails(adapter: Adapter, kernel: Kernel, caplog: pytest.LogCaptureFixture) -> None:
    ino = await kernel.find("file")
    whole = adapter._fs
    adapter._fs = Broken(whole, ZeroDivisionError("a bug"))  # type: ignore[assignment]
    await adapter.forget([(ino, 1), (1 << 50, 3)])
    assert "forget" in caplog.text
    caplog.clear()
    adapter._fs = whole


async def test_lack_of_memory_is_enomem(adapter: Adapter) -> None:
    adapter._fs = Broken(adapter._fs, MemoryError())  # type: ignore[assignment]
    assert await errno_of(adapter.statfs(CTX)) == errno.ENOMEM


async def test_references_are_released(fs: Direct, adapter: Adapter, kernel: Kernel) -> None:
    before = len(fs.fs.nodes)
    for _again in range(3):
        assert len(await kernel.list(await kernel.find("dir"))) == 102
        await kernel.find("dir/001")
        info, entry = await adapter.create(ROOT, b"new", 0o644, os.O_RDWR, CTX)
        kernel.took(entry)
        await adapter.write(info.fh, 0, b"x")
        await adapter.unlink(ROOT, b"new", CTX)
        await adapter.release(info.fh)
        kernel.took(await adapter.mkdir(ROOT, b"newdir", 0o755, CTX))
        await adapter.rmdir(ROOT, b"newdir", CTX)
        assert len(fs.fs.nodes) > before
        await kernel.forget_all()
        assert len(fs.fs.nodes) == before


async def test_an_open_file_survives_unlink(adapter: Adapter, kernel: Kernel) -> None:
    ino = await kernel.find("file")
    info = await adapter.open(ino, os.O_RDWR, CTX)
    await adapter.unlink(ROOT, b"file", CTX)
    await kernel.forget_all()
    await adapter.write(info.fh, 5, b"more")
    assert await adapter.read(info.fh, 0, 100) == b"file\nmore"
    await adapter.release(info.fh)
    assert (await adapter.lookup(ROOT, b"file", CTX)).st_ino == 0


@pytest.mark.parametrize("room", [1, 2, 3, 7, 50, 1000])
async def test_listings_in_pages(kernel: Kernel, room: int) -> None:
    names = await kernel.list(await kernel.find("dir"), room)
    assert sorted(names) == sorted([b".", b"..", *(b"%03d" % number for number in range(100))])


@pytest.mark.parametrize("room", [1, 5, 40])
async def test_removing_while_listing(adapter: Adapter, kernel: Kernel, room: int) -> None:
    """A listing skips and repeats nothing; the next listing shows what is left."""
    folder = await kernel.find("dir")
    fh = await adapter.opendir(folder, CTX)
    seen: list[bytes] = []
    start = 0
    while True:
        page = Page(room)
        await adapter.readdir(fh, start, page)  # type: ignore[arg-type]
        if not page.names:
            break
        start = page.next
        kernel.count(page)
        for name in page.names:
            if name not in {b".", b".."}:
                seen.append(name)
                await adapter.unlink(folder, name, CTX)
    await adapter.releasedir(fh)
    assert sorted(seen) == [b"%03d" % number for number in range(100)]
    assert await kernel.list(folder) == [b".", b".."]
    await adapter.rmdir(ROOT, b"dir", CTX)


async def test_a_listing_shows_the_names_at_its_beginning(adapter: Adapter, kernel: Kernel) -> None:
    """A listing may lack new names and show removed ones; rewinding updates it."""
    folder = await kernel.find("dir")
    fh = await adapter.opendir(folder, CTX)
    page = Page(10)
    await adapter.readdir(fh, 0, page)  # type: ignore[arg-type]
    kernel.count(page)
    rest = {b"%03d" % number for number in range(100)} - set(page.names)
    victim = sorted(rest)[3]
    await adapter.unlink(folder, victim, CTX)
    kernel.took(await adapter.mkdir(folder, b"new", 0o755, CTX))
    more = Page(1000)
    await adapter.readdir(fh, page.next, more)  # type: ignore[arg-type]
    kernel.count(more)
    assert set(more.names) - {b"new"} == rest - {victim}
    again = Page(1000)
    await adapter.readdir(fh, 0, again)  # type: ignore[arg-type]
    kernel.count(again)
    assert b"new" in again.names and victim not in again.names
    await adapter.releasedir(fh)


async def test_hard_links_share_a_node(adapter: Adapter, kernel: Kernel) -> None:
    one, two = await kernel.find("linked"), await kernel.find("alias")
    assert one == two
    entry = await adapter.setattr(one, *changes(mode=0o600), None, CTX)
    assert (entry.st_ino, entry.st_nlink) == (one, 2)
    await adapter.unlink(ROOT, b"linked", CTX)
    assert (await adapter.getattr(two, CTX)).st_nlink == 1


def test_pyfuse3_has_what_the_loop_replaces() -> None:
    """The loop replaces a private function of pyfuse3; without it, pyfuse3's own loop is half as fast."""
    assert hasattr(pyfuse3, loop._WAIT)


async def test_few_snapshots_are_kept_and_each_reader_sees_all(fs: Direct) -> None:
    """Many listings of one directory: a reader whose snapshot was dropped continues with a new one."""
    adapter = Adapter(fs.fs, loop.RequestLoop(), bounds=Bounds(1000, 1000, 250, shared=True))
    kernel = Kernel(adapter)
    ino = await kernel.find("dir")
    fs.create("dir/own")
    readers = [await adapter.opendir(ino, CTX) for _ in range(10)]
    seen: list[list[bytes]] = [[] for _ in readers]
    places = [0] * len(readers)
    for _ in range(11):
        for number, fh in enumerate(readers):
            page = Page(10)
            await adapter.readdir(fh, places[number], page)  # type: ignore[arg-type]
            seen[number] += page.names
            places[number] = page.next or places[number]
            assert len(adapter.directories.snapshots) <= 250
    expected = sorted([b".", b"..", b"own", *(b"%03d" % number for number in range(100))])
    assert [sorted(names) for names in seen] == [expected] * len(readers)
    for fh in readers:
        await adapter.releasedir(fh)
    assert len(adapter.directories.snapshots) == 0


async def test_a_full_store_first_serves_other_requests(
    adapter: Adapter, fs: Direct, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pending FORGET of a removed file may free space: other requests are served first, but only once."""
    overlay, mkdir = fs.union.overlay, fs.union.overlay.upper.mkdir
    full, served = True, []

    def failing(*arguments: Any) -> Any:
        if full:
            raise OSError(errno.ENOSPC, "full")
        return mkdir(*arguments)

    async def serve() -> None:
        nonlocal full
        served.append("others")
        full = len(served) < 2

    monkeypatch.setattr(overlay.upper, "mkdir", failing)
    monkeypatch.setattr(loop.RequestLoop, "has_next_request", lambda _: True)
    monkeypatch.setattr(loop.RequestLoop, "serve_others", lambda _: serve())
    assert await errno_of(adapter.mkdir(ROOT, b"new", 0o755, CTX)) == errno.ENOSPC
    assert await errno_of(adapter.mkdir(ROOT, b"new", 0o755, CTX)) == 0
    assert served == ["others"] * 2


@pytest.mark.skipif(libfuse.ring is None, reason="cowfs was built without the C module")
def test_the_inodes_without_capability_are_a_set() -> None:
    """The set in C behaves like a Python set when it grows, shrinks and is cleared."""
    rng = random.Random(1)
    ours, model = libfuse.no_capability(), set[int]()
    ours.clear()
    for number in range(30_000):
        inode = rng.choice([rng.randrange(1, 50), rng.randrange(1, 3000), rng.randrange(1, 1 << 63)])
        if number % 1000 < 700:
            ours.add(inode)
            model.add(inode)
        else:
            ours.discard(inode)
            model.discard(inode)
        assert (inode in ours) == (inode in model)
    assert all(inode in ours for inode in model) and 0 not in ours
    for inode in sorted(model)[10:]:
        ours.discard(inode)
    assert [inode in ours for inode in sorted(model)] == [number < 10 for number in range(len(model))]
    ours.clear()
    assert not any(inode in ours for inode in model)
