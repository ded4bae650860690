"""If only the process dies, the redo log restores everything acknowledged."""

from __future__ import annotations

import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.ext3 import engine, images, powercut, recovery
from tests.ext3.engine import Engine, make_file
from tests.ext3.images import MODERN, OLD, SMALL, Shape
from tests.ext3.load import Load
from tests.ext3.model import Promises
from tests.ext3.powercut import Disk, Recording, choose_cuts, parse
from tests.ext3.redo import RARELY, judged, left, records_in, strict
from tests.support.listing import names_of
from tests.support.system import needs_root, run


def uncommitted(operations: int) -> Callable[[Load, Engine], None]:
    """Work without sync: transactions end because of the size of the journal."""

    def work(load: Load, opened: Engine) -> None:
        load.run(operations, commit_every=RARELY, sync_every=RARELY)

    return work


def moments(recording: Recording, count: int, seed: int) -> Iterator[tuple[int, Disk]]:
    """Yield this number of moments of a recording, with the state of the disk."""
    disk, position = Disk(bytearray(recording.base)), 0
    for where in choose_cuts(recording.events, count, seed):
        while position < where:
            disk.apply(recording.events[position], recording.syncs)
            position += 1
        yield where, disk


def killed(recording: Recording, count: int, seed: int, place: Path, again: int = 2) -> list[str]:
    """Kill the process this many times; interrupt each recovery *again* times by kills and power cuts."""
    chance, wrong = random.Random(seed), []
    for where, disk in moments(recording, count, seed):
        before, path = bytes(disk.kill()), place / "killed"
        path.write_bytes(before)
        cut_promises, promises = Promises(disk.promises.committed, disk.promises.begun), strict(disk.promises)
        with (place / "trace").open("w+b") as trace:
            found = judged(path, recording.states, promises, trace_fd=trace.fileno())
            trace.seek(0)
            events = list(parse(trace.read()))
        if found:
            wrong.append(f"killed at {where}: {found}")
            continue
        for stop in choose_cuts(events, again, seed + where):
            second = Disk(bytearray(before))
            for event in events[:stop]:
                second.apply(event, [])
            path.write_bytes(second.kill())
            found = judged(path, recording.states, promises)
            if found is None:
                path.write_bytes(second.cut(chance))
                found = judged(path, recording.states, cut_promises, recovery.OTHER_BOOT)
            if found:
                wrong.append(f"killed at {where}, and at {stop} of {len(events)} of the recovery: {found}")
    return wrong


@pytest.mark.parametrize(("shape", "seed"), [(MODERN, 1), (SMALL, 2), (OLD, 3)], ids=str)
def test_killed_after_any_write(place: Path, shape: Shape, seed: int) -> None:
    """Commits and checkpoints happen as needed; the recovery is interrupted too."""
    recording = powercut.record(place, shape, seed, powercut.mixed(400))
    assert killed(recording, 16, seed, place) == []


@pytest.mark.parametrize("shape", [MODERN, SMALL], ids=str)
def test_killed_without_any_commit(place: Path, shape: Shape) -> None:
    recording = powercut.record(place, shape, 4, uncommitted(400))
    assert killed(recording, 12, 4, place) == []


def test_killed_while_others_commit(place: Path) -> None:
    """Two transactions at a time: one commits, the other has begun."""
    recording = powercut.record(place, SMALL, 5, powercut.mixed(200), stir=True, cache_bytes=1 << 16)
    assert killed(recording, 16, 5, place) == []


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("shape", [MODERN, SMALL, OLD], ids=str)
@pytest.mark.parametrize("seed", range(10, 14))
def test_killed_after_many_writes(place: Path, shape: Shape, seed: int) -> None:
    work = uncommitted(2000) if seed % 3 == 0 else powercut.mixed(2000)
    recording = powercut.record(place, shape, seed, work, stir=seed % 3 == 1)
    assert killed(recording, 60, seed, place, again=4) == []


def test_a_cut_of_the_power_leaves_no_redo_log(place: Path) -> None:
    """Records from before the last boot are ignored, because data they depend on may be lost."""
    path = left(place)
    with engine.opened(path, read_only=True, debug=recovery.OTHER_BOOT) as opened:
        assert opened.image.facts().redone == 0
        assert set(names_of(opened.layer, opened.layer.root)) == {b"lost+found", b"committed"}
    with engine.opened(path, debug=recovery.OTHER_BOOT) as opened:
        assert set(names_of(opened.layer, opened.layer.root)) == {b"lost+found", b"committed"}
    assert images.unclean(path) is None


# --- other programs have used the image


def by_e2fsck(path: Path) -> None:
    assert images.recover(path) is None


def by_journal_alone(path: Path) -> None:
    run("e2fsck", "-p", "-E", "journal_only", path, check=False)


def by_kernel(path: Path) -> None:
    assert images.recover_by_kernel(path, path.with_name("mnt")) is None


def by_kernel_that_crashed(path: Path) -> None:
    """It has recovered and mounted the image and written to its own journal when the machine dies."""
    with images.kernel_mounted(path, path.with_name("mnt")) as top:
        (top / "of the kernel").write_bytes(b"x")
        run("sync", "-f", top)
        crashed = path.read_bytes()
    path.write_bytes(crashed)


def by_ourselves(path: Path) -> None:
    with engine.opened(path, debug=recovery.OTHER_BOOT) as opened:
        opened.image.abandon()


@needs_root
@pytest.mark.parametrize(
    "recovered", [by_e2fsck, by_journal_alone, by_kernel, by_kernel_that_crashed, by_ourselves]
)
def test_who_recovers_otherwise_ends_the_redo_log(place: Path, recovered: Callable[[Path], None]) -> None:
    """The filesystem was used after the last commit: the rest of the redo log would damage it."""
    path = left(place)
    recovered(path)
    with engine.opened(path, read_only=True) as opened:
        assert b"not committed" not in names_of(opened.layer, opened.layer.root)
        assert b"committed" in names_of(opened.layer, opened.layer.root)
    assert recovery.by_engine(path) is None


def test_an_image_may_be_copied_after_the_death(place: Path) -> None:
    path = left(place)
    shutil.copyfile(path, place / "copy")
    for image in (path, place / "copy"):
        assert recovery.by_engine(image) is None
        with engine.opened(image, read_only=True) as opened:
            assert b"not committed" in names_of(opened.layer, opened.layer.root)


def clear_flag(path: Path) -> None:
    """Clear needs_recovery, like copying a backup of the superblock."""
    with path.open("r+b") as file:
        file.seek(1024 + 96)
        (flags,) = struct.unpack("<I", file.read(4))
        file.seek(1024 + 96)
        file.write(struct.pack("<I", flags & ~4))


def test_the_journal_is_recovered_without_the_flag(place: Path) -> None:
    path = left(place)
    clear_flag(path)
    assert recovery.by_engine(path) is None
    with engine.opened(path, read_only=True) as opened:
        assert {b"committed", b"not committed"} <= set(names_of(opened.layer, opened.layer.root))


def test_a_journal_that_somebody_did_without_is_old(place: Path) -> None:
    """The flag was cleared and the filesystem mounted: its content is newer than the journal."""
    path = left(place)
    clear_flag(path)
    with path.open("r+b") as file:  # as if mounted with the ext2 driver
        file.seek(1024 + 44)
        (mounted,) = struct.unpack("<I", file.read(4))
        file.seek(1024 + 44)
        file.write(struct.pack("<I", mounted + 100))
    with engine.opened(path) as opened:
        assert names_of(opened.layer, opened.layer.root) == [b"lost+found"]
    assert images.unclean(path) is None


# --- where the image continues


def test_after_growing_the_log_goes_on(place: Path) -> None:
    path = images.make(place / "image", MODERN)
    with engine.opened(path) as opened:
        make_file(opened.layer, b"before")
        opened.image.suspend()
        os.truncate(path, 32 << 20)
        run("resize2fs", "-f", path)
        opened.image.resume()
        make_file(opened.layer, b"after")
        opened.image.abandon()
    assert recovery.by_engine(path) is None
    with engine.opened(path, read_only=True) as opened:
        assert {b"before", b"after"} <= set(names_of(opened.layer, opened.layer.root))


def test_what_came_from_memory_has_a_log_on_the_disk(place: Path) -> None:
    """A file without a name needs no recovery; the file that the image moves to does."""
    path = images.make(place / "image", MODERN)
    hidden = place / "hidden"
    shutil.copyfile(path, hidden)
    with engine.opened(hidden) as opened, path.open("r+b") as target, hidden.open("rb") as source:
        hidden.unlink()
        opened.image.checkpoint()
        opened.image.suspend()
        opened.image.resume()
        make_file(opened.layer, b"in memory")
        opened.image.checkpoint()
        data = source.read()
        assert list(records_in(data)) == []
        target.write(data)
        target.flush()
        opened.image.switch(target.fileno())
        make_file(opened.layer, b"on disk")
        opened.image.abandon()
    with engine.opened(path, read_only=True) as opened:
        assert opened.image.facts().redone == 1
        assert {b"in memory", b"on disk"} <= set(names_of(opened.layer, opened.layer.root))
    assert recovery.by_engine(path) is None
