"""Random operations on a file that is copied up in pieces, compared with plain bytes."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import cast

import pytest

from cowfs.layers.ext3 import Ext3Layer
from cowfs.layers.partial import PartialFile
from cowfs.overlay import incomplete
from cowfs.overlay.fs import Pending
from cowfs.overlay.handle import Handle
from cowfs.overlay.node import Node
from cowfs.overlay.partial import Rest
from tests.support import ext3, tree
from tests.support.direct import Direct
from tests.support.system import run

SIZE = 300_123
DATA = random.Random(5).randbytes(SIZE - 150_000)
LOWER = DATA[:40_000] + bytes(150_000) + DATA[40_000:]
FILES = 4
SEEDS = [pytest.param(seed, marks=[] if seed < 4 else [pytest.mark.nightly]) for seed in range(40)]


class Lazy(Direct):
    """A union that copies up all files lazily, and continues only when the test says so."""

    def _open(self) -> None:
        super()._open()
        self.fs.options = dataclasses.replace(self.fs.options, lazy_from=1)

    @property
    def layer(self) -> Ext3Layer:
        """The upper of the union."""
        return cast(Ext3Layer, self.fs.upper)

    def key(self, node: Node) -> int:
        """Return the inode of a node in the upper."""
        assert isinstance(node.upper, int)
        return node.upper

    def kill(self) -> None:
        """Simulate a crash, and open the store again."""
        self._taken.clear()
        self.union.store.read_only = True
        self.layer.image.abandon()
        self.union.close()
        self._open()


@pytest.fixture(params=[(1024, "directory"), (4096, "squashfs"), (65536, "directory")], ids=str)
def lazy(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lazy]:
    """A union with one file in its lower."""
    block_size, kind = request.param
    monkeypatch.setattr("cowfs.layers.partial._PIECE", 65536)  # many steps
    tree.build(
        tmp_path / "lower",
        {"dir/other": b"", "dense": DATA, **{f"big{number}": b"" for number in range(FILES)}},
    )
    for number in range(FILES):
        with open(tmp_path / f"lower/big{number}", "r+b") as file:
            file.write(DATA[:40_000])
            file.seek(190_000)  # after a hole
            file.write(DATA[40_000:])
    lower = tmp_path / "lower"
    if kind == "squashfs":
        run("mksquashfs", lower, tmp_path / "root.sqsh", "-quiet", "-no-progress", "-b", "16384")
        lower = tmp_path / "root.sqsh"
    ext3.make(tmp_path / "store", block_size, size=(16 << 20) * max(block_size // 4096, 1))
    fs = Lazy(str(tmp_path / "store"), [str(lower)])
    yield fs
    fs.close()
    ext3.sound(tmp_path / "store")


class History:
    """The operations on the file, and its expected content."""

    def __init__(self, lazy: Lazy, path: str, seed: int) -> None:
        self.fs = lazy
        self.chance = random.Random(seed)
        self.model = bytearray(LOWER)
        self.path = self.base = path
        self.handles: list[Handle] = []
        self.names = 0
        self.copying: tuple[Pending, PartialFile, Iterator[int]] | None = None

    def place(self, most: int) -> int:
        """Return an offset, often at the edge of a block or of the lower."""
        chance = self.chance
        where = [chance.randrange(most + 1), chance.randrange(most // 4096 + 1) * 4096, most, SIZE, 40_000]
        return min(max(chance.choice(where) + chance.choice([0, 0, 1, -1]), 0), most)

    def open(self) -> None:
        flags = self.chance.choice([os.O_RDONLY, os.O_RDWR, os.O_WRONLY])
        self.handles.append(self.fs.open(self.path, flags))

    def write(self) -> None:
        offset = self.place(len(self.model) + 70_000)
        data = self.chance.randbytes(self.chance.choice([1, 100, 4096, 5000, 70_000]))
        ours = [handle for handle in self.handles if handle.writable]
        if ours and self.chance.random() < 0.7:
            self.fs.fs.write(self.chance.choice(ours), data, offset)
        else:
            self.fs.write(self.path, data, offset)
        self.model.extend(bytes(max(offset - len(self.model), 0)))
        self.model[offset : offset + len(data)] = data

    def truncate(self) -> None:
        size = self.place(len(self.model) + 50_000)
        self.fs.set(self.path, size=size)
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))

    def truncate_by_open(self) -> None:
        self.handles.append(self.fs.open(self.path, os.O_RDWR | os.O_TRUNC))
        self.model.clear()

    def rename(self) -> None:
        self.names += 1
        new = self.chance.choice([f"{self.base}.{self.names}", f"dir/{self.base}.{self.names}"])
        self.fs.rename(self.path, new)
        self.path = new

    def rename_the_directory(self) -> None:
        if self.path.startswith("dir/"):
            self.fs.rename("dir", "moved")
            self.fs.rename("moved", "dir")

    def link(self) -> None:
        self.names += 1
        self.fs.link(self.path, f"{self.base}.link{self.names}")

    def chmod(self) -> None:
        self.fs.set(self.path, mode=self.chance.choice([0o600, 0o644]))

    def go_on(self) -> None:
        """Do a step of the background work."""
        before = self.fs.fs.stat(self.fs.find(self.path)).st_mtime_ns
        pending = next(iter(self.fs.fs.pending.values()), None)
        if pending is None:
            return
        if self.copying is None or self.copying[0] is not pending:
            self.stop_copying()
            file = incomplete.open_rest(self.fs.fs, pending)
            self.copying = pending, file, file.copy_steps()
        if next(self.copying[2], None) is None:
            self.stop_copying()
            incomplete.complete(self.fs.fs, pending)
        assert self.fs.fs.stat(self.fs.find(self.path)).st_mtime_ns == before, "the times are left alone"

    def remount(self) -> None:
        for handle in self.handles:
            self.fs.fs.release_handle(handle)
        self.handles.clear()
        self.stop_copying()
        self.fs.remount()

    def stop_copying(self) -> None:
        """Close what the background work has open."""
        if self.copying is not None:
            self.copying[1].close()
            self.copying = None

    def kill(self) -> None:
        self.handles.clear()
        self.copying = None
        self.fs.kill()

    def die_while_truncating(self) -> None:
        """Crash after the size is set, before the store records that the file is complete."""
        if self.fs.find(self.path).partial is None or not self.model:
            return
        size = min(self.place(len(self.model)), len(self.model) - 1)
        job = self.fs.fs.prepare_copy_up(self.fs.find(self.path), size)
        assert isinstance(job, Rest)
        job.run()
        self.kill()
        del self.model[size:]
        if self.chance.random() < 0.5:
            self.write()

    def check(self) -> None:
        assert self.fs.read(self.path) == self.model
        for handle in self.handles:
            assert handle.file.stat().st_size == len(self.model)
            offset = self.place(len(self.model))
            length = self.chance.choice([1, 4096, 100_000])
            wanted = self.model[offset : offset + length]
            assert handle.file.pread(length, offset) == wanted
            assert handle.file.try_pread(length, offset) in {bytes(wanted), None}
            runs = list(handle.file.segments(len(self.model)))
            assert runs == sorted(runs)
            covered = bytearray(self.model)
            for start, stop in runs:
                covered[start:stop] = bytes(stop - start)
            assert not any(covered), "what lseek(2) calls a hole is zeros"


@pytest.mark.parametrize("seed", SEEDS)
def test_random_operations(lazy: Lazy, seed: int) -> None:
    """After any operations and crashes, the file has the expected content."""
    for number in range(FILES):
        history = History(lazy, f"big{number}", seed * FILES + number)
        often = [history.open, history.write, history.write, history.write, history.go_on, history.chmod]
        seldom = [
            *(history.rename, history.rename_the_directory, history.remount, history.kill, history.link),
            *(history.truncate, history.truncate_by_open, history.die_while_truncating),
        ]
        history.open()
        history.write()
        assert lazy.fs.pending, "it is copied up lazily"
        for _ in range(20):
            history.chance.choice(often if history.chance.random() < 0.8 else seldom)()
            history.check()
        history.remount()
        history.check()


def test_a_metacopy_is_never_longer_than_its_data(lazy: Lazy) -> None:
    """When its data is complete up to its new size, it has that size, without zeros after it."""
    lazy.fs.options = dataclasses.replace(lazy.fs.options, lazy_from=1 << 40)
    lazy.set("dense", mode=0o600)
    node = lazy.find("dense")
    job = lazy.fs.prepare_copy_up(node, 1000)
    assert job is not None
    job.run()
    job.commit()
    assert lazy.read("dense") == DATA[:1000]


NONSENSE = [b"", b"1", b"1:2", b"x:1:/big0", b"1:1:big0", b"1:1://", b"9" * 30 + b":1:/a"]


def test_notes_that_make_no_sense_are_refused(lazy: Lazy) -> None:
    """Any content of a store is handled: EINVAL, and the mount continues."""
    name = lazy.fs.format.partial
    for value in NONSENSE:
        lazy.write("big0", b"x")
        lazy.layer.setxattr(lazy.key(lazy.find("big0")), name, value)
        assert lazy.fs.notebook is not None
        lazy.layer.setxattr(lazy.fs.notebook, name, b"12345 99999999999 18446744073709551616 x -1")
        lazy.remount()
        with pytest.raises(OSError) as caught:
            lazy.find("big0")
        assert caught.value.errno == errno.EINVAL
        assert lazy.read("big1") == LOWER
        lazy.layer.unlink(lazy.key(lazy.fs.root), b"big0", None)


def test_a_file_of_the_second_of_two_lowers(tmp_path: Path) -> None:
    """Its lower is found from the root, after it and its parents were renamed."""
    tree.build(tmp_path / "top", {"dir/other": b"other"})
    tree.build(tmp_path / "bottom", {"dir/sub/big": DATA, "hidden": b"hidden"})
    ext3.make(tmp_path / "store", size=16 << 20)
    lazy = Lazy(str(tmp_path / "store"), [str(tmp_path / "top"), str(tmp_path / "bottom")])
    lazy.write("dir/sub/big", b"mine", 70_000)
    lazy.rename("dir/sub/big", "dir/moved")
    lazy.rename("dir", "renamed")
    lazy.mkdir("new")
    lazy.rename("renamed/moved", "new/big")
    lazy.kill()
    wanted = DATA[:70_000] + b"mine" + DATA[70_004:]
    (pending,) = lazy.fs.pending.values()
    assert lazy.read("new/big") == wanted
    with closing(incomplete.open_rest(lazy.fs, pending)) as file:
        for _ in file.copy_steps():
            assert lazy.read("new/big") == wanted
    incomplete.complete(lazy.fs, pending)
    assert not lazy.fs.pending
    (tmp_path / "bottom/dir/sub/big").write_bytes(b"")
    lazy.remount()
    assert lazy.read("new/big") == wanted
    lazy.close()
    ext3.sound(tmp_path / "store")
