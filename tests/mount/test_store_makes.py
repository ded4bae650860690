"""Stores in ext3 filesystems of many makes: used, checked and grown by both engines, or refused by name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfs.errors import StoreError, UsageError
from cowfs.store.offline.check import Listener, check_store
from cowfs.store.offline.grow import grow_store
from cowfs.store.offline.info import store_info
from cowfs.store.served.open import open_store
from tests.ext3 import images
from tests.ext3.makes import MAKES, REFUSED, Make
from tests.support.system import needs_root

DEV_FUSE_AT_NIGHT = True

VALUE = b"v" * 300


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty directory, in memory if there is such a place: e2fsck syncs what it writes."""
    with tempfile.TemporaryDirectory(prefix="cowfs-makes-", dir=images.scratch()) as made:
        yield Path(made)


def fill(path: Path, engine: str, name: bytes) -> None:
    """Open the store and put something in it."""
    store = open_store(str(path), engine=engine)
    try:
        key, file = store.layer.create(store.upper, name, 0o644, 0, 0)
        file.pwrite(name * 1000, 0)
        file.close()
        store.layer.setxattr(key, b"user.x", VALUE)
    finally:
        store.close()


def names(path: Path) -> set[bytes]:
    """What is in the store: all that was put there, whole."""
    store = open_store(str(path), read_only=True)
    try:
        found = {entry.name for entry in store.layer.readdir(store.upper)}
        for name in found:
            pair = store.layer.lookup(store.upper, name)
            assert pair is not None
            assert store.layer.getxattr(pair[0], b"user.x") == VALUE
            file = store.layer.open(pair[0], os.O_RDONLY)
            assert file.pread(1 << 16, 0) == name * 1000
            file.close()
        return found
    finally:
        store.close()


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_a_store_in_it_is_used_and_grown(place: Path, make: Make) -> None:
    path = make.make(place / "s.bs")
    fill(path, "process", b"one")
    size = store_info(str(path))["size"]
    inodes = store_info(str(path))["free_inodes"]
    wanted = (path.stat().st_size + (24 << 20)) & -65536
    assert grow_store(str(path), wanted) == wanted
    assert store_info(str(path))["size"] == wanted > size
    assert store_info(str(path))["free_inodes"] >= inodes
    assert images.unclean(path) is None
    assert names(path) == {b"one"}
    fill(path, "process", b"two")
    assert images.unclean(path) is None
    said: list[str] = []
    assert check_store(str(path), listener=Listener(said.append)).problems == []
    assert names(path) == {b"one", b"two"}


@needs_root
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_the_engines_take_turns_or_the_kernel_is_said_to_be_unable(place: Path, make: Make) -> None:
    path = make.make(place / "s.bs")
    if not make.for_kernel:
        with pytest.raises(StoreError, match=r"\d+ KiB blocks.*--engine process"):
            fill(path, "kernel", b"one")
        return
    for number, engine in enumerate(("kernel", "process", "kernel")):
        fill(path, engine, b"%d" % number)
        assert images.unclean(path) is None
    assert names(path) == {b"0", b"1", b"2"}


@pytest.mark.parametrize("engine", ["process", pytest.param("kernel", marks=needs_root)])
@pytest.mark.parametrize(("said", "make"), REFUSED.items(), ids=REFUSED)
def test_another_filesystem_is_refused_by_name(place: Path, said: str, make: Make, engine: str) -> None:
    path = make.make(place / "s.bs")
    before = path.read_bytes()
    for refuse in (
        lambda: open_store(str(path), engine=engine),
        lambda: open_store(str(path), engine=engine, read_only=True),
        lambda: store_info(str(path)),
        lambda: check_store(str(path)),
        lambda: grow_store(str(path), 64 << 20),
    ):
        with pytest.raises(StoreError) as caught:
            refuse()
        line = str(caught.value)
        assert line.startswith(f"{path}: ")
        assert said in line
        assert "\n" not in line
    assert path.read_bytes() == before


def test_too_few_inodes_for_a_store_are_told(place: Path) -> None:
    path = Make(options=("-b", "4096", "-N", "16")).make(place / "s.bs")
    with pytest.raises(StoreError, match=r"No space left.*cowfs grow"):
        open_store(str(path))
    assert images.unclean(path) is None


@pytest.mark.parametrize("block", [1024, 65536])
def test_a_file_of_an_odd_size_is_filled_once(place: Path, block: int) -> None:
    """Growing counts in blocks of the filesystem: what is left of the file, or more of it, is no error."""
    kib = max(20_001, block * 2200 >> 10)
    path = Make(options=("-b", str(block)), kib=kib, journal=max(block >> 10, 4)).make(place / "s.bs")
    size = store_info(str(path))["size"]
    said: list[str] = []
    assert grow_store(str(path), None, progress=said.append) == size
    assert any("already" in line for line in said)
    os.truncate(path, size + (24 << 20) + 5 * 1024 + 1)
    grown = grow_store(str(path), None)
    assert grown == store_info(str(path))["size"] == path.stat().st_size & -max(block, 4096) > size
    said.clear()
    assert grow_store(str(path), None, progress=said.append) == grown
    assert grow_store(str(path), grown + (block >> 1), progress=said.append) == grown
    assert [line for line in said if "already" not in line] == []
    assert images.unclean(path) is None


def test_so_many_blocks_has_no_ext3(place: Path) -> None:
    path = Make(options=("-b", "1024")).make(place / "s.bs")
    with pytest.raises(UsageError, match="less than 4 TiB"):
        grow_store(str(path), 4 << 40)
