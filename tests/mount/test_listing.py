"""Listings under way while others change and list the same directory (readdir(3), POSIX).

A name that is there from opendir to the end comes exactly once; one that is not there at any time between
does not come. The kernel keeps listings for all who open a directory, so readers meet each other in it.
"""

from __future__ import annotations

import ctypes
import os
import random
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from tests.support.mounts import cowfs, mounted
from tests.support.system import needs_fuse, needs_root

DEV_FUSE_AT_NIGHT = True

pytestmark = needs_fuse

_libc = ctypes.CDLL(None, use_errno=True)
_DIRENT = struct.Struct("=QqHB")  # struct linux_dirent64: ino, off, reclen, type; name
PAGE = 2048


class Reader:
    """An open directory that is read piece by piece, and what it must and may have given by the end."""

    open_ones: ClassVar[list[Reader]] = []

    def __init__(self, path: Path, there: set[str]) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        self.open_ones.append(self)
        self.always, self.ever = set(there), set(there)
        self.names: list[str] = []

    def change(self, there: set[str]) -> None:
        """Note what is there now."""
        self.always &= there
        self.ever |= there

    def rewind(self, there: set[str]) -> None:
        os.lseek(self.fd, 0, os.SEEK_SET)
        self.names, self.always, self.ever = [], set(there), set(there)

    def piece(self, size: int = PAGE) -> list[tuple[str, int]]:
        """Read once (getdents64(2)): names, and the offset after each. Nothing at the end."""
        buffer = ctypes.create_string_buffer(size)
        got = _libc.getdents64(self.fd, buffer, size)
        assert got >= 0, os.strerror(ctypes.get_errno())
        found, at = [], 0
        while at < got:
            _, offset, length, _ = _DIRENT.unpack_from(buffer, at)
            name = buffer.raw[at + _DIRENT.size : at + length].partition(b"\0")[0]
            found.append((os.fsdecode(name), offset))
            at += length
        self.names += [name for name, _ in found]
        return found

    def finish(self) -> None:
        """Read to the end, and see whether it was right."""
        while self.piece():
            pass
        names = [name for name in self.names if name not in {".", ".."}]
        assert len(self.names) == len(names) + 2
        twice = {name for name in self.always if names.count(name) > 1}
        assert not twice, f"given twice: {sorted(twice)[:5]}"
        assert not self.always - set(names), f"left out: {sorted(self.always - set(names))[:5]}"
        assert not set(names) - self.ever, f"not there: {sorted(set(names) - self.ever)[:5]}"

    def close(self) -> None:
        os.close(self.fd)
        self.open_ones.remove(self)


@pytest.fixture(
    params=["directory", "image", pytest.param("kernel", marks=needs_root), "plain"],
)
def folder(request: pytest.FixtureRequest, nobody_path: Path) -> Iterator[Path]:
    """A directory of 200 names in the lower, of which some are changed; with *plain*, in the upper alone."""
    base, store = nobody_path, nobody_path / "store"
    (base / "lower" / "folder").mkdir(parents=True)
    (base / "mnt").mkdir()
    for number in range(200):
        (base / "lower" / "folder" / f"below {number}").touch()
    if request.param in {"image", "kernel"}:
        cowfs("create", store, "96", check=True)
    with mounted(base / "lower", base / "mnt", store, engine="kernel" if request.param == "kernel" else None):
        if request.param == "plain":
            (base / "mnt" / "plain").mkdir()
            yield base / "mnt" / "plain"
        else:
            for number in range(0, 200, 10):
                (base / "mnt" / "folder" / f"below {number}").unlink()
                (base / "mnt" / "folder" / f"below {number + 1}").write_text("changed\n")
            yield base / "mnt" / "folder"
        while Reader.open_ones:
            Reader.open_ones[0].close()


def filled(folder: Path, count: int = 200) -> set[str]:
    """Make names; return all that are there."""
    for number in range(count):
        (folder / f"own {number}").touch()
    return {name for name in os.listdir(folder)}


def change(folder: Path, there: set[str], rng: random.Random) -> None:
    """Do one thing to the names, and note it."""
    name = rng.choice(sorted(there))
    what = rng.randrange(6)
    if what == 0:
        (folder / name).unlink()
        there.discard(name)
    elif what == 1:
        made = f"made {rng.randrange(100)}"
        (folder / made).touch()
        there.add(made)
    elif what == 2:  # removed and made again
        (folder / name).unlink()
        (folder / name).touch()
    elif what == 3:  # over another name, which is there all the time
        other = rng.choice(sorted(there))
        (folder / name).rename(folder / other)
        if other != name:
            there.discard(name)
    elif what == 4:  # out of it
        (folder / name).rename(folder.parent / "outside")
        there.discard(name)
    else:  # into it
        (folder.parent / "inside").touch()
        (folder.parent / "inside").rename(folder / name)


def test_many_readers_and_changes(folder: Path) -> None:
    """Whatever comes in which order: readers that begin, go on, rewind and end, and changes."""
    there = filled(folder)
    rng = random.Random(8)
    readers: list[Reader] = []
    for step in range(1500):
        what = rng.random()
        if what < 0.1 and len(readers) < 4:
            readers.append(Reader(folder, there))
        elif what < 0.5 and readers:
            rng.choice(readers).piece(rng.choice([300, PAGE, 32768]))
        elif what < 0.55 and readers:
            rng.choice(readers).rewind(there)
        elif what < 0.62 and readers:
            reader = readers.pop(rng.randrange(len(readers)))
            if rng.random() < 0.7:  # else it is left in the middle
                reader.finish()
            reader.close()
        elif what < 0.66:
            assert set(os.listdir(folder)) == there, step
        else:
            before = set(there)
            change(folder, there, rng)
            for reader in readers:
                # What was removed and made again was away for a moment; that it comes once is asked below.
                reader.change(before & there)
                reader.change(there)
    for reader in readers:
        reader.finish()
        reader.close()


def test_one_piece_then_changes_and_other_listings(folder: Path) -> None:
    """A reader that comes after a change sees it, also where another reads on what it began before."""
    there = filled(folder)
    first = Reader(folder, there)
    first.piece()
    for number in range(0, 200, 3):
        (folder / f"own {number}").unlink()
        there.discard(f"own {number}")
    for number in range(50):
        (folder / f"new {number}").touch()
        there.add(f"new {number}")
    first.change(there)
    second = Reader(folder, there)
    second.piece()
    first.finish()
    assert set(os.listdir(folder)) == there
    second.finish()
    first.close()
    second.close()


def test_a_name_that_is_made_again_comes_once(folder: Path) -> None:
    there = filled(folder)
    reader = Reader(folder, there)
    reader.piece()
    for name in sorted(there):
        (folder / name).unlink()
        (folder / name).touch()
        os.listdir(folder)
    reader.finish()
    assert len(reader.names) == len(set(reader.names))
    reader.close()


def test_seeking(folder: Path) -> None:
    """An offset means the same place after changes and other listings (telldir(3), seekdir(3))."""
    there = filled(folder)
    reader = Reader(folder, there)
    before: list[tuple[str, int]] = []
    while piece := reader.piece(300):
        before += piece
    gone = {name for number, (name, _) in enumerate(before) if name in there and number % 3 == 0}
    for name in gone:
        (folder / name).unlink()
    assert set(os.listdir(folder)) == there - gone
    for number in range(0, len(before), 7):
        os.lseek(reader.fd, before[number][1], os.SEEK_SET)
        found = []
        while piece := reader.piece():
            found += [name for name, _ in piece]
        kept = [name for name, _ in before[number + 1 :] if name not in gone]
        assert [name for name in found if name not in gone] == kept
        assert len(found) == len(set(found))
    reader.close()


def test_removing_the_tree_while_another_lists(folder: Path) -> None:
    there = filled(folder)
    reader = Reader(folder, there)
    reader.piece()
    (folder / "own 7").unlink()
    (folder / "own 7").mkdir()
    subprocess.run(["rm", "-r", *(folder / name for name in os.listdir(folder))], check=True, timeout=60)
    reader.change(set())
    reader.finish()
    assert len(reader.names) < len(there)
    reader.close()
    subprocess.run(["rm", "-r", folder], check=True, timeout=60)
    assert not folder.exists()


def test_removing_what_is_listed_while_another_lists(folder: Path) -> None:
    there = filled(folder)
    reader = Reader(folder, there)
    reader.piece()
    with os.scandir(folder) as entries:
        for number, entry in enumerate(entries):
            os.unlink(entry.path)
            if number % 20 == 0:
                reader.piece(300)
    assert os.listdir(folder) == []
    reader.change(set())
    reader.finish()
    reader.close()


@pytest.mark.slow
def test_ten_thousand_names(folder: Path) -> None:
    """Listed over and over while others come and go."""
    there = filled(folder, 10_000)
    stop = threading.Event()

    def disturb() -> None:
        number = 0
        while not stop.is_set():
            (folder / f"passing {number % 50}").touch()
            (folder / f"passing {number % 50}").unlink()
            number += 1

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for _ in range(5):
            names = os.listdir(folder)
            staying = [name for name in names if not name.startswith("passing")]
            assert len(staying) == len(there)
            assert set(staying) == there
    finally:
        stop.set()
        thread.join()


def test_directories_count_those_in_them(tmp_path: Path) -> None:
    """Link counts are those of ext3 from the first stat, after any change, in any layer."""
    layers = [tmp_path / "one", tmp_path / "two"]
    for layer, names in zip(layers, (["a/b", "a/c/d", "e"], ["a/c/f", "a/g", "h/i"]), strict=True):
        for name in names:
            (layer / name).mkdir(parents=True)
        (layer / "a" / "file").touch()

    def counted(root: Path) -> dict[str, int]:
        return {place: os.stat(place).st_nlink for place, _, _ in os.walk(root)}

    def there(root: Path) -> dict[str, int]:
        return {place: 2 + len(names) for place, names, _ in os.walk(root)}

    for under in (layers, layers[:1]):
        store = tmp_path / f"store{len(under)}"
        for number in range(2):  # the second time all is as the first has left it
            with mounted(under, tmp_path / "mnt", store) as mount:
                assert counted(mount.path) == there(mount.path)
                if number:
                    continue
                changes: list[Callable[[Path], object]] = [
                    lambda at: (at / "a" / "new" / "deep").mkdir(parents=True),
                    lambda at: (at / "a" / "b").rmdir(),
                    lambda at: (at / "a" / "b").mkdir(),
                    lambda at: (at / "a" / "c" / "d").rename(at / "d"),
                    lambda at: (at / "e").rename(at / "a" / "b"),
                    lambda at: (at / "a" / "c" / "x").touch(),
                    lambda at: (at / "a" / "new").rename(at / "a" / "c" / "new"),
                    lambda at: (at / "d").rmdir(),
                ]
                for change in changes:
                    change(mount.path)
                    assert counted(mount.path) == there(mount.path)
