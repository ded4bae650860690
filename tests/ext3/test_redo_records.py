"""Records of the redo log: torn, missing, malicious, too many."""

from __future__ import annotations

import errno
import os
import shutil
import struct
from pathlib import Path

import pytest

from cowfs.layers.base import UpperLayer
from tests.ext3 import engine, images, powercut, recovery
from tests.ext3.engine import PWRITE, Engine, make_file
from tests.ext3.images import MODERN, SMALL, Shape
from tests.ext3.load import Load
from tests.ext3.model import Promises
from tests.ext3.reader import Image
from tests.ext3.redo import RARELY, crc32c, judged, left, records_in, ring, strict, without_log
from tests.support.listing import names_of

LARGE = Shape(mib=160, journal=64)


@pytest.mark.parametrize("harm", ["torn", "a bit", "missing", "too long"])
def test_records_after_a_bad_one_do_not_count(place: Path, harm: str) -> None:
    path = images.make(place / "image")
    with engine.opened(path) as opened:
        for number in range(20):
            make_file(opened.layer, b"%d" % number)
        opened.image.abandon()
    found = list(records_in(path.read_bytes()))
    assert len(found) == 20
    at, length, _ = found[12]
    with path.open("r+b") as file:
        file.seek(at)
        data = bytearray(file.read(length))
        if harm == "torn":
            data[length // 2 :] = bytes(length - length // 2)
        elif harm == "a bit":
            data[length // 2] ^= 1
        elif harm == "missing":
            data[:] = bytes(length)
        else:
            struct.pack_into("<I", data, 4, 0x7FFFFFF8)
        file.seek(at)
        file.write(data)
    assert recovery.by_engine(path) is None
    with engine.opened(path, read_only=True) as opened:
        names = set(names_of(opened.layer, opened.layer.root))
    assert names == {b"lost+found", *(b"%d" % number for number in range(12))}


@pytest.mark.parametrize("what", ["beyond the end", "beyond the block", "beyond the record"])
def test_a_record_that_makes_no_sense_is_refused(place: Path, what: str) -> None:
    """Its checksum is correct, because someone has computed it."""
    path = left(place)
    data = bytearray(path.read_bytes())
    at, length, tid = list(records_in(data))[-1]
    nr, offset, size = {
        "beyond the end": (1 << 20, 0, 4),
        "beyond the block": (1, 4094, 4),
        "beyond the record": (1, 0, length),
    }[what]
    struct.pack_into("<HHI", data, at + 8, offset, 0x8000 | size, nr)
    session = data[ring(data)[0] + 72 :][:8]
    crc = crc32c(session + struct.pack("<II", tid, 0) + data[at + 4 : at + length])
    struct.pack_into("<I", data, at, crc)
    path.write_bytes(data)
    for read_only in (True, False):
        with (
            pytest.raises(OSError, match="redo log is damaged") as caught,
            engine.opened(path, read_only=read_only),
        ):
            pass
        assert caught.value.errno == errno.EBADMSG
        assert path.read_bytes() == data, "it was written to"


def two_transactions(load: Load, opened: Engine) -> None:
    """Do some operations, a commit, and more operations."""
    load.run(30, commit_every=RARELY, sync_every=RARELY)
    load.commit()
    load.run(30, commit_every=RARELY, sync_every=RARELY)


@pytest.mark.parametrize("harmed", [False, True])
def test_the_next_transaction_needs_all_of_the_one_before(place: Path, harmed: bool) -> None:
    """Killed before anything of a commit is in the journal, when others have gone on. If a record of the
    transaction that is being committed is lost, those of the next build upon nothing."""
    recording = powercut.record(place, MODERN, 6, two_transactions)
    disk = without_log(recording.base, recording.events)
    path = place / "image"
    path.write_bytes(disk.kill())
    found = list(records_in(path.read_bytes()))
    tids = sorted({tid for _, _, tid in found})
    assert len(tids) == 2
    first = [one for one in found if one[2] == tids[0]]
    assert len(found) > len(first) > 10
    promises = strict(disk.promises)
    if harmed:
        at, length, _ = first[-1]
        with path.open("r+b") as file:
            file.seek(at)
            file.write(bytes(length))
        promises = Promises(0, promises.begun)
    with engine.opened(path, read_only=True) as opened:
        assert opened.image.facts().redone == (len(first) - 1 if harmed else len(found))
    assert judged(path, recording.states, promises) is None


def test_a_record_that_was_never_written_is_missed(place: Path) -> None:
    """A thread without space waited for the commit; others continued; the process died before the commit."""
    path = images.make(place / "image", SMALL)
    base = path.read_bytes()
    with (place / "trace").open("w+b") as trace:
        with engine.opened(path, trace_fd=trace.fileno()) as opened:
            for number in range(3):
                make_file(opened.layer, b"before%d" % number)
            with opened.image.together():
                fill(opened.layer, 1100)
            for number in range(3):
                make_file(opened.layer, b"after%d" % number)
            opened.image.abandon()
        trace.seek(0)
        events = list(powercut.parse(trace.read()))
    path.write_bytes(without_log(base, events).kill())
    assert len({tid for _, _, tid in records_in(path.read_bytes())}) == 2
    assert recovery.by_engine(path) is None
    with engine.opened(path, read_only=True) as opened:
        assert set(names_of(opened.layer, opened.layer.root)) == {
            b"lost+found", *(b"before%d" % number for number in range(3))
        }  # fmt: skip


def test_changes_that_belong_together_are_redone_together(place: Path) -> None:
    path = images.make(place / "image")
    with engine.opened(path) as opened:
        make_file(opened.layer, b"before")
        with opened.image.together():
            make_file(opened.layer, b"one")
            make_file(opened.layer, b"two")
            shutil.copyfile(path, place / "within")
        shutil.copyfile(path, place / "after")
        opened.image.abandon()
    for name, there in (("within", {b"before"}), ("after", {b"before", b"one", b"two"})):
        assert recovery.by_engine(place / name) is None
        with engine.opened(place / name, read_only=True) as opened:
            assert set(names_of(opened.layer, opened.layer.root)) == {b"lost+found"} | there


def fill(layer: UpperLayer, count: int) -> None:
    for number in range(count):
        make_file(layer, b"%d%s" % (number, b"n" * 200))


@pytest.mark.parametrize("shape", [SMALL, MODERN, LARGE], ids=["small", "modern", "large"])
def test_a_full_log_makes_a_transaction_end(place: Path, shape: Shape) -> None:
    path = images.make(place / "image", shape)
    with engine.opened(path) as opened:
        fill(opened.layer, 1900)
        shutil.copyfile(path, place / "copy")
        names = set(names_of(opened.layer, opened.layer.root))
    assert recovery.by_engine(place / "copy") is None
    with engine.opened(place / "copy", read_only=True) as opened:
        assert set(names_of(opened.layer, opened.layer.root)) == names


def test_a_change_that_no_log_has_room_for_is_committed(place: Path) -> None:
    """Half a megabyte of changes at once, while the log has space for 255 KiB."""
    path = images.make(place / "image", SMALL)
    with engine.opened(path) as opened:
        with opened.image.together():
            fill(opened.layer, 1100)
        shutil.copyfile(path, place / "copy")
        make_file(opened.layer, b"after")
        shutil.copyfile(path, place / "later")
    for copy, count in (("copy", 1101), ("later", 1102)):
        assert recovery.by_engine(place / copy) is None
        with engine.opened(place / copy, read_only=True) as opened:
            assert len(names_of(opened.layer, opened.layer.root)) == count


def test_what_cannot_be_logged_is_not_done(place: Path) -> None:
    """If the host refuses the record of a change, it fails. Compound changes wait for the commit."""
    path = images.make(place / "image")
    with engine.opened(path) as opened:
        make_file(opened.layer, b"before")
        opened.inject(PWRITE, 1, errno.ENOSPC)
        with pytest.raises(OSError, match="No space") as caught:
            make_file(opened.layer, b"refused")
        assert caught.value.errno == errno.ENOSPC
        make_file(opened.layer, b"file")
        with opened.image.together():
            make_file(opened.layer, b"one")
            make_file(opened.layer, b"two")
            opened.inject(PWRITE, 1, errno.ENOSPC)
        shutil.copyfile(path, place / "copy")
    assert recovery.by_engine(place / "copy") is None
    with engine.opened(place / "copy", read_only=True) as opened:
        assert set(names_of(opened.layer, opened.layer.root)) == {
            b"lost+found",
            b"before",
            b"file",
            b"one",
            b"two",
        }


def test_a_full_store_keeps_what_was_said(place: Path) -> None:
    path = images.make(place / "image", SMALL)
    with engine.opened(path) as opened:
        key = make_file(opened.layer, b"filler")
        file = opened.layer.open(key, os.O_RDWR)
        file.pwrite(bytes(10 << 20), 0)
        file.close()
        opened.image.checkpoint()
        full = frozenset({errno.ENOSPC})
        load = Load(opened.layer, Image(path.read_bytes()), 7, tolerate=full, largest=900_000)
        load.spared.add(key)
        load.run(300, commit_every=RARELY, sync_every=RARELY)
        assert load.failed
        shutil.copyfile(path, place / "copy")
        promised = recovery.shown(opened.layer)
    with engine.opened(place / "copy", read_only=True) as opened:
        assert recovery.shown(opened.layer) == promised
    assert recovery.by_engine(place / "copy") is None
