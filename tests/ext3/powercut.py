"""Simulate power cuts: record a load with every write and barrier, and cut it anywhere.

What was written before the last completed barrier was begun is on the disk. Of each page written since,
the disk may hold what it was before, or what it was after any of the writes to it (the page cache writes
pages when it likes, and a disk writes 4096 bytes whole): each page for itself, in any order.
"""

from __future__ import annotations

import errno
import os
import random
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from cowfs.layers.directory import open_directory
from tests.ext3 import engine, images, recovery
from tests.ext3.engine import Engine
from tests.ext3.images import Shape
from tests.ext3.load import BEGIN, COMMITTED, SYNCED, Load
from tests.ext3.model import Model, Promises, State, Synced, judge
from tests.ext3.operations import COPYING
from tests.ext3.reader import Image

PAGE = 4096
_RECORD = struct.Struct("<QQQ")
_WRITE, _BARRIER, _MARK, _BEGUN = 1, 2, 3, 4
_PHASE = 9
"""Marks for the phases of a load: opening (0), work (1), a checkpoint (2), closing (3)."""
STIRRED = 3
"""With threads that commit, the load waits for a commit after this number of operations."""


class Event(NamedTuple):
    """A record of the trace."""

    kind: int
    number: int
    """The offset of a write."""
    data: bytes


@dataclass
class Recording:
    """A completed load, with the trace of its disk."""

    base: bytes
    events: list[Event]
    states: list[State]
    syncs: list[Synced]

    @property
    def barriers(self) -> int:
        return sum(event.kind == _BARRIER for event in self.events)


def mixed(operations: int) -> Callable[[Load, Engine], None]:
    """Do this number of operations of all kinds, with two checkpoints."""

    def work(load: Load, opened: Engine) -> None:
        for part in range(4):
            opened.mark(_PHASE, 1)
            load.run(operations // 4)
            if part % 2:
                opened.mark(_PHASE, 2)
                opened.image.checkpoint()

    return work


def record(
    place: Path,
    shape: Shape,
    seed: int,
    work: Callable[[Load, Engine], None],
    debug: int = 0,
    *,
    stir: bool = False,
    cache_bytes: int = 64 << 20,
) -> Recording:
    """Run a load on a new image, and close the image at the end.

    *debug* leaves out rules of the journal, see X3_NO_HOLD and the others in engine.h. With *stir* other
    threads commit and sync all the time, and the load gives them the time to: see STIRRED.
    """
    path = images.make(place / "image", shape)
    base = path.read_bytes()
    with (place / "trace").open("w+b") as trace:
        with engine.opened(path, trace_fd=trace.fileno(), debug=debug, cache_bytes=cache_bytes) as opened:
            turns = _Turns()
            settled = turns.give if stir else lambda model, touched: None
            load = Load(opened.layer, Image(base), seed, opened.mark, kinds=COPYING, settled=settled)
            with _stirring(opened, load, turns) if stir else nullcontext():
                work(load, opened)
            if not debug:
                load.check()
            opened.mark(_PHASE, 3)
        trace.seek(0)
        events = list(parse(trace.read()))
    number = load.model.operation
    if not debug:  # without a debug option even this may fail
        wrong = images.unclean(path) or judge(
            load.model.states, Promises(number, number), Image(path.read_bytes())
        )
        assert wrong is None, f"without any cut: {wrong}"
    return Recording(base, events, load.model.states, load.syncs)


class _Turns:
    """The commits of another thread, for which the load sometimes waits."""

    def __init__(self) -> None:
        self._count = 0
        self._over = False
        self._changed = threading.Condition()

    def taken(self) -> None:
        """Count a commit."""
        with self._changed:
            self._count += 1
            self._changed.notify_all()

    def end(self) -> None:
        """Wake all waiting threads: there are no more commits."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def give(self, model: Model, touched: set[int]) -> None:
        """After an operation, wait for a later commit if it is time."""
        del touched
        if model.operation % STIRRED == 0:
            with self._changed:
                wanted = self._count + 2  # the next commit may have begun already
                self._changed.wait_for(lambda: self._over or self._count >= wanted)


@contextmanager
def _stirring(opened: Engine, load: Load, turns: _Turns) -> Iterator[None]:
    """Commit in one thread, and sync inodes in another, as often as possible."""
    over = threading.Event()

    def commit() -> None:
        try:
            while not over.is_set():
                number = load.model.operation
                opened.image.commit()
                opened.mark(COMMITTED, number)
                turns.taken()
        finally:
            turns.end()

    def sync() -> None:
        chance = random.Random(1)
        while not over.is_set():
            number = load.model.operation
            ino = chance.choice(list(load.model.states[number].facts))
            datasync = chance.random() < 0.5
            try:
                opened.image.fsync(ino, datasync)
            except OSError as error:
                assert error.errno == errno.ESTALE, error  # it was removed meanwhile
                continue
            load.promise(Synced(number, ino, datasync))

    with ThreadPoolExecutor(2) as pool:
        threads = [pool.submit(commit), pool.submit(sync)]
        try:
            yield
        finally:
            over.set()
        for thread in threads:
            thread.result()


def parse(trace: bytes) -> Iterator[Event]:
    """Yield the records of a trace."""
    at = 0
    while at < len(trace):
        kind, number, length = _RECORD.unpack_from(trace, at)
        at += _RECORD.size + length
        yield Event(kind, number, trace[at - length : at])


def choose_cuts(events: list[Event], count: int, seed: int) -> list[int]:
    """Yield places to cut: anywhere, before the end of barriers, and in opening, checkpoints and closing."""
    chosen = random.Random(seed)
    phases: dict[int, list[int]] = {0: [], 1: [], 2: [], 3: []}
    before_barriers = []
    phase = 0
    for number, event in enumerate(events):
        if event.kind == _MARK and event.number >> 56 == _PHASE:
            phase = event.number & 0xFF
        phases[phase].append(number)
        if event.kind == _BARRIER:
            before_barriers.append(number)
    sources = [before_barriers, before_barriers, range(len(events)), *phases.values()]
    sources = [source for source in sources if source]
    return sorted(chosen.choice(sources[index % len(sources)]) for index in range(count))


@dataclass
class Disk:
    """What is on disk for certain, and what was written since."""

    durable: bytearray
    written: list[Event] = field(default_factory=list)
    begun: dict[int, int] = field(default_factory=dict)
    """The number of writes that each pending barrier covers."""
    promises: Promises = field(default_factory=Promises)

    def apply(self, event: Event, syncs: list[Synced]) -> None:
        if event.kind == _WRITE:
            self.written.append(event)
        elif event.kind == _BEGUN:
            self.begun[event.number] = len(self.written)
        elif event.kind == _BARRIER:
            count = self.begun.pop(event.number)
            for write in self.written[:count]:
                self.durable[write.number : write.number + len(write.data)] = write.data
            del self.written[:count]
            self.begun = {number: max(0, covers - count) for number, covers in self.begun.items()}
        elif event.kind == _MARK:
            kind, number = event.number >> 56, event.number & (1 << 56) - 1
            if kind == BEGIN:
                self.promises.begun = number
            elif kind == COMMITTED:
                self.promises.committed = max(number, self.promises.committed)
            elif kind == SYNCED:
                self.promises.synced.append(syncs[number])

    def kill(self) -> bytearray:
        """Return the page cache if the process dies now."""
        cache = bytearray(self.durable)
        for write in self.written:
            cache[write.number : write.number + len(write.data)] = write.data
        return cache

    def cut(self, chance: random.Random) -> bytearray:
        """Return what may be on disk after a power cut now."""
        disk = bytearray(self.durable)
        pieces: dict[int, list[tuple[int, bytes]]] = {}
        for write in self.written:
            at = 0
            while at < len(write.data):
                begin = write.number + at
                length = min(PAGE - begin % PAGE, len(write.data) - at)
                pieces.setdefault(begin // PAGE, []).append((begin, write.data[at : at + length]))
                at += length
        likely = chance.choice((0.0, 0.1, 0.5, 0.9, 1.0, 1.0))
        spared = chance.choice(list(pieces)) if pieces and likely in (0.0, 1.0) else -1
        for page, writes in pieces.items():
            there = (chance.random() < likely) != (page == spared)
            count = chance.choice((len(writes), chance.randint(1, len(writes)))) if there else 0
            for begin, data in writes[:count]:
                disk[begin : begin + len(data)] = data
        return disk


@dataclass
class Outcome:
    """A cut: its place, and the errors after recovery."""

    cut: int
    wrong: str | None


def cut(recording: Recording, count: int, seed: int, place: Path) -> list[Outcome]:
    """Cut the power this number of times, recover, and check the image."""
    cuts = iter(_cut_images(recording, count, seed))
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        while batch := list(islice(cuts, 8)):  # limits the images in memory
            paths = [place / f"cut{where}-{number}" for number, (where, _, _) in enumerate(batch)]
            made = list(pool.map(lambda *one: _recovered(recording, *one), paths, batch))
            # Not in threads: between fork and exec, a new program has the open files of this process,
            # which keeps mounts busy.
            for path, outcome in zip(paths, made, strict=True):
                if outcome.wrong is None and _is_for_kernel(outcome.cut):
                    outcome.wrong = _said_by(partial(seen_by_kernel, path, path.with_suffix(".mnt")))
                path.unlink()
            outcomes += made
    return outcomes


def _cut_images(recording: Recording, count: int, seed: int) -> Iterator[tuple[int, bytearray, Promises]]:
    chance = random.Random(seed)
    disk, position = Disk(bytearray(recording.base)), 0
    for where in choose_cuts(recording.events, count, seed):
        while position < where:
            disk.apply(recording.events[position], recording.syncs)
            position += 1
        promises = disk.promises
        yield where, disk.cut(chance), Promises(promises.committed, promises.begun, list(promises.synced))


def seen_by_kernel(path: Path, at: Path) -> None:
    """Fail unless the kernel shows what the bytes of a sound image say."""
    image = Image(path.read_bytes())
    with images.kernel_mounted(path, at, "noatime,ro"):
        layer = open_directory(str(at))
        try:
            Load(layer, image, 0).check()
        finally:
            layer.close()


def _recovered(recording: Recording, path: Path, made: tuple[int, bytearray, Promises]) -> Outcome:
    """Make the image of a cut and recover it; return the errors."""
    where, disk, promises = made
    path.write_bytes(disk)

    def wrong() -> str | None:
        if _is_for_kernel(where):
            wrong = images.recover_by_kernel(path, path.with_suffix(".mnt"))
        elif where % 6 == 1:
            wrong = images.recover(path)
        else:
            wrong = recovery.by_engine(path, recovery.OTHER_BOOT)
        return wrong or judge(recording.states, promises, Image(path.read_bytes()))

    return Outcome(where, _said_by(wrong))


def _is_for_kernel(where: int) -> bool:
    return os.geteuid() == 0 and where % 6 == 0


def _said_by(check: Callable[[], str | None]) -> str | None:
    """Return the errors that a check returns or raises."""
    try:
        return check()
    except (AssertionError, LookupError, OSError, struct.error) as error:
        return f"unreadable: {error!r}"
