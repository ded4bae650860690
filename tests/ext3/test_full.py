"""Full and failing disks: failed operations have no effect, acknowledged ones remain."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cowfs.layers.base import UpperLayer
from tests.ext3 import engine, images
from tests.ext3.engine import FDATASYNC, PREAD, PWRITE, Engine
from tests.ext3.images import MODERN, OLD, SMALL, Shape
from tests.ext3.load import BEGIN, COMMITTED, SYNCED, Load
from tests.ext3.model import Promises, judge, perhaps_written
from tests.ext3.reader import Image
from tests.support.listing import find, names_of


def frozen(opened: Engine, path: Path) -> Path:
    """Copy the image as if the machine stopped now, and recover the copy."""
    copy = path.with_name("copy")
    shutil.copyfile(path, copy)
    wrong = images.recover(copy)
    assert wrong is None, wrong
    return copy


def write(layer: UpperLayer, name: bytes, size: int) -> int:
    """Add a file of zeros until the disk is full; return its size."""
    key, file = layer.create(layer.root, name, 0o600, 0, 0)
    try:
        for offset in range(0, size, 1 << 16):
            file.pwrite(bytes(min(1 << 16, size - offset)), offset)
    except OSError as error:
        assert error.errno == errno.ENOSPC
    finally:
        file.close()
    return layer.stat(key).st_size


def fill(path: Path, leave: int) -> None:
    """Leave this number of blocks free in the image."""
    with engine.opened(path) as opened:
        facts = opened.layer.statfs()
        size = (facts.bfree - leave) * facts.bsize
        assert write(opened.layer, b"ballast", size - size // (facts.bsize // 4)) > size // 2


@pytest.mark.parametrize(
    ("shape", "leave"),
    [(MODERN, 60), (SMALL, 200), pytest.param(OLD, 100, marks=pytest.mark.nightly)],
    ids=str,
)
def test_a_load_on_a_disk_that_is_nearly_full(place: Path, shape: Shape, leave: int) -> None:
    """After ENOSPC an operation has done nothing; a write has not done everything."""
    path = images.make(place / "image", shape)
    fill(path, leave)
    with engine.opened(path) as opened:
        load = Load(
            opened.layer,
            Image(path.read_bytes()),
            5,
            tolerate=frozenset({errno.ENOSPC}),
            largest=30_000,
            files=300,
        )
        load.spared.add(find(opened.layer, b"ballast"))
        checked = 0
        for _ in range(600):
            failed = load.failed
            load.step()
            if load.failed == failed:
                continue
            load.check()
            checked += 1
            if checked % 5 == 0:
                load.commit()
                number = load.model.operation
                found = Image(frozen(opened, path).read_bytes())
                assert judge(load.model.states, Promises(number, number), found) is None
        assert load.failed > 20
        load.release()
        load.check()
    assert images.unclean(path) is None
    number = load.model.operation
    assert judge(load.model.states, Promises(number, number), Image(path.read_bytes())) is None


@pytest.mark.parametrize("shape", [MODERN, SMALL], ids=str)
def test_removing_makes_room_at_once(place: Path, shape: Shape) -> None:
    path = images.make(place / "image", shape)
    with engine.opened(path) as opened:
        layer = opened.layer
        wanted = 3 << 20
        assert write(layer, b"first", wanted) == wanted
        assert write(layer, b"second", 100 << 20) > wanted
        frozen(opened, path)
        for turn in range(5):
            free = layer.statfs().bfree
            layer.unlink(layer.root, b"first", None)
            assert (layer.statfs().bfree - free) * shape.block_size >= wanted
            assert write(layer, b"first", wanted) == wanted, f"turn {turn}"
        key = find(layer, b"second")
        size = layer.stat(key).st_size
        layer.truncate(key, size - (1 << 20))
        assert write(layer, b"third", 1 << 19) == 1 << 19
        layer.sync()
        frozen(opened, path)
    assert images.unclean(path) is None


def test_names_on_a_full_disk(place: Path) -> None:
    """If a directory cannot grow, names, symlinks and xattrs are added completely or not at all."""
    path = images.make(place / "image", SMALL)
    with engine.opened(path) as opened:
        layer = opened.layer
        held, _ = layer.create(layer.root, b"file", 0o600, 0, 0)
        write(layer, b"ballast", 100 << 20)
        refusals = 0
        made = []
        for number in range(200):
            name = b"%d" % number + b"n" * 200
            try:
                layer.mknod(layer.root, name, stat.S_IFIFO | 0o600, 0, 0, 0)
                made.append(name)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                refusals += 1
        assert refusals
        for call in (
            lambda: layer.mkdir(layer.root, b"directory", 0o700, 0, 0),
            lambda: layer.symlink(layer.root, b"symlink", b"t" * 500, 0, 0),
            lambda: layer.setxattr(held, b"user.large", b"x" * 900),
        ):
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == errno.ENOSPC
        assert sorted(names_of(layer, layer.root)) == sorted([b"lost+found", b"file", b"ballast", *made])
        assert layer.listxattr(held) == []
        layer.sync()
        image = Image(frozen(opened, path).read_bytes())
        assert image.facts(2).names.keys() == {b"lost+found", b"file", b"ballast", *made}  # type: ignore[union-attr]


def test_inodes_run_out(place: Path) -> None:
    path = images.make(place / "image", Shape(1024, 256, mib=8, journal=1, inodes=128))
    with engine.opened(path) as opened:
        layer, made = opened.layer, []
        with pytest.raises(OSError) as caught:
            for number in range(200):
                layer.mknod(layer.root, b"%d" % number, stat.S_IFREG | 0o600, 0, 0, 0)
                made.append(b"%d" % number)
        assert caught.value.errno == errno.ENOSPC
        assert layer.statfs().ffree == 0
        for make in (
            lambda: layer.mkdir(layer.root, b"directory", 0o700, 0, 0),
            lambda: layer.symlink(layer.root, b"symlink", b"t" * 500, 0, 0),
            lambda: layer.rename((layer.root, b"1"), (layer.root, b"renamed"), 4),
        ):
            with pytest.raises(OSError) as caught:
                make()
            assert caught.value.errno == errno.ENOSPC
        assert sorted(names_of(layer, layer.root)) == sorted([b"lost+found", *made])
        layer.sync()
        frozen(opened, path)
        layer.unlink(layer.root, b"7", None)
        layer.mkdir(layer.root, b"directory", 0o700, 0, 0)
        key = find(layer, b"8")
        layer.unlink(layer.root, b"8", key)
        with pytest.raises(OSError):
            layer.mkdir(layer.root, b"another", 0o700, 0, 0)
        layer.forget(key)
        layer.mkdir(layer.root, b"another", 0o700, 0, 0)
    assert images.unclean(path) is None


def test_an_xattr_that_does_not_fit(place: Path) -> None:
    """Existing values stay, even if a longer value is refused."""
    path = images.make(place / "image", MODERN)
    with engine.opened(path) as opened:
        layer = opened.layer
        key, _ = layer.create(layer.root, b"file", 0o600, 0, 0)
        layer.setxattr(key, b"user.one", b"1" * 3000)
        layer.setxattr(key, b"user.two", b"2" * 100)
        for name in (b"user.one", b"user.three"):
            with pytest.raises(OSError) as caught:
                layer.setxattr(key, name, b"3" * 4090)
            assert caught.value.errno == errno.ENOSPC
        values = {name: layer.getxattr(key, name) for name in layer.listxattr(key)}
        assert values == {b"user.one": b"1" * 3000, b"user.two": b"2" * 100}
    assert images.unclean(path) is None


# --- a failing disk


@contextmanager
def fails_with(code: int) -> Iterator[None]:
    """The block fails with this errno."""
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == code, caught.value


def must_refuse(opened: Engine, code: int) -> None:
    """Every change fails with *code*; reads work."""
    layer = opened.layer
    root = layer.root
    for call in (
        lambda: layer.mknod(root, b"new", stat.S_IFREG | 0o600, 0, 0, 0),
        lambda: layer.mkdir(root, b"new", 0o700, 0, 0),
        lambda: layer.symlink(root, b"new", b"target", 0, 0),
        lambda: layer.rename((root, b"kept"), (root, b"new")),
        lambda: layer.unlink(root, b"kept", None),
        lambda: layer.chmod(root, 0o700),
        lambda: layer.setxattr(root, b"user.x", b""),
        lambda: layer.truncate(find(layer, b"kept"), 5),
    ):
        with fails_with(code):
            call()
    assert b"kept" in names_of(layer, root) and b"new" not in names_of(layer, root)


def must_be_read_only(opened: Engine) -> None:
    """Every change fails with EROFS; reads work."""
    must_refuse(opened, errno.EROFS)
    layer = opened.layer
    with pytest.raises(OSError) as caught:
        layer.sync()
    assert caught.value.errno in (errno.EIO, errno.EROFS), "what is lost must not be called synced"
    file = layer.open(find(layer, b"kept"), os.O_RDWR)
    with fails_with(errno.EROFS):
        file.pwrite(b"data", 0)
    file.close()


def goes_on_when_told(opened: Engine, kind: int) -> None:
    """Data that fdatasync fails to write is kept, and changes fail until fdatasync succeeds."""
    if not opened.image.facts().stalled:
        return
    assert kind == FDATASYNC
    with pytest.raises(OSError) as caught:
        opened.layer.mkdir(opened.layer.root, b"refused", 0o700, 0, 0)
    assert caught.value.errno == errno.EIO
    opened.inject(kind, 0, 0)
    opened.layer.sync()
    assert not opened.image.facts().stalled


def with_failure(path: Path, kind: int, nth: int, error: int, sticky: bool) -> tuple[bool, str | None]:
    """Run a load with a failing call; return (whether it failed, errors)."""
    base = Image(path.read_bytes())
    promises = Promises(begun=1 << 30)

    last: tuple[int, Any] = -1, ()

    def mark(kind: int, number: int) -> None:
        if kind == COMMITTED:
            promises.committed = number
        elif kind == SYNCED:
            promises.synced.append(load.syncs[number])
        else:
            assert kind == BEGIN

    def writing(*what: Any) -> None:
        nonlocal last
        last = load.model.operation, what

    failures = 0
    with engine.opened(path) as opened:
        load = Load(opened.layer, base, 7, mark, tolerate=frozenset({errno.ENOSPC}), writing=writing)
        load.spared.add(find(opened.layer, b"kept"))
        opened.inject(kind, nth, error, sticky=sticky)
        for part in range(3):
            while load.model.operation < 25 * (part + 1):
                try:
                    load.run(1, commit_every=9, sync_every=6)
                except OSError as caught:
                    failures += 1
                    assert caught.errno == errno.EIO, caught
                    if opened.image.facts().aborted:
                        break
                    goes_on_when_told(opened, kind)
                    assert failures < 20 or sticky
            try:
                opened.image.checkpoint()
            except OSError as caught:
                failures += 1
                assert caught.errno in (errno.EIO, errno.EROFS), caught
                goes_on_when_told(opened, kind)
            if opened.image.facts().aborted:
                opened.inject(kind, 0, 0)
                must_be_read_only(opened)
                opened.image.abandon()
                if last[0] == load.model.operation:  # it failed after its data was written
                    perhaps_written(load.model.states, *last[1])
                break
        else:
            try:
                opened.image.close()
            except OSError:
                failures += 1
    wrong = images.recover(path) or judge(load.model.states, promises, Image(path.read_bytes()))
    return failures + load.failed > 0, wrong


@pytest.mark.parametrize(
    ("kind", "error", "stride"),
    [(PWRITE, errno.EIO, 3), (FDATASYNC, errno.EIO, 1), (PREAD, errno.EIO, 1)],
    ids=["pwrite", "fdatasync", "pread"],
)
def test_the_nth_call_fails(place: Path, kind: int, error: int, stride: int) -> None:
    """Read-only afterwards (or, by fdatasync, until it succeeds), nothing that was committed is lost, and the
    image recovers.
    """
    base = images.make(place / "base", SMALL)
    with engine.opened(base) as opened:
        write(opened.layer, b"kept", 300_000)
    calm = 0
    for nth in range(1, 3000, stride):
        path = place / "image"
        shutil.copyfile(base, path)
        failed, wrong = with_failure(path, kind, nth, error, sticky=bool(nth % 2))
        assert wrong is None, f"call {nth}: {wrong}"
        calm = 0 if failed else calm + 1
        if calm == 3:  # the load makes no more of these calls
            assert nth > 5
            return
    pytest.fail("it never ended")
