"""If the disk under an image is full, nothing is lost, and changes fail until there is space again."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from tests.ext3 import engine, images
from tests.ext3.engine import FALLOCATE, FDATASYNC, PWRITE, Engine
from tests.ext3.images import MODERN, OLD, SMALL, Shape
from tests.ext3.load import Load
from tests.ext3.model import Promises, judge
from tests.ext3.reader import Image
from tests.ext3.test_full import fails_with, must_refuse, write
from tests.support.hosts import fill, free, host, sparse_copy
from tests.support.listing import find
from tests.support.system import needs_root, run

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def struggle(load: Load, opened: Engine, steps: int) -> int:
    """Work while the disk is full; return how often a write to it failed."""
    refusals = 0
    for number in range(steps):
        load.step()
        if number % 5 == 4:
            try:
                load.commit() if number % 10 == 4 else load.sync_one()
            except OSError as error:
                assert error.errno in FULL | {errno.EIO}, error
                refusals += 1
    return refusals


@pytest.mark.parametrize(
    ("kind", "code", "stride"),
    [
        (PWRITE, errno.ENOSPC, 5),
        (PWRITE, errno.EDQUOT, 31),
        (PWRITE, errno.EFBIG, 31),
        (FALLOCATE, errno.ENOSPC, 3),
        (FDATASYNC, errno.ENOSPC, 1),
        (FDATASYNC, errno.EIO, 7),
    ],
    ids=["pwrite", "quota", "limit", "fallocate", "fdatasync", "late"],
)
def test_from_the_nth_call_on_there_is_no_room(place: Path, kind: int, code: int, stride: int) -> None:
    """Failed operations have no effect; others are visible, and are on disk once there is space."""
    base = images.make(place / "base", SMALL)
    with engine.opened(base) as opened:
        write(opened.layer, b"kept", 300_000)
    calm = stalled = 0
    for nth in range(1, 3000, stride):
        path = place / "image"
        shutil.copyfile(base, path)
        with engine.opened(path) as opened:
            load = Load(opened.layer, Image(base.read_bytes()), 7, tolerate=frozenset({*FULL, code}))
            load.spared.add(find(opened.layer, b"kept"))
            opened.inject(kind, nth, code, sticky=True)
            refusals = struggle(load, opened, 60)
            facts = opened.image.facts()
            assert not facts.aborted
            load.check()
            if facts.stalled:
                stalled += 1
                assert facts.stalled == code and refusals
                must_refuse(opened, code)
                with fails_with(code):
                    opened.layer.sync()
                load.check()
                assert opened.image.facts().unsaved
                opened.inject(kind, 0, 0)
                opened.layer.sync()
                assert not opened.image.facts().stalled and not opened.image.facts().unsaved
            opened.inject(kind, 0, 0)
            load.run(30)
            load.release()
            load.check()
            calm = 0 if refusals or load.failed else calm + 1
        assert images.unclean(path) is None
        number = load.model.operation
        assert judge(load.model.states, Promises(number, number), Image(path.read_bytes())) is None
        if calm == 3:
            break
    else:
        pytest.fail("it never ended")
    assert nth > 5
    assert stalled or kind == FALLOCATE


def test_an_operation_tries_again_by_itself(place: Path) -> None:
    """No commit is needed: the next change after at least a second notices the space."""
    path = images.make(place / "image", SMALL)
    with engine.opened(path) as opened:
        write(opened.layer, b"kept", 3000)
        opened.layer.sync()
        opened.layer.mkdir(opened.layer.root, b"one", 0o700, 0, 0)
        opened.inject(PWRITE, 1, errno.ENOSPC, sticky=True)
        with fails_with(errno.ENOSPC):
            opened.layer.sync()
        must_refuse(opened, errno.ENOSPC)
        with fails_with(errno.ENOSPC):
            opened.layer.sync()
        opened.inject(PWRITE, 0, 0)
        for _ in range(1 << 20):
            try:
                opened.layer.mkdir(opened.layer.root, b"two", 0o700, 0, 0)
                break
            except OSError as error:
                assert error.errno == errno.ENOSPC
        assert not opened.image.facts().stalled
    assert Image(path.read_bytes()).facts(2).names.keys() >= {b"one", b"two"}  # type: ignore[union-attr]


def test_a_large_truncation_is_completed(place: Path) -> None:
    """It takes several transactions. The disk is full after the first; no later write may show old data."""
    path = images.make(place / "image", Shape(1024, 128, mib=64, journal=1))
    with engine.opened(path) as opened:
        layer = opened.layer
        write(layer, b"kept", 3000)
        write(layer, b"large", 40 << 20)
        layer.sync()
        key = find(layer, b"large")
        opened.inject(PWRITE, 4, errno.ENOSPC, sticky=True)  # the end of the file, and twice in the redo log
        layer.truncate(key, 10_000)
        assert layer.stat(key).st_size == 10_000
        with fails_with(errno.ENOSPC):
            layer.sync()
        opened.inject(PWRITE, 0, 0)
        layer.sync()
        layer.truncate(key, 1 << 20)
        file = layer.open(key, os.O_RDWR)
        file.pwrite(b"end", 1 << 20)
        assert file.pread(2 << 20, 10_000) == bytes((1 << 20) - 10_000) + b"end"
        file.close()
    assert images.unclean(path) is None


@needs_root
@pytest.mark.parametrize("kind", ["tmpfs", "ext3", "ext4"])
@pytest.mark.parametrize("shape", [MODERN, OLD], ids=str)
def test_a_sparse_image_on_a_disk_that_is_full(place: Path, kind: str, shape: Shape) -> None:
    """Failed operations have no effect, and no commit fails, because its space is reserved."""
    whole = images.make(place / "whole", shape)
    with host(kind, place / "host", 64) as at:
        path = sparse_copy(whole, at / "image")
        with engine.opened(path) as opened:
            facts = opened.image.facts()
            assert facts.missing > 1 << 20 and facts.disk_free == free(at)
            write(opened.layer, b"kept", 3000)
            load = Load(
                opened.layer, Image(path.read_bytes()), 11, tolerate=frozenset({errno.ENOSPC}), files=400
            )
            opened.layer.sync()
            load.model = type(load.model)(Image(image_of(opened, path)))
            load.spared.add(find(opened.layer, b"kept"))
            load.run(30)
            ballast = fill(at)
            assert free(at) < 8192
            for _ in range(40):
                load.run(15)  # every commit and fsync must succeed
                load.check()
            assert load.failed > 20
            assert not opened.image.facts().stalled
            failed = load.failed
            ballast.unlink()
            load.run(60)
            assert load.failed == failed, "there is room again"
            load.release()
        assert images.unclean(path) is None
        number = load.model.operation
        assert judge(load.model.states, Promises(number, number), Image(path.read_bytes())) is None


def image_of(opened: Engine, path: Path) -> bytes:
    """Return the content of the image, all in place."""
    opened.image.checkpoint()
    return path.read_bytes()


@needs_root
@pytest.mark.parametrize("kind", ["tmpfs", "ext3", "ext4"])
def test_an_image_without_a_journal_to_write_to_is_refused_and_left_alone(place: Path, kind: str) -> None:
    whole = images.make(place / "whole", MODERN)
    with host(kind, place / "host", 64) as at:
        path = sparse_copy(whole, at / "image")
        ballast = fill(at)
        before = path.read_bytes()
        with fails_with(errno.ENOSPC), engine.opened(path):
            pass
        assert path.read_bytes() == before
        with engine.opened(path, read_only=True) as opened:
            assert opened.layer.names(opened.layer.root) == [b"lost+found"]
        ballast.unlink()
        with engine.opened(path) as opened:
            write(opened.layer, b"file", 100_000)
        assert run("e2fsck", "-fn", path).returncode == 0


def test_a_truncation_that_is_refused_keeps_the_data(place: Path) -> None:
    """Whichever write fails, the part of the last block to cut off still exists."""
    path = images.make(place / "image", SMALL)
    old = bytes(range(1, 251)) * 20
    outcomes = set()
    with engine.opened(path) as opened:
        layer = opened.layer
        key, file = layer.create(layer.root, b"file", 0o600, 0, 0)
        for nth in range(1, 6):
            file.pwrite(old, 0)
            layer.sync()
            opened.inject(PWRITE, nth, errno.ENOSPC, sticky=True)
            try:
                layer.truncate(key, len(old) - 1)
                wanted = old[:-1]
            except OSError as error:
                assert error.errno == errno.ENOSPC
                wanted = old
            assert file.pread(len(old), 0) == wanted
            opened.inject(PWRITE, 0, 0)
            layer.truncate(key, len(old) + 1)
            assert file.pread(len(old) + 1, 0) == wanted.ljust(len(old) + 1, b"\0")
            outcomes.add(wanted)
        file.close()
    assert len(outcomes) == 2
    assert images.unclean(path) is None


def test_a_write_that_is_refused_has_written_a_beginning_or_nothing(place: Path) -> None:
    """First a hole, then an allocated block, which stays unchanged unless the hole is filled."""
    path = images.make(place / "image", SMALL)
    outcomes = set()
    with engine.opened(path) as opened:
        layer, size = opened.layer, Image(path.read_bytes()).block_size
        for nth in range(1, 9):
            _, file = layer.create(layer.root, b"%d" % nth, 0o600, 0, 0)
            file.pwrite(b"o" * size, size)
            old, new = bytes(size) + b"o" * size, b"n" * 2 * size
            layer.sync()
            opened.inject(PWRITE, nth, errno.ENOSPC, sticky=True)
            with suppress(OSError):
                file.pwrite(new, 0)
            done = file.pread(3 * size, 0)
            opened.inject(PWRITE, 0, 0)
            layer.sync()
            assert done == file.pread(3 * size, 0)
            assert done in (old, new[:size] + old[size:], new)
            outcomes.add(done)
            file.close()
    assert len(outcomes) > 1
    assert images.unclean(path) is None
