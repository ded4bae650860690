"""The image: what is refused, cached in memory, and committed, and how it is abandoned."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfs.formats.ext3 import directory as ext3_directory
from cowfs.formats.ext3._engine import lib
from cowfs.formats.ext3.directory import Directories, Names, entry, place_of, type_of
from cowfs.formats.ext3.image import ROOT, Image
from tests.contract.test_upper import fails
from tests.support import ext3
from tests.support.system import run

FILE, FOLDER = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755


def open_image(path: Path, **how: object) -> Image:
    fd = os.open(path, os.O_RDWR)
    try:
        return Image(fd, str(path), **how)  # type: ignore[arg-type]
    finally:
        os.close(fd)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return ext3.make(tmp_path / "image", size=16 << 20)


@pytest.fixture
def image(path: Path) -> Iterator[Image]:
    opened = open_image(path, commit_seconds=0)
    yield opened
    opened.close()
    ext3.sound(path)


# --- refused images


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (["-t", "ext4"], "extents"),
        (["-t", "ext4"], "metadata_csum"),
        (["-t", "ext3", "-O", "huge_file,dir_nlink"], r"huge_file, dir_nlink"),
        (["-t", "ext2"], "no journal"),
    ],
)
def test_what_is_not_ext3_is_refused_by_name(tmp_path: Path, how: list[str], said: str) -> None:
    path = tmp_path / "image"
    run("mke2fs", "-q", *how, path, "32M")
    before = path.read_bytes()
    with pytest.raises(OSError, match=said) as caught:
        open_image(path)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert path.read_bytes() == before


def test_what_is_no_filesystem_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(1 << 20))
    with fails(errno.EINVAL):
        open_image(path)


def test_a_journal_is_recovered_when_opened(path: Path, tmp_path: Path) -> None:
    image = open_image(path)
    image.create(ROOT, b"f", FILE, 0, 0)
    image.commit()
    crashed = tmp_path / "crashed"
    shutil.copyfile(path, crashed)
    image.close()
    before = crashed.read_bytes()
    image = open_image(crashed, read_only=True)
    assert b"f" in image.names(ROOT)
    image.close()
    assert crashed.read_bytes() == before
    image = open_image(crashed)
    assert b"f" in image.names(ROOT)
    image.close()
    assert run("e2fsck", "-fn", crashed, check=False).returncode == 0


# --- names


def test_an_entry_keeps_all_of_its_parts() -> None:
    for mode in ext3_directory.TYPES:
        value = entry(0xFFFFFFFF, mode, 0xFFFFFFFF, 0xFFFC)
        assert (value & ext3_directory.INO, type_of(value), place_of(value)) == (
            0xFFFFFFFF,
            mode,
            (0xFFFFFFFF, 0xFFFC),
        )


def test_few_names_are_kept_in_memory() -> None:
    """After any listing, and with many new names in known directories."""
    loaded: list[int] = []

    def load(number: int) -> Iterator[bytes]:
        loaded.append(number)
        for name in (b"%d" % n for n in range(50)):
            yield b"\1\0\0\0" + bytes(4) + bytes(2) + b"\1" + bytes([len(name)]) + name

    known = Directories(load, most=1000)
    for number in range(2000):
        assert len(known.names(number)) == 50
        known.names(0)
    assert loaded == list(range(2000)), "what is used stays"
    kept = [number for number in range(2000) if known.known(number) is not None]
    assert sum(len(known.names(number)) for number in kept) <= 1000
    grown = Directories(lambda _: iter(()), most=1000)
    for number in range(2000):
        names = grown.names(number)
        assert isinstance(names, Names)
        names.update({b"%d" % n: 0 for n in range(50)})
    kept = [number for number in range(2000) if grown.known(number) is not None]
    assert sum(len(grown.names(number)) for number in kept) < 20_000


def test_a_hundred_thousand_names(tmp_path: Path) -> None:
    path = ext3.make(tmp_path / "image", size=256 << 20, more=("-N", "200000"))
    with ext3.opened(path) as layer:
        image = layer.image
        folder = image.create(ROOT, b"many", FOLDER, 0, 0)
        made = {b"a-rather-long-name-%06d" % number for number in range(100_000)}
        first = image.create(folder, b"first", FILE, 0, 0)
        for number, name in enumerate(sorted(made)):
            if number % 30_000 == 0:
                first = image.create(folder, b"inode-%d" % number, FILE, 0, 0)
            image.link(first, FILE, folder, name)
        for name in sorted(made)[::3]:
            image.unlink(folder, name, keep=False)
            made.discard(name)
    with ext3.opened(path) as layer:
        folder = layer.image.names(ROOT)[b"many"] & ext3_directory.INO
        assert {name for name, _ in layer.readdir(folder) if name.startswith(b"a-")} == made
        for name in list(made)[:1000]:
            layer.image.rename((folder, name), (ROOT, name))
        assert len(layer.readdir(folder)) == len(made) - 1000 + 5


# --- durability


def test_changes_are_committed_by_themselves(path: Path, tmp_path: Path) -> None:
    image = open_image(path, commit_seconds=0.01)
    image.create(ROOT, b"f", FILE, 0, 0)
    done = threading.Event()
    for _ in range(500):
        if not lib.x3_dirty(image.handle) or done.wait(0.01):
            break
    image.abandon()
    run("e2fsck", "-p", path, check=False)
    again = open_image(path)
    assert b"f" in again.names(ROOT)
    again.close()


def test_a_crash_loses_what_was_not_committed_and_nothing_else(path: Path) -> None:
    image = open_image(path, commit_seconds=0)
    image.create(ROOT, b"before", FILE, 0, 0)
    image.commit()
    image.create(ROOT, b"after", FILE, 0, 0)
    image.abandon()
    run("e2fsck", "-p", path, check=False)
    again = open_image(path)
    assert image.handle is None
    assert set(again.names(ROOT)) == {b"lost+found", b"before"}
    again.close()


def test_closing_leaves_a_clean_image_and_no_descriptor_or_thread(path: Path) -> None:
    before = os.listdir("/proc/self/fd"), threading.active_count()
    image = open_image(path)
    image.create(ROOT, b"f", FILE, 0, 0)
    image.close()
    image.close()
    image.abandon()
    assert (os.listdir("/proc/self/fd"), threading.active_count()) == before
    ext3.sound(path)


def test_going_on_in_another_file(path: Path, tmp_path: Path) -> None:
    """A store in memory that is saved later."""
    image = open_image(path, commit_seconds=0)
    image.create(ROOT, b"before", FILE, 0, 0)
    image.checkpoint()
    shutil.copyfile(path, tmp_path / "other")
    with (tmp_path / "other").open("r+b") as other:
        image.switch(other.fileno())
    untouched = path.read_bytes()
    image.create(ROOT, b"after", FILE, 0, 0)
    image.close()
    assert path.read_bytes() == untouched
    ext3.sound(tmp_path / "other")
    again = open_image(tmp_path / "other")
    assert {b"before", b"after"} < set(again.names(ROOT))
    again.close()


# --- abandoning an image


def test_an_image_that_cannot_be_written_is_given_up_loudly_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = open_image(path, commit_seconds=0)
    kept = image.create(ROOT, b"kept", FILE, 0, 0)
    image.pwrite(kept, b"data", 0)
    image.commit()
    lib.x3_inject(image.handle, lib.X3_PWRITE, 1, errno.EIO, 1)
    with fails(errno.EIO):
        image.create(ROOT, b"lost", FILE, 0, 0)
    with fails(errno.EIO, errno.EROFS):
        image.commit()
    for _ in range(3):
        with fails(errno.EROFS):
            image.create(ROOT, b"more", FILE, 0, 0)
    assert image.pread(kept, 10, 0) == b"data"
    assert image.getattr(kept).size == 4
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert str(path) in record.getMessage()
    assert image.facts().aborted == errno.EIO
    with pytest.raises(OSError):
        image.close()
    run("e2fsck", "-p", path, check=False)
    again = open_image(path)
    assert set(again.names(ROOT)) == {b"lost+found", b"kept"}
    again.close()
    ext3.sound(path)


def test_a_full_image_says_enospc_and_goes_on(image: Image) -> None:
    ino = image.create(ROOT, b"big", FILE, 0, 0)
    chunk = b"x" * (1 << 20)
    written = 0
    with fails(errno.ENOSPC):
        while True:
            written += image.pwrite(ino, chunk, written)
    assert written >= 8 << 20
    with fails(errno.ENOSPC):
        for number in range(100_000):
            image.setxattr(image.create(ROOT, b"f%d" % number, FILE, 0, 0), b"user.x", b"v" * 3000)
    image.unlink(ROOT, b"big", keep=False)
    again = image.create(ROOT, b"again", FILE, 0, 0)
    assert image.pwrite(again, chunk, 0) == len(chunk), "what was removed makes room at once"
