"""Filling holes changes nothing else, and a power cut leaves a correct partial copy."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from cowfs.layers.base import Key
from cowfs.layers.kernel_file import KernelFile
from cowfs.layers.partial import Part, PartialFile
from tests.ext3 import engine, images, powercut, recovery
from tests.ext3.engine import Engine
from tests.ext3.images import MODERN, OLD, SMALL, Shape
from tests.ext3.load import BEGIN, SYNCED
from tests.support.listing import find

SIZE = 200_001


def holes(opened: Engine, size: int = SIZE) -> Key:
    """A file that is one hole."""
    key = engine.make_file(opened.layer, b"file")
    opened.layer.truncate(key, size)
    return key


@pytest.mark.parametrize("shape", [MODERN, SMALL, OLD], ids=str)
def test_only_holes_are_filled(place: Path, shape: Shape) -> None:
    """Written data, size and times stay, and the rest of a partly filled block is zero."""
    path = images.make(place / "image", shape)
    with engine.opened(path) as opened:
        key, unit = holes(opened), opened.layer.fill_unit
        file = opened.layer.open(key, os.O_RDWR)
        file.pwrite(b"mine", 3 * unit + 1)
        opened.layer.utimens(key, 1, 2)
        before = opened.layer.stat(key)
        file.fill(b"x" * (6 * unit - 10), unit)
        file.fill(b"y" * 8 * unit, 5 * unit)
        wanted = bytes(unit) + b"x" * 2 * unit + b"\0mine" + bytes(unit - 5)
        wanted += b"x" * (3 * unit - 10) + bytes(10) + b"y" * 6 * unit + bytes(unit)
        assert file.pread(14 * unit, 0) == wanted
        after = opened.layer.stat(key)
        for what in ("st_size", "st_mtime_ns", "st_ctime_ns", "st_atime_ns", "st_mode"):
            assert getattr(after, what) == getattr(before, what), what
        last = SIZE - SIZE % unit
        file.fill(b"z" * 5 * unit, last)
        assert opened.layer.stat(key).st_size == SIZE, "nothing is behind the end"
        assert file.pread(5 * unit, last) == b"z" * (SIZE % unit)
        with pytest.raises(OSError) as caught:
            file.fill(b"x", 20 * unit + 1)
        assert caught.value.errno == errno.EINVAL
        file.close()
    images.unclean(path)


def test_without_room_a_hole_stays_a_hole(place: Path) -> None:
    """ENOSPC, after whole blocks were filled."""
    path = images.make(place / "image", SMALL)
    with engine.opened(path) as opened:
        key = holes(opened, 1 << 30)
        file, unit = opened.layer.open(key, os.O_RDWR), opened.layer.fill_unit
        with pytest.raises(OSError) as caught:
            for number in range(1 << 10):
                file.fill(b"x" * (1 << 20), number << 20)
        assert caught.value.errno == errno.ENOSPC
        for start, stop in file.segments(1 << 30):
            assert start % unit == 0 == stop % unit
            assert file.pread(stop - start, start) == b"x" * (stop - start)
        file.close()
    assert images.unclean(path) is None


@pytest.mark.parametrize(
    ("shape", "seed"),
    [(MODERN, 1), (SMALL, 2), (OLD, 3), pytest.param(SMALL, 9, marks=pytest.mark.nightly)],
    ids=str,
)
def test_power_cuts_while_a_file_is_copied_up(place: Path, shape: Shape, seed: int) -> None:
    """Synced data exists; the rest is old or as written; no hole is read as zeros."""
    chance = random.Random(seed)
    states = [chance.randbytes(SIZE)]
    (place / "lower").write_bytes(states[0])
    path = images.make(place / "image", shape)
    base = path.read_bytes()
    with (place / "trace").open("w+b") as trace:
        with engine.opened(path, trace_fd=trace.fileno()) as opened:
            key = holes(opened)
            opened.image.commit()
            file = partial(opened, key, place / "lower")
            steps = file.copy_steps()
            opened.mark(BEGIN, 0)
            for _ in range(150):
                what = chance.random()
                if what < 0.15:
                    count = len(states) - 1
                    file.fsync(chance.random() < 0.5)
                    opened.mark(SYNCED, count)
                elif what < 0.25:
                    next(steps, None)
                else:
                    opened.mark(BEGIN, len(states))
                    data = chance.randbytes(chance.choice([1, 500, 4096, 9000]))
                    offset = chance.randrange(SIZE - len(data))
                    file.pwrite(data, offset)
                    new = bytearray(states[-1])
                    new[offset : offset + len(data)] = data
                    states.append(bytes(new))
            assert file.pread(SIZE, 0) == states[-1]
            file.close()
        trace.seek(0)
        events = list(powercut.parse(trace.read()))
    begun = next(n for n, event in enumerate(events) if event.kind == 3 and event.number >> 56 == BEGIN)
    disk, synced = powercut.Disk(bytearray(base)), 0
    cuts = sorted({begun + cut for cut in powercut.choose_cuts(events[begun:], 60, seed)})
    for number, event in enumerate(events):
        if cuts and number == cuts[0]:
            del cuts[0]
            (place / "cut").write_bytes(disk.cut(chance))
            judge(place / "cut", place / "lower", states[synced : disk.promises.begun + 1])
        if event.kind == 3 and event.number >> 56 == SYNCED:
            synced = event.number & 0xFFFFFF
        else:
            disk.apply(event, [])


def partial(opened: Engine, key: Key, lower: Path) -> PartialFile:
    """Create the file with its lower."""
    part = Part(SIZE, opened.layer.fill_unit)
    source = KernelFile(os.open(lower, os.O_RDONLY))
    return PartialFile(part, opened.layer.open(key, os.O_RDWR), source)


def judge(path: Path, lower: Path, states: list[bytes]) -> None:
    """After recovery, each byte is one of those it had."""
    assert recovery.by_engine(path, recovery.OTHER_BOOT) is None
    assert images.unclean(path) is None
    with engine.opened(path) as opened:
        file = partial(opened, find(opened.layer, b"file"), lower)
        found = file.pread(SIZE, 0)
        file.close()
    assert len(found) == SIZE
    for at in range(0, SIZE, 512):
        here = found[at : at + 512]
        if any(state[at : at + 512] == here for state in states):
            continue
        for byte, value in enumerate(here, at):
            assert value in {state[byte] for state in states}, f"byte {byte}"
