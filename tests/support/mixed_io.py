"""Read and write a file in every way, from several processes, and compare with a model.

A driver lets one process after the other read or write in some way, and compares the data. Another process
reads at random at the same time, so that pages are in the cache at unexpected moments. Standard library only.
"""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import random
import struct
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PAGE = 4096
SIZE = 24 * PAGE
"""The maximum size of the file."""
LEAST = 4 * PAGE
"""The minimum size of the file once it was that large. These pages are mapped and read at any time."""
_SETUP, _GETEVENTS, _SUBMIT, _URING_SETUP, _URING_ENTER = 206, 208, 209, 425, 426  # of x86_64
_READ, _WRITE = 0, 1
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Aio:
    """I/O with io_submit(2) and io_getevents(2)."""

    def __init__(self) -> None:
        self._context = ctypes.c_ulong()
        assert _libc.syscall(_SETUP, 4, ctypes.byref(self._context)) == 0

    def __call__(self, fd: int, write: bool, memory: mmap.mmap, size: int, offset: int) -> int:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        fields = (0, 0, 0, _WRITE if write else _READ, 0, fd, address, size, offset, 0, 0, 0)
        block = ctypes.create_string_buffer(struct.pack("=QIIHhIQQqQII", *fields))
        pointer, events = ctypes.c_void_p(ctypes.addressof(block)), ctypes.create_string_buffer(32)
        assert _libc.syscall(_SUBMIT, self._context, 1, ctypes.byref(pointer)) == 1
        assert _libc.syscall(_GETEVENTS, self._context, 1, 1, events, None) == 1
        return int(struct.unpack("=QQqq", events.raw)[2])


class Uring:
    """I/O with io_uring(7), one request at a time."""

    def __init__(self) -> None:
        params = bytearray(120)  # struct io_uring_params
        pointer = (ctypes.c_char * 120).from_buffer(params)
        self._fd = _libc.syscall(_URING_SETUP, 4, pointer)
        assert self._fd >= 0, os.strerror(ctypes.get_errno())
        sq, cq = struct.unpack_from("=10I", params, 40), struct.unpack_from("=10I", params, 80)
        self._tail, self._mask, self._array = sq[1], sq[2], sq[6]
        self._cq_head, self._cq_tail, self._cq_mask, self._cqes = cq[0], cq[1], cq[2], cq[5]
        self._ring = mmap.mmap(self._fd, 4096, offset=0)
        self._completions = mmap.mmap(self._fd, 4096, offset=0x8000000)
        self._entries = mmap.mmap(self._fd, 4096, offset=0x10000000)

    def __call__(self, fd: int, write: bool, memory: mmap.mmap, size: int, offset: int) -> int:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        opcode = 23 if write else 22  # IORING_OP_WRITE, IORING_OP_READ
        struct.pack_into("=BBHiQQII", self._entries, 0, opcode, 0, 0, fd, offset, address, size, 0)
        tail = struct.unpack_from("=I", self._ring, self._tail)[0]
        mask = struct.unpack_from("=I", self._ring, self._mask)[0]
        struct.pack_into("=I", self._ring, self._array + 4 * (tail & mask), 0)
        struct.pack_into("=I", self._ring, self._tail, (tail + 1) & 0xFFFFFFFF)
        assert _libc.syscall(_URING_ENTER, self._fd, 1, 1, 1, None, 0) == 1
        head = struct.unpack_from("=I", self._completions, self._cq_head)[0]
        at = head & struct.unpack_from("=I", self._completions, self._cq_mask)[0]
        result = struct.unpack_from("=Qi", self._completions, self._cqes + 16 * at)[1]
        struct.pack_into("=I", self._completions, self._cq_head, (head + 1) & 0xFFFFFFFF)
        return int(result)


class Worker:
    """A process that has the file open in every way."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.memory = mmap.mmap(-1, SIZE)
        self.aio, self.uring = Aio(), Uring()
        self.open()

    def open(self) -> None:
        self.buffered = os.open(self.path, os.O_RDWR)
        self.direct = os.open(self.path, os.O_RDWR | os.O_DIRECT)
        # Longer than the file, which Python's mmap refuses. Only pages of the file are accessed.
        self.mapped = _libc.mmap(
            None, SIZE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, self.buffered, 0
        )
        assert self.mapped != ctypes.c_void_p(-1).value

    def reopen(self) -> None:
        _libc.munmap(self.mapped, SIZE)
        os.close(self.buffered)
        os.close(self.direct)
        self.open()

    def read(self, way: str, offset: int, size: int) -> bytes:
        if way == "buffered":
            return os.pread(self.buffered, size, offset)
        if way == "mmap":
            return ctypes.string_at(self.mapped + offset, size)
        if way == "direct":
            got = os.preadv(self.direct, [memoryview(self.memory)[:size]], offset)
        else:
            got = self._call(way)(self._fd(way), False, self.memory, size, offset)
        assert got >= 0, (way, os.strerror(-got))
        return self.memory[:got]

    def write(self, way: str, offset: int, data: bytes) -> int:
        if way == "buffered":
            return os.pwrite(self.buffered, data, offset)
        if way == "mmap":
            ctypes.memmove(self.mapped + offset, data, len(data))
            return len(data)
        self.memory[: len(data)] = data
        if way == "direct":
            return os.pwritev(self.direct, [memoryview(self.memory)[: len(data)]], offset)
        return self._call(way)(self._fd(way), True, self.memory, len(data), offset)

    def truncate(self, size: int) -> None:
        os.ftruncate(self.buffered, size)

    def punch(self, offset: int, size: int) -> None:
        assert _libc.fallocate(self.buffered, 3, offset, size) == 0

    def sync(self) -> None:
        os.fsync(self.buffered)

    def forget(self) -> None:
        os.posix_fadvise(self.buffered, 0, 0, os.POSIX_FADV_DONTNEED)

    def size(self) -> int:
        return os.stat(self.path).st_size

    def _call(self, way: str) -> Callable[[int, bool, mmap.mmap, int, int], int]:
        return self.aio if way.startswith("aio") else self.uring

    def _fd(self, way: str) -> int:
        return self.direct if way.endswith("direct") else self.buffered


WAYS = ("buffered", "direct", "mmap", "aio", "aio direct", "uring", "uring direct")


def _work(path: str, asked: Connection) -> None:
    worker = Worker(path)
    while True:
        try:
            name, arguments = asked.recv()
        except EOFError:
            return
        try:
            asked.send(getattr(worker, name)(*arguments))
        except (OSError, AssertionError) as error:
            asked.send(error)


def _disturb(path: str, number: int) -> None:
    """Read at random until the parent exits, so that the cache contains unexpected pages."""
    worker, chance = Worker(path), random.Random(number)
    parent = os.getppid()
    while os.getppid() == parent:
        way = chance.choice(("buffered", "mmap", "aio", "direct", "buffered"))
        page = chance.randrange(LEAST // PAGE)
        try:
            worker.read(way, page * PAGE, PAGE)
        except (OSError, AssertionError):
            pass


class History:
    """The operations on the file, and the content that it must have."""

    def __init__(self, path: Path, seed: int, workers: int, *, ends_short: bool) -> None:
        """Start the processes. *ends_short*: whether direct io_uring reads beyond the end return a part."""
        self.model = bytearray(path.read_bytes())
        self.chance = random.Random(seed)
        self.ends_short = ends_short
        self.done: list[str] = []
        self._processes: list[Any] = []
        self._connections: list[Any] = []
        context = multiprocessing.get_context("fork")
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(str(path), theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        process = context.Process(target=_disturb, args=(str(path), seed), daemon=True)
        process.start()
        self._processes.append(process)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join(10)

    def ask(self, name: str, *arguments: Any) -> Any:
        """Let one of the processes do an operation; return its result."""
        who = self.chance.randrange(len(self._connections))
        shown = [len(one) if isinstance(one, bytes) else one for one in arguments]
        self.done.append(f"{who} {name} {shown}")
        self._connections[who].send((name, arguments))
        answer = self._connections[who].recv()
        assert not isinstance(answer, BaseException), (answer, self.done[-8:])
        return answer

    def step(self) -> None:
        """Change the file, then read it in two ways."""
        what = self.chance.random()
        if what < 0.75 or not self.model:
            offset, size = self._write()
        elif what < 0.85:
            offset, size = self._truncate()
        elif what < 0.9:
            offset = self.chance.randrange(len(self.model)) // PAGE * PAGE
            size = min(PAGE * self.chance.choice((1, 2)), len(self.model) - offset)
            self.ask("punch", offset, size)
            self.model[offset : offset + size] = bytes(size)
        else:
            self.ask(self.chance.choice(("sync", "forget", "reopen")))
            offset, size = 0, len(self.model)
        for _ in range(2):
            self.check(offset, size)
        if self.chance.random() < 0.05:
            self.check(0, len(self.model))

    def _write(self) -> tuple[int, int]:
        way = self.chance.choice(WAYS)
        if way.endswith("direct"):
            offset = self.chance.randrange(SIZE // PAGE - 2) * PAGE
            size = PAGE * self.chance.choice((1, 1, 2))
        else:
            end = len(self.model) if way == "mmap" else SIZE
            if way == "mmap" and end < 2:
                way, end = "buffered", SIZE
            offset = self.chance.randrange(end - 1)
            size = self.chance.randrange(1, min(2 * PAGE, end - offset) + 1)
        data = self.chance.randbytes(8) * (size // 8 + 1)
        data = data[:size]
        written = self.ask("write", way, offset, data)
        assert written == size, (written, self.done[-8:])
        if offset > len(self.model):
            self.model.extend(bytes(offset - len(self.model)))
        self.model[offset : offset + size] = data
        return offset, size

    def _truncate(self) -> tuple[int, int]:
        size = self.chance.randrange(LEAST, SIZE)
        before = len(self.model)
        self.ask("truncate", size)
        if size < before:
            del self.model[size:]
        else:
            self.model.extend(bytes(size - before))
        return max(min(size, before) - PAGE, 0), 2 * PAGE

    def check(self, offset: int, size: int) -> None:
        """Let a process read in some way, and compare with the model."""
        way = self.chance.choice(WAYS)
        if way.endswith("direct"):
            end = -(-(offset + size) // PAGE) * PAGE
            offset = offset // PAGE * PAGE
            size = min(end, SIZE) - offset
            if offset + size > len(self.model) and not self.ends_short:
                way = "direct"
        if way == "mmap":
            size = min(size, len(self.model) - offset)
        if size <= 0:
            return
        wanted = bytes(self.model[offset : offset + size])
        got = self.ask("read", way, offset, size)
        if got != wanted:
            both = enumerate(zip(got, wanted, strict=False))
            first = next((at for at, (one, other) in both if one != other), min(len(got), len(wanted)))
            raise AssertionError(
                f"{way} read of {size} at {offset} gave {len(got)} of {len(wanted)}; from {offset + first} "
                f"{got[first : first + 16].hex()}, not {wanted[first : first + 16].hex()}; {self.done[-9:]}"
            )
        assert self.ask("size") == len(self.model), self.done[-8:]


def go_on(path: Path, seed: int, seconds: float, *, workers: int = 3, ends_short: bool = True) -> int:
    """Read and write for *seconds*; return the number of steps. AssertionError if a read is wrong."""
    history = History(path, seed, workers, ends_short=ends_short)
    until, steps = time.monotonic() + seconds, 0
    try:
        while time.monotonic() < until:
            history.step()
            steps += 1
    finally:
        history.close()
    return steps
