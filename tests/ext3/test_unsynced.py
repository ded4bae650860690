"""Disks that accept file data and fail to write it later: it is kept, or known to be lost."""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import IO

import pytest

from cowfs.formats.ext3._engine import ffi
from tests.ext3 import engine, images
from tests.ext3.engine import FDATASYNC, PWRITE, Engine, make_file
from tests.ext3.images import MODERN, OLD, SMALL, Shape
from tests.ext3.load import Load
from tests.ext3.model import Promises, judge
from tests.ext3.powercut import Event, parse
from tests.ext3.reader import Image
from tests.ext3.test_full import fails_with, must_refuse
from tests.ext3.test_room import FULL
from tests.support.listing import find, names_of

NO_MEMORY = 32
"""X3_NO_MEMORY of engine.h."""
WIDE = Shape(block_size=65536, mib=144, journal=64, inodes=512)
_WRITE, _BARRIER, _MARK, _BEGUN, _FAILED = 1, 2, 3, 4, 5
AS_NFS = 64
"""X3_AS_NFS."""
OTHER_BOOT = 16
"""X3_OTHER_BOOT."""

shapes = pytest.mark.parametrize("shape", [MODERN, OLD, WIDE], ids=str)


class Disk:
    """The file of an image, and which of its data is on disk."""

    def __init__(self, path: Path, trace: IO[bytes]) -> None:
        self.path = path
        self.trace = trace
        self._base = path.read_bytes()

    def durable(self) -> bytes:
        """Return the file as of the last successful fdatasync, and with the writes since."""
        return deque(self.states(), 1)[0][1]

    def states(self) -> Iterator[tuple[int, bytes]]:
        """Yield the same at each mark, with its number, and at the end (-1)."""
        self.trace.seek(0)
        disk = bytearray(self._base)
        written: list[tuple[int, Event]] = []
        begun: dict[int, int] = {}  # where in the trace each fdatasync begins, by its number
        for at, event in enumerate(parse(self.trace.read())):
            if event.kind == _WRITE:
                written.append((at, event))
            elif event.kind == _BEGUN:
                begun[event.number] = at
            elif event.kind == _FAILED:
                written.clear()
            elif event.kind == _BARRIER:
                for _, write in (covered := [each for each in written if each[0] < begun[event.number]]):
                    disk[write.number : write.number + len(write.data)] = write.data
                del written[: len(covered)]
            elif event.kind == _MARK:
                yield event.number, bytes(disk)
        yield -1, bytes(disk)

    def drop(self) -> None:
        """Drop all data that is not on disk, as the kernel does after reporting an error once."""
        with self.path.open("r+b") as file:
            file.write(self.durable())


@contextmanager
def work(path: Path, debug: int = 0) -> Iterator[tuple[Disk, Engine]]:
    """Open an image whose file can drop data that is not on disk."""
    with (
        tempfile.TemporaryFile() as trace,
        engine.opened(path, trace_fd=trace.fileno(), debug=debug) as opened,
    ):
        yield Disk(path, trace), opened


def fill(opened: Engine, seed: int = 1) -> dict[bytes, bytes]:
    """Write files like programs do; return their content."""
    chance = random.Random(seed)
    layer = opened.layer
    content: dict[bytes, bytes] = {}

    def write(name: bytes, *pieces: tuple[int, bytes]) -> None:
        key = find(layer, name) if name in names_of(layer, layer.root) else make_file(layer, name)
        file = layer.open(key, os.O_RDWR)
        now = bytearray(content.get(name, b""))
        for offset, data in pieces:
            file.pwrite(data, offset)
            now.extend(bytes(max(offset + len(data) - len(now), 0)))
            now[offset : offset + len(data)] = data
        file.close()
        content[name] = bytes(now)

    write(b"whole", (0, chance.randbytes(1 << 20)))
    write(b"lines", *((at, b"%099d\n" % at) for at in range(0, 30_000, 100)))
    write(b"odd", (0, chance.randbytes(300_001)), (300_001, chance.randbytes(70_007)), (5000, b"x" * 5000))
    write(b"sparse", (1_000_003, b"far"), (500_000, chance.randbytes(9000)))
    opened.image.commit()
    write(b"whole", (12_288, chance.randbytes(8192)), (40_000, b"in the middle"))
    write(b"lines", *((at, b"%099d\n" % at) for at in range(30_000, 35_000, 100)))
    write(b"fresh", *((at, chance.randbytes(1000)) for at in range(0, 20_000, 2000)))
    return content


def check(opened: Engine, content: dict[bytes, bytes]) -> None:
    for name, data in content.items():
        file = opened.layer.open(find(opened.layer, name), os.O_RDONLY)
        assert file.pread(len(data) + 1, 0) == data, name
        file.close()


def reopened(path: Path, content: dict[bytes, bytes], gone: tuple[bytes, ...] = ()) -> None:
    """Open the image of a dead process; it must be sound, with all of *content* and nothing of *gone*."""
    with engine.opened(path) as opened:
        check(opened, content)
        assert not set(gone) & set(names_of(opened.layer, opened.layer.root))
    assert images.unclean(path) is None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@shapes
def test_what_fdatasync_refuses_is_kept_in_memory(place: Path, shape: Shape, code: int) -> None:
    """It is readable although the kernel dropped it, and is written when the disk accepts it."""
    path = images.make(place / "image", shape)
    with work(path) as (disk, opened):
        make_file(opened.layer, b"kept")
        content = fill(opened)
        opened.inject(FDATASYNC, 1, code, sticky=True)
        with fails_with(code):
            opened.layer.sync()
        disk.drop()
        facts = opened.image.facts()
        assert facts.stalled == code and facts.unsaved > 5
        check(opened, content)
        must_refuse(opened, code)
        with fails_with(code):
            opened.layer.sync()
        disk.drop()
        opened.inject(FDATASYNC, 3, code, sticky=True)  # a part of it gets there
        with fails_with(code):
            opened.layer.sync()
        disk.drop()
        check(opened, content)
        opened.inject(FDATASYNC, 0, 0)
        opened.layer.sync()
        assert not opened.image.facts().stalled and not opened.image.facts().unsaved
        disk.drop()
        check(opened, content)
        make_file(opened.layer, b"later")
        opened.image.abandon()
    reopened(path, content)


def test_fsync_of_a_file_whose_metadata_is_on_disk(place: Path) -> None:
    """No commit is needed: fdatasync alone waits, and only it fails."""
    path = images.make(place / "image")
    with work(path) as (disk, opened):
        content = fill(opened)
        opened.layer.sync()
        file = opened.layer.open(find(opened.layer, b"whole"), os.O_RDWR)
        file.pwrite(b"anew" * 5000, 2000)
        content[b"whole"] = content[b"whole"][:2000] + b"anew" * 5000 + content[b"whole"][22_000:]
        opened.inject(FDATASYNC, 1, errno.ENOSPC)
        with fails_with(errno.ENOSPC):
            file.fsync(True)
        disk.drop()
        check(opened, content)
        file.fsync(True)
        disk.drop()
        check(opened, content)
        file.close()
        assert not opened.image.facts().stalled
        opened.image.abandon()
    reopened(path, content)


@pytest.mark.parametrize("then", ["nothing", "a part is written", "all changes are written"])
def test_what_was_dropped_before_is_lost_and_told(
    place: Path, caplog: pytest.LogCaptureFixture, then: str
) -> None:
    """The kernel's own write-back failed and dropped the data: fdatasync fails afterwards."""
    path = images.make(place / "image")
    with work(path) as (disk, opened):
        before = fill(opened)
        opened.layer.sync()
        layer = opened.layer
        folder = layer.mkdir(layer.root, b"folder", 0o700, 0, 0)
        victim, new = find(layer, b"whole"), make_file(layer, b"file", folder)
        files = [layer.open(key, os.O_RDWR) for key in (victim, new)]
        for file in files:
            file.pwrite(b"lost" * 1024, 8192)
        disk.drop()
        if then == "a part is written":
            for file in files:
                file.pwrite(b"part", 8300)
        elif then == "all changes are written":
            for file in files:
                file.pwrite(b"kept" * 1024, 8192)
        opened.inject(FDATASYNC, 1, errno.ENOSPC)
        if then == "all changes are written":
            with fails_with(errno.ENOSPC):
                layer.sync()
            layer.sync()
            assert files[0].pread(4096, 8192) == files[1].pread(4096, 8192) == b"kept" * 1024
            assert not opened.image.facts().aborted
            return
        with caplog.at_level(logging.ERROR), fails_with(errno.EIO):
            layer.sync()
        opened.image.tell_lost()
        opened.image.tell_lost()
        must_refuse_for_good(opened)
        assert "the disk has refused file data: No space left on device" in caplog.text
        assert caplog.text.count("is lost: folder/file, whole\n") == 1
        for file in files:
            file.close()
        opened.image.abandon()
    if then == "a part is written":
        del before[b"whole"]  # it has that part, for it was written in place
    reopened(path, before, gone=(b"folder",))


def must_refuse_for_good(opened: Engine) -> None:
    with fails_with(errno.EROFS):
        opened.layer.mkdir(opened.layer.root, b"new", 0o700, 0, 0)
    with fails_with(errno.EROFS):
        opened.layer.sync()
    assert opened.image.facts().aborted


def test_a_file_that_is_gone_is_not_missed(place: Path) -> None:
    path = images.make(place / "image")
    with work(path) as (disk, opened):
        content = fill(opened)
        opened.layer.sync()
        file = opened.layer.open(make_file(opened.layer, b"temporary"), os.O_RDWR)
        file.pwrite(b"temporary" * 3000, 0)
        disk.drop()
        file.close()
        opened.layer.unlink(opened.layer.root, b"temporary", None)
        opened.inject(FDATASYNC, 1, errno.ENOSPC)
        with fails_with(errno.ENOSPC):
            opened.layer.sync()
        opened.layer.sync()
        check(opened, content)
    reopened(path, content)


@pytest.mark.parametrize("dropped", [False, True])
def test_without_memory_for_it(place: Path, dropped: bool) -> None:
    """Then it stays in the page cache, and is compared again at the next attempt."""
    path = images.make(place / "image")
    with work(path, debug=NO_MEMORY) as (disk, opened):
        content = fill(opened)
        opened.inject(FDATASYNC, 1, errno.ENOSPC, sticky=True)
        for _ in range(3):
            with fails_with(errno.ENOSPC):
                opened.layer.sync()
        check(opened, content)
        if dropped:
            disk.drop()
            with fails_with(errno.EIO):
                opened.layer.sync()
            must_refuse_for_good(opened)
            opened.image.abandon()
            return
        opened.inject(FDATASYNC, 0, 0)
        opened.layer.sync()
        disk.drop()
        check(opened, content)
        opened.image.abandon()
    reopened(path, content)


@pytest.mark.parametrize("dropped", [False, True])
def test_a_host_that_tells_it_by_the_next_write(place: Path, dropped: bool) -> None:
    """Like NFS, fdatasync succeeds afterwards, which must not be trusted."""
    path = images.make(place / "image")
    with work(path, AS_NFS) as (disk, opened):
        content = fill(opened)
        if dropped:
            disk.drop()
        file = opened.layer.open(find(opened.layer, b"fresh"), os.O_RDWR)
        opened.inject(PWRITE, 1, errno.EDQUOT)
        with fails_with(errno.EDQUOT):
            file.pwrite(b"more", 1 << 20)
        file.close()
        with fails_with(errno.EIO if dropped else errno.EDQUOT):
            opened.layer.sync()
        if dropped:
            must_refuse_for_good(opened)
            opened.image.abandon()
            return
        opened.layer.sync()
        disk.drop()
        check(opened, content)
        opened.image.abandon()
    reopened(path, content)


def test_killed_while_it_waits(place: Path) -> None:
    """The redo log may depend on lost data: the image must be that of the last commit."""
    path = images.make(place / "image")
    with engine.opened(path) as opened:
        content = fill(opened)
        opened.layer.sync()
        make_file(opened.layer, b"empty")
        file = opened.layer.open(make_file(opened.layer, b"late"), os.O_RDWR)
        file.pwrite(b"late" * 10_000, 0)
        file.close()
        opened.inject(FDATASYNC, 1, errno.ENOSPC, sticky=True)
        with fails_with(errno.ENOSPC):
            opened.layer.sync()
        opened.image.abandon()
    reopened(path, content, gone=(b"late", b"empty"))


def test_killed_after_it_went_on(place: Path) -> None:
    """The redo log is valid for changes since then."""
    path = images.make(place / "image")
    with engine.opened(path) as opened:
        content = fill(opened)
        opened.inject(FDATASYNC, 1, errno.ENOSPC)
        with fails_with(errno.ENOSPC):
            opened.layer.sync()
        opened.layer.sync()
        content |= {b"after%d" % number: b"after" * number for number in range(20)}
        for number in range(20):
            file = opened.layer.open(make_file(opened.layer, b"after%d" % number), os.O_RDWR)
            file.pwrite(b"after" * number, 0)
            file.close()
        opened.image.abandon()
    reopened(path, content)


def test_what_is_written_while_it_waits(place: Path) -> None:
    """Compound changes may continue, and write where data is kept already."""
    path = images.make(place / "image")
    with work(path) as (disk, opened):
        content = fill(opened)
        opened.layer.sync()
        file = opened.layer.open(find(opened.layer, b"whole"), os.O_RDWR)
        with opened.image.together():
            file.pwrite(b"first" * 3000, 1000)
            opened.inject(FDATASYNC, 1, errno.ENOSPC)
            with fails_with(errno.ENOSPC):
                file.fsync(True)
            disk.drop()
            file.pwrite(b"second" * 1000, 5000)
            assert file.pread(20_000, 0)[5000:11_000] == b"second" * 1000
        with fails_with(errno.ENOSPC):
            file.pwrite(b"third", 0)
        disk.drop()
        whole = bytearray(content[b"whole"])
        whole[1000:16_000] = b"first" * 3000
        whole[5000:11_000] = b"second" * 1000
        content[b"whole"] = bytes(whole)
        check(opened, content)
        opened.layer.sync()
        file.close()
        disk.drop()
        check(opened, content)
        opened.image.abandon()
    reopened(path, content)


def begun(trace: IO[bytes]) -> int:
    """Return the number of fdatasync calls that have begun."""
    return sum(event.kind == _BEGUN for event in parse(os.pread(trace.fileno(), 1 << 30, 0)))


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until that number is reached."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def waits_in(opened: Engine, thread: int) -> bool:
    """Return whether a thread of this process waits for a lock or condition of the engine."""
    call = Path(f"/proc/self/task/{thread}/syscall").read_text().split()
    handle = int(ffi.cast("uintptr_t", opened.image.handle))
    return len(call) > 1 and 0 <= int(call[1], 16) - handle < 4096


@pytest.mark.parametrize("datasync", [True, False])
def test_fsync_of_what_was_written_while_a_commit_was_under_way(place: Path, datasync: bool) -> None:
    """The inode is in that commit, but not the data written since."""
    path = images.make(place / "image")
    with work(path) as (disk, opened), ThreadPoolExecutor(2) as pool:
        file = opened.layer.open(make_file(opened.layer, b"file"), os.O_RDWR)
        file.pwrite(bytes(8192), 0)
        before = begun(disk.trace)
        opened.inject(FDATASYNC, 2, 0)
        try:
            commit = pool.submit(opened.image.commit)
            eventually(lambda: begun(disk.trace) == before + 2)  # the one behind its last block
            file.pwrite(b"since" * 1000, 0)
            syncing = pool.submit(threading.get_native_id).result()
            synced = pool.submit(file.fsync, datasync)
            eventually(lambda: waits_in(opened, syncing))
        finally:
            opened.inject(FDATASYNC, 0, 0)
        synced.result()
        commit.result()
        path.write_bytes(disk.durable())
        opened.image.abandon()
    with engine.opened(path, read_only=True, debug=OTHER_BOOT) as left:
        check(left, {b"file": b"since" * 1000 + bytes(3192)})


def test_what_is_written_while_an_fdatasync_waits_for_its_turn(place: Path) -> None:
    """It is on disk when that call ends, in the test as in the engine, which forgets it then."""
    path = images.make(place / "image")
    with work(path) as (disk, opened), ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        content = fill(opened)
        opened.layer.sync()
        file = opened.layer.open(find(opened.layer, b"whole"), os.O_RDWR)
        waiting = other.submit(threading.get_native_id).result()
        before = begun(disk.trace)
        file.pwrite(content[b"whole"][-1:], len(content[b"whole"]) - 1)  # something to wait for
        opened.inject(FDATASYNC, 1, 0)
        try:
            first = one.submit(file.fsync, True)
            eventually(lambda: begun(disk.trace) == before + 1)
            second = other.submit(file.fsync, True)
            eventually(lambda: waits_in(opened, waiting))
            file.pwrite(b"anew" * 5000, 0)
        finally:
            opened.inject(FDATASYNC, 0, 0)
        first.result()
        second.result()
        file.pwrite(content[b"whole"][-1:], len(content[b"whole"]) - 1)
        opened.inject(FDATASYNC, 1, errno.ENOSPC)
        with fails_with(errno.ENOSPC):
            file.fsync(True)
        file.close()
        disk.drop()
        content[b"whole"] = b"anew" * 5000 + content[b"whole"][20_000:]
        check(opened, content)
        opened.layer.sync()


def test_an_fsync_whose_failure_somebody_else_has_seen_to(place: Path) -> None:
    """The disk has returned EIO once; both calls rely on the commit, which has kept the data."""
    path = images.make(place / "image")
    with work(path) as (disk, opened), ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        content = fill(opened)
        opened.layer.sync()
        file = opened.layer.open(find(opened.layer, b"whole"), os.O_RDWR)
        threads = [pool.submit(threading.get_native_id).result() for pool in (one, other)]
        with opened.image.together():
            file.pwrite(b"anew" * 5000, 0)
            committed = one.submit(opened.image.commit)  # waits for the end of this block
            eventually(lambda: waits_in(opened, threads[0]))
            opened.inject(FDATASYNC, 1, errno.EIO)
            synced = other.submit(file.fsync, True)  # fails, and waits for the commit
            eventually(lambda: waits_in(opened, threads[1]))
        for told in (committed, synced):
            with fails_with(errno.EIO):
                told.result()
        disk.drop()
        opened.layer.sync()
        assert not opened.image.facts().aborted
        content[b"whole"] = b"anew" * 5000 + content[b"whole"][20_000:]
        check(opened, content)
        file.close()
        disk.drop()
        opened.image.abandon()
    reopened(path, content)


def patiently(opened: Engine, call: Callable[[], object]) -> None:
    """Repeat the call after a commit, until there is space."""
    for _ in range(10_000):
        try:
            call()
            return
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
        with suppress(OSError):
            opened.image.commit()
    pytest.fail("it never goes on")


@pytest.mark.parametrize("seed", range(3))
def test_many_write_and_sync_while_it_refuses_now_and_then(place: Path, seed: int) -> None:
    """Data of successful fsyncs exists, without data that an fdatasync failed to write."""
    path = images.make(place / "image")
    with work(path) as (disk, opened):
        over = threading.Event()
        synced: dict[int, tuple[bytes, bytes]] = {}
        numbers = count()

        def write(number: int) -> None:
            chance = random.Random(seed * 10 + number)
            file = opened.layer.open(keys[number], os.O_RDWR)
            content = bytearray(100_000)
            patiently(opened, lambda: file.pwrite(bytes(content), 0))
            for turn in range(100):
                at = chance.randrange(90_000)
                data = chance.randbytes(chance.choice((10, 1000, 4096, 10_000)))
                content[at : at + len(data)] = data
                patiently(opened, partial(file.pwrite, data, at))
                with suppress(OSError):
                    file.fsync(True)
                    if turn % 4 == 0:
                        mark = next(numbers)
                        synced[mark] = b"%d" % number, bytes(content)
                        opened.mark(0, mark)
            patiently(opened, lambda: file.fsync(False))
            file.close()

        def refuse() -> None:
            chance = random.Random(seed)
            while not over.wait(0.0005):
                opened.inject(FDATASYNC, chance.randint(1, 6), errno.ENOSPC)

        def commit() -> None:
            while not over.wait(0.0002):
                with suppress(OSError):
                    opened.image.commit()

        keys = [make_file(opened.layer, b"%d" % number) for number in range(4)]
        with ThreadPoolExecutor(6) as pool:
            others = [pool.submit(refuse), pool.submit(commit)]
            try:
                list(pool.map(write, range(4)))
            finally:
                over.set()
            for other in others:
                other.result()
        assert not opened.image.facts().aborted
        opened.image.abandon()
        assert len(synced) > 20
        for mark, state in disk.states():
            if mark in synced:
                path.write_bytes(state)
                with engine.opened(path, read_only=True, debug=OTHER_BOOT) as left:
                    check(left, dict([synced[mark]]))


@pytest.mark.parametrize("shape", [MODERN, SMALL], ids=str)
def test_dropped_after_the_nth_barrier_has_failed(place: Path, shape: Shape) -> None:
    """A load with all operations: whichever barrier fails and drops all data, nothing is lost."""
    base = images.make(place / "base", shape)
    failures = 0
    for nth in range(1, 200, 5):
        path = place / "image"
        shutil.copyfile(base, path)
        with work(path) as (disk, opened):
            load = Load(opened.layer, Image(base.read_bytes()), nth, tolerate=frozenset(FULL))
            opened.inject(FDATASYNC, nth, errno.ENOSPC)
            failed = 0
            for number in range(90):
                load.step()
                try:
                    if number % 6 == 5:
                        load.commit() if number % 12 == 5 else load.sync_one()
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                if opened.image.facts().stalled:
                    disk.drop()
                    load.check()
                    opened.layer.sync()
                    failed += 1
            opened.inject(FDATASYNC, 0, 0)
            load.release()
            load.check()
        assert images.unclean(path) is None
        number = load.model.operation
        assert judge(load.model.states, Promises(number, number), Image(path.read_bytes())) is None
        failures += failed
        if not failed:
            break
    else:
        pytest.fail("it never ended")
    assert failures > 2
