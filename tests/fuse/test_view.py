"""The view of a store, with normal and invalid requests through a pair of sockets."""

from __future__ import annotations

import errno
import os
import random
import socket
import stat
import struct
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from cowfs.fuse import daemon, protocol
from cowfs.fuse.protocol import Opcode
from cowfs.fuse.view import View
from cowfs.layers.ext3 import Ext3Layer
from tests.support import ext3
from tests.support.listing import names_of

ROOT = protocol.ROOT_ID
DATA = bytes(range(256)) * 4096
Answer = tuple[int, bytes]


@pytest.fixture
def layer(tmp_path: Path) -> Iterator[Ext3Layer]:
    """A small image with every type of file."""
    with ext3.opened(ext3.make(tmp_path / "image", size=16 << 20)) as layer:
        key, file = layer.create(layer.root, b"file", 0o640, 1, 2)
        file.pwrite(DATA, 0)
        file.close()
        layer.utimens(key, -1_500_000_000, 1_234_567_890_123_456_789)
        layer.setxattr(key, b"trusted.overlay.origin", b"x" * 40)
        layer.setxattr(key, b"user.mine", b"y")
        directory = layer.mkdir(layer.root, b"dir", 0o755, 0, 0)
        layer.mkdir(directory, b"below", 0o755, 0, 0)
        layer.symlink(layer.root, b"link", b"to/nowhere", 0, 0)
        layer.mknod(layer.root, b"gone", stat.S_IFCHR, 0, 0, 0)
        layer.mknod(layer.root, b"device", stat.S_IFBLK, os.makedev(7, 300), 0, 0)
        yield layer


@dataclass
class Kernel:
    """A client that sends one request after the other."""

    end: socket.socket
    view: View
    unique: int = 0
    unread: list[bytes] = field(default_factory=list)

    async def send(self, message: bytes) -> None:
        await trio.lowlevel.wait_writable(self.end)
        self.end.send(message)

    async def tell(self, opcode: int, nodeid: int = ROOT, body: bytes = b"", *, uid: int = 0) -> int:
        """Send a request; return its number."""
        self.unique += 2
        length = protocol.IN.size + len(body)
        await self.send(protocol.IN.pack(length, opcode, self.unique, nodeid, uid, 0, 0, 0) + body)
        return self.unique

    async def hear(self) -> tuple[int, int, bytes]:
        """Return the next reply: request number, errno, and data."""
        with trio.fail_after(20):
            await trio.lowlevel.wait_readable(self.end)
        message = self.end.recv(1 << 20)
        length, code, unique = protocol.OUT.unpack_from(message)
        assert length == len(message)
        assert not code or length == protocol.OUT.size
        return unique, -code, message[protocol.OUT.size :]

    async def ask(self, opcode: int, nodeid: int = ROOT, body: bytes = b"", *, uid: int = 0) -> Answer:
        """Send a request and return its reply, which must be the next: errno and data."""
        wanted = await self.tell(opcode, nodeid, body, uid=uid)
        unique, code, data = await self.hear()
        assert unique == wanted
        return code, data

    async def get(self, opcode: int, nodeid: int = ROOT, body: bytes = b"") -> bytes:
        """Send a request that must succeed; return the data of its reply."""
        code, data = await self.ask(opcode, nodeid, body)
        assert code == 0, os.strerror(code)
        return data

    async def find(self, *names: bytes) -> int:
        """Return the inode number of a path, given by its names."""
        nodeid = ROOT
        for name in names:
            data = await self.get(Opcode.LOOKUP, nodeid, name + b"\0")
            nodeid = protocol.ENTRY_OUT.unpack_from(data)[0]
        return nodeid

    async def open(self, nodeid: int, opcode: int = Opcode.OPEN) -> int:
        return int(protocol.OPEN_OUT.unpack(await self.get(opcode, nodeid, bytes(8)))[0])

    async def works(self) -> None:
        """Fail unless it still replies correctly, without other replies in between."""
        assert await self.read(await self.find(b"file"), len(DATA) - 3, 10) == DATA[-3:]

    async def read(self, nodeid: int, offset: int, size: int) -> bytes:
        fh = await self.open(nodeid)
        data = await self.get(Opcode.READ, nodeid, reading(fh, offset, size))
        await self.get(Opcode.RELEASE, nodeid, struct.pack("=QIIQ", fh, 0, 0, 0))
        return data


def reading(fh: int, offset: int, size: int) -> bytes:
    return struct.pack("=QQIIQII", fh, offset, size, 0, 0, 0, 0)


@asynccontextmanager
async def asked(layer: Any) -> AsyncIterator[Kernel]:
    """A running view."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    view = View(layer, theirs.detach())
    with ours:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(view.serve)
            yield Kernel(ours, view)
            nursery.cancel_scope.cancel()


def names_in(data: bytes) -> list[tuple[bytes, int, int, int]]:
    """Parse a listing: names, inode numbers, offsets, types."""
    found, at = [], 0
    while at < len(data):
        ino, offset, length, kind = protocol.DIRENT.unpack_from(data, at)
        at += protocol.DIRENT.size
        found.append((data[at : at + length], ino, offset, kind))
        at += length + -length % 8
    assert at == len(data)
    return found


async def test_init(layer: Ext3Layer) -> None:
    async with asked(layer) as kernel:
        data = await kernel.get(Opcode.INIT, 0, struct.pack("=4I48x", 7, 40, 1 << 20, 0xFFFFFFFF))
        assert len(data) == 64
        assert struct.unpack_from("=4I", data) == (7, 31, 128 << 10, protocol.POSIX_ACL)
        data = await kernel.get(Opcode.INIT, 0, struct.pack("=4I", 7, 23, 4096, 0))
        assert struct.unpack_from("=4I", data) == (7, 23, 4096, 0)
        assert (await kernel.get(Opcode.INIT, 0, struct.pack("=4I", 8, 1, 0, 0)))[:8] == struct.pack(
            "=2I", 7, 31
        )
        assert await kernel.ask(Opcode.INIT, 0, struct.pack("=4I", 6, 1, 0, 0)) == (errno.EPROTO, b"")


async def test_attributes(layer: Ext3Layer) -> None:
    async with asked(layer) as kernel:
        for name in (b"file", b"dir", b"link", b"gone", b"device"):
            key, attr = layer.lookup(layer.root, name) or (0, None)
            assert attr is not None
            data = await kernel.get(Opcode.LOOKUP, ROOT, name + b"\0")
            number, *valid = protocol.ENTRY_OUT.unpack_from(data)
            assert valid == [0, 0, 0, 0, 0]
            got = protocol.ATTR.unpack_from(data, protocol.ENTRY_OUT.size)
            seconds = [time // 10**9 for time in (attr.st_atime_ns, attr.st_mtime_ns, attr.st_ctime_ns)]
            assert got[:6] == (attr.st_ino, attr.st_size, attr.st_blocks, *seconds)
            assert got[6:] == (
                *(time % 10**9 for time in (attr.st_atime_ns, attr.st_mtime_ns, attr.st_ctime_ns)),
                *(attr.st_mode, attr.st_nlink, attr.st_uid, attr.st_gid, attr.st_rdev, 4096, 0),
            )
            again = await kernel.get(Opcode.GETATTR, number, bytes(16))
            assert again == bytes(16) + data[protocol.ENTRY_OUT.size :]
            assert number != key
        assert await kernel.get(Opcode.READLINK, await kernel.find(b"link")) == b"to/nowhere"
        assert await kernel.ask(Opcode.READLINK, await kernel.find(b"file")) == (errno.EINVAL, b"")
        assert await kernel.ask(Opcode.LOOKUP, ROOT, b"none\0") == (errno.ENOENT, b"")
        assert await kernel.ask(Opcode.LOOKUP, ROOT, b"x" * 300 + b"\0") == (errno.ENAMETOOLONG, b"")
        assert await kernel.ask(Opcode.LOOKUP, await kernel.find(b"file"), b"x\0") == (errno.ENOTDIR, b"")
        room = layer.statfs()
        assert struct.unpack_from("=5Q3I", await kernel.get(Opcode.STATFS)) == (
            *(room.blocks, room.bfree, room.bavail, room.files, room.ffree),
            *(room.bsize, 255, room.frsize),
        )


async def test_xattrs(layer: Ext3Layer) -> None:
    async with asked(layer) as kernel:
        file = await kernel.find(b"file")
        name = b"trusted.overlay.origin\0"
        assert await kernel.get(Opcode.GETXATTR, file, struct.pack("=II", 0, 0) + name) == struct.pack(
            "=II", 40, 0
        )
        assert await kernel.get(Opcode.GETXATTR, file, struct.pack("=II", 40, 0) + name) == b"x" * 40
        assert await kernel.ask(Opcode.GETXATTR, file, struct.pack("=II", 39, 0) + name) == (
            errno.ERANGE,
            b"",
        )
        code, _ = await kernel.ask(Opcode.GETXATTR, file, struct.pack("=II", 39, 0) + b"user.none\0")
        assert code == errno.ENODATA
        for uid, listed in ((0, [b"trusted.overlay.origin", b"user.mine"]), (1, [b"user.mine"])):
            code, data = await kernel.ask(Opcode.LISTXATTR, file, struct.pack("=II", 100, 0), uid=uid)
            assert (code, sorted(data.split(b"\0")[:-1])) == (0, listed)


async def test_reads(layer: Ext3Layer) -> None:
    """A read returns what it asks for, but at most what the mount has negotiated."""
    async with asked(layer) as kernel:
        file = await kernel.find(b"file")
        for offset, size in ((0, 10), (4095, 128 << 10), (len(DATA) - 5, 100), (len(DATA), 1), (1 << 62, 1)):
            assert await kernel.read(file, offset, size) == DATA[offset : offset + size]
        assert await kernel.read(file, 7, 0xFFFFFFFF) == DATA[7 : 7 + (128 << 10)]
        fh = await kernel.open(file)
        assert await kernel.ask(Opcode.READ, file, reading(fh, 1 << 63, 1)) == (errno.EINVAL, b"")
        assert await kernel.ask(Opcode.READ, file, reading(fh + 77, 0, 1)) == (errno.EBADF, b"")
        await kernel.get(Opcode.RELEASE, file, struct.pack("=Q", fh))
        assert await kernel.ask(Opcode.READ, file, reading(fh, 0, 1)) == (errno.EBADF, b"")
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_TRUNC):
            assert await kernel.ask(Opcode.OPEN, file, struct.pack("=II", flags, 0)) == (errno.EROFS, b"")
        assert await kernel.ask(Opcode.OPEN, await kernel.find(b"dir"), bytes(8)) == (errno.EISDIR, b"")


async def test_listing(layer: Ext3Layer) -> None:
    """However small the buffer, each name comes once, at an offset that does not change."""
    async with asked(layer) as kernel:
        fh = await kernel.open(ROOT, Opcode.OPENDIR)
        found, offset = [], 0
        while more := names_in(await kernel.get(Opcode.READDIR, ROOT, reading(fh, offset, 40))):
            assert len(more) == 1
            found += more
            offset = more[-1][2]
        assert [at for _, _, at, _ in found] == list(range(1, len(found) + 1))
        assert {name for name, _, _, _ in found} == {b".", b"..", *names_of(layer, layer.root)}
        for name, ino, _, kind in found:
            _, attr = layer.lookup(layer.root, name) or (0, layer.stat(layer.root))
            assert (ino, kind) == (attr.st_ino, stat.S_IFMT(attr.st_mode) >> 12)
        layer.unlink(layer.root, b"link", None)
        assert names_in(await kernel.get(Opcode.READDIR, ROOT, reading(fh, 3, 4096))) == [
            entry for entry in found[3:] if entry[0] != b"link"
        ]
        assert b"link" not in [entry[0] for entry in names_in(await whole(kernel, ROOT, fh))]
        below = await kernel.find(b"dir", b"below")
        inner = names_in(await whole(kernel, below, await kernel.open(below, Opcode.OPENDIR)))
        assert [ino for _, ino, _, _ in inner] == [
            int(layer.lookup(layer.lookup(layer.root, b"dir")[0], b"below")[0]),  # type: ignore[index]
            int(layer.lookup(layer.root, b"dir")[0]),  # type: ignore[index]
        ]
        assert await kernel.get(Opcode.READDIR, ROOT, reading(fh, 1 << 63, 4096)) == b""
        await kernel.get(Opcode.RELEASEDIR, ROOT, struct.pack("=Q", fh))
        assert await kernel.ask(Opcode.READDIR, ROOT, reading(fh, 0, 4096)) == (errno.EBADF, b"")
        assert await kernel.ask(Opcode.OPENDIR, await kernel.find(b"file"), bytes(8)) == (errno.ENOTDIR, b"")


async def whole(kernel: Kernel, nodeid: int, fh: int) -> bytes:
    return await kernel.get(Opcode.READDIR, nodeid, reading(fh, 0, 0xFFFFFFFF))


async def test_stale(layer: Ext3Layer) -> None:
    """A removed inode and another with its number are distinct, also in FORGET."""
    async with asked(layer) as kernel:
        old = await kernel.find(b"file")
        number = layer.lookup(layer.root, b"file")[0]  # type: ignore[index]
        layer.unlink(layer.root, b"file", None)
        assert await kernel.ask(Opcode.GETATTR, old, bytes(16)) == (errno.ESTALE, b"")
        key, file = layer.create(layer.root, b"other", 0o600, 0, 0)
        file.close()
        assert key == number, "the number is given out again"
        new = await kernel.find(b"other")
        assert new != old
        for opcode, body in (
            (Opcode.GETATTR, bytes(16)),
            (Opcode.OPEN, bytes(8)),
            (Opcode.LOOKUP, b"x\0"),
            (Opcode.READLINK, b""),
        ):
            assert await kernel.ask(opcode, old, body) == (errno.ESTALE, b"")
        await kernel.tell(Opcode.FORGET, old, struct.pack("=Q", 1))
        assert await kernel.find(b"other") == new
        await kernel.get(Opcode.GETATTR, new, bytes(16))


async def test_forgets(layer: Ext3Layer) -> None:
    """An inode is unknown after as many FORGETs as lookups; the root is always known."""
    async with asked(layer) as kernel:
        file = await kernel.find(b"file")
        for _ in range(2):
            assert await kernel.find(b"file") == file
        await kernel.tell(Opcode.FORGET, file, struct.pack("=Q", 2))
        await kernel.get(Opcode.GETATTR, file, bytes(16))
        directory = await kernel.find(b"dir")
        pairs = struct.pack("=4Q", file, 1, directory, 1)
        await kernel.tell(Opcode.BATCH_FORGET, 0, struct.pack("=II", 2, 0) + pairs)
        for nodeid in (file, directory):
            assert await kernel.ask(Opcode.GETATTR, nodeid, bytes(16)) == (errno.ESTALE, b"")
        assert await kernel.find(b"file") not in {file, directory}
        await kernel.tell(Opcode.FORGET, ROOT, struct.pack("=Q", 1 << 40))
        await kernel.works()


CHANGES = {
    "SETATTR": 4, "SYMLINK": 6, "MKNOD": 8, "MKDIR": 9, "UNLINK": 10, "RMDIR": 11, "RENAME": 12, "LINK": 13,
    "WRITE": 16, "SETXATTR": 21, "REMOVEXATTR": 24, "CREATE": 35, "FALLOCATE": 43, "RENAME2": 45,
    "COPY_FILE_RANGE": 47, "TMPFILE": 51,
}  # fmt: skip
OTHERS = {
    "FSYNC": 20, "FLUSH": 25, "FSYNCDIR": 30, "GETLK": 31, "SETLK": 32, "SETLKW": 33, "ACCESS": 34,
    "BMAP": 37, "IOCTL": 39, "POLL": 40, "READDIRPLUS": 44, "LSEEK": 46, "SETUPMAPPING": 48, "STATX": 52,
    "none": 9999,
}  # fmt: skip


async def test_nothing_is_changed(layer: Ext3Layer) -> None:
    async with asked(layer) as kernel:
        for opcodes, code in ((CHANGES, errno.EROFS), (OTHERS, errno.ENOSYS)):
            for opcode in opcodes.values():
                assert await kernel.ask(opcode, ROOT, b"file\0" * 20) == (code, b""), opcode
        assert await kernel.ask(Opcode.DESTROY) == (0, b"")
        await kernel.tell(Opcode.INTERRUPT, 0, struct.pack("=Q", 1))
        await kernel.works()


async def test_garbage(layer: Ext3Layer) -> None:
    """Each request gets one reply, or none if the kernel expects none; the view continues."""
    source = random.Random(7)
    silent = {Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, 41}
    async with asked(layer) as kernel:
        await kernel.find(b"file")
        for short in range(protocol.IN.size):
            if short:
                await kernel.send(bytes(short))
        for round_ in range(3000):
            opcode = source.choice((*range(1, 55), 4096, 0xFFFFFFFF))
            nodeid = source.choice((0, ROOT, 2, 3, 77, 1 << 63, (1 << 64) - 1))
            body = source.randbytes(source.choice((0, 1, 7, 8, 15, 16, 40, 300, 4096, 65536)))
            if source.random() < 0.5:
                body = bytes(len(body))
            if opcode in silent:
                await kernel.tell(opcode, nodeid if nodeid != 2 else 5, body)
            else:
                code, _ = await kernel.ask(opcode, nodeid, body)
                assert code == 0 or code in errno.errorcode, (round_, opcode, code)
        unique = 1 << 40
        for length in (0, 39, 41, 0xFFFFFFFF):
            await kernel.send(protocol.IN.pack(length, Opcode.GETATTR, unique, ROOT, 0, 0, 1, 0))
            assert await kernel.hear() == (unique, errno.EINVAL, b"")
        for opcode in (
            Opcode.LOOKUP,
            Opcode.GETXATTR,
            Opcode.OPEN,
            Opcode.READ,
            Opcode.READDIR,
            Opcode.RELEASE,
            Opcode.RELEASEDIR,
            Opcode.LISTXATTR,
            Opcode.INIT,
        ):
            assert await kernel.ask(opcode, ROOT, b"") == (errno.EINVAL, b""), opcode
        assert await kernel.ask(Opcode.LOOKUP, ROOT, b"file") == (errno.EINVAL, b"")
        await kernel.works()


class Slow:
    """A file that takes long to read."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.reading = threading.Event()
        self.done: list[str] = []

    def try_pread(self, size: int, offset: int) -> None:
        return None

    def pread(self, size: int, offset: int) -> bytes:
        assert threading.current_thread() is not threading.main_thread()
        self.reading.set()
        assert self.may.wait(20)
        self.done.append("read")
        return b"slow"

    def close(self) -> None:
        self.done.append("closed")


async def test_long_reads_are_waited_for(layer: Ext3Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread reads, while others are served; it ends before the file and the layer are closed."""
    slow = Slow()
    monkeypatch.setattr(layer, "open", lambda key, flags: slow)
    async with asked(layer) as kernel:
        file = await kernel.find(b"file")
        fh = await kernel.open(file)
        slow.may.set()
        assert await kernel.get(Opcode.READ, file, reading(fh, 0, 10)) == b"slow"
        slow.may.clear()
        slow.reading.clear()
        await kernel.tell(Opcode.READ, file, reading(fh, 0, 10))
        await trio.to_thread.run_sync(slow.reading.wait, 20)
        threading.Timer(0.1, slow.may.set).start()
    assert slow.done == ["read", "read", "closed"]


async def test_failures_are_answered(
    layer: Ext3Layer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The view reports any error of the layer, and continues."""
    async with asked(layer) as kernel:
        file = await kernel.find(b"file")
        for error, code in (
            (OSError(errno.EUCLEAN, "damaged"), errno.EUCLEAN),
            (MemoryError(), errno.ENOMEM),
            (RuntimeError("a bug"), errno.EIO),
        ):

            def fail(*_: object, error: Exception = error) -> None:
                raise error

            with monkeypatch.context() as broken:
                broken.setattr(layer, "stat", fail)
                broken.setattr(layer, "open", fail)
                assert await kernel.ask(Opcode.GETATTR, file, bytes(16)) == (code, b"")
                assert await kernel.ask(Opcode.OPEN, file, bytes(8)) == (code, b"")
        await kernel.works()
    assert [record.exc_info is not None for record in caplog.records] == [True, True]


async def test_a_damaged_inode_is_listed(layer: Ext3Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the damaged inode reports an error; its neighbours are readable."""
    lookup = layer.lookup

    def damaged(directory: int, name: bytes) -> Any:
        if name == b"file":
            raise OSError(errno.EUCLEAN, "damaged")
        return lookup(directory, name)

    async with asked(layer) as kernel:
        monkeypatch.setattr(layer, "lookup", damaged)
        listed = {
            entry[0]: entry
            for entry in names_in(await whole(kernel, ROOT, await kernel.open(ROOT, Opcode.OPENDIR)))
        }
        assert listed.keys() == {b".", b"..", *names_of(layer, layer.root)}
        assert (listed[b"file"][1], listed[b"file"][3]) == (0xFFFFFFFF, 0)
        assert await kernel.ask(Opcode.LOOKUP, ROOT, b"file\0") == (errno.EUCLEAN, b"")


async def test_ends_with_the_connection(layer: Ext3Layer) -> None:
    """The view ends when the other side closes, and closes files, so that unlinked ones are freed."""
    async with asked(layer) as kernel:
        file = await kernel.find(b"file")
        await kernel.open(file)
        before = layer.statfs().bfree
        layer.unlink(layer.root, b"file", None)
        await kernel.get(Opcode.GETATTR, file, bytes(16))
        kernel.end.shutdown(socket.SHUT_RDWR)
        with trio.fail_after(20):
            while kernel.view._fd >= 0:
                await trio.lowlevel.checkpoint()
        assert layer.statfs().bfree >= before + len(DATA) // 4096
        kernel.view.close()


async def test_an_answer_that_nobody_takes(layer: Ext3Layer, caplog: pytest.LogCaptureFixture) -> None:
    async with asked(layer) as kernel:
        while "did not accept" not in caplog.text:
            assert kernel.unique < 100_000
            await kernel.tell(Opcode.GETATTR, ROOT, bytes(16))
            await trio.lowlevel.checkpoint()
        await kernel.tell(Opcode.FORGET, ROOT, bytes(8))
        with suppress(BlockingIOError):
            while kernel.end.recv(1 << 20):
                await trio.lowlevel.checkpoint()
        await kernel.works()


async def test_layer_without_handles(layer: Ext3Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that cannot be distinguished from the rest are not shown."""
    monkeypatch.setattr(layer, "handle", lambda key: None)
    with pytest.raises(OSError, match="not supported"):
        View(layer, -1)


async def test_what_fails_beside_a_mount_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def fails() -> None:
        raise RuntimeError("a bug")

    await daemon._beside(fails)
    assert "the mount continues" in caplog.text
