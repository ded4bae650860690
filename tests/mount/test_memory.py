"""Requests leave no memory in use, however many are made."""

from __future__ import annotations

import os
import random
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.direct import Direct
from tests.support.mounts import Mounted, cowfs, mounted
from tests.support.requests import Requests, lower_tree
from tests.support.system import needs_fuse, needs_root

DEV_FUSE_AT_NIGHT = True
pytestmark = [needs_fuse, needs_root]

WARM = 1000
"""Requests of a kind after which caches that are filled by it are full."""
A_REQUEST = 40
"""Bytes: what one may leave behind on average. One object that is kept is larger."""
SLACK = 192 << 10
"""Bytes: what the memory's own granularity makes of nothing."""
ROUNDS = 5
"""Python takes memory by the mebibyte: a round may show that much for nothing. A leak shows in all."""


@pytest.fixture(params=["image", pytest.param("directory", marks=pytest.mark.nightly)])
def mount(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mounted]:
    lower_tree(tmp_path / "lower")
    if request.param == "image":
        # Small: the engine keeps blocks of metadata that it has seen, and soon has seen all.
        cowfs("create", tmp_path / "store", "24", check=True)
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as mount:
        yield mount


def memory_of(pid: int) -> int:
    """The bytes of memory that a process has for itself (proc_pid_status(5))."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no RssAnon")


@pytest.mark.slow
@pytest.mark.parametrize(
    "count",
    [1500, pytest.param(200_000, marks=[pytest.mark.nightly, pytest.mark.timeout(7200)])],
)
def test_each_kind_of_request(mount: Mounted, count: int) -> None:
    pid = mount.pid()
    allowed = SLACK + A_REQUEST * min(count, 20_000)
    too_much = {}
    with Requests(mount.path) as requests:
        for kind, call in requests.kinds.items():
            for number in range(WARM):
                call(number)
            grown: list[int] = []
            while len(grown) < ROUNDS and (not grown or grown[-1] > allowed):
                before = memory_of(pid)
                for number in range(count):
                    call(number)
                grown.append(memory_of(pid) - before)
            if grown[-1] > allowed:
                too_much[kind] = grown
    assert not too_much, f"bytes more after {count} requests, and as many again: {too_much}"


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_a_days_work(mount: Mounted) -> None:
    """Two million requests of all kinds: after the first quarter the memory stays as it is."""
    pid = mount.pid()
    rng = random.Random(9)
    seen = [memory_of(pid)]
    with Requests(mount.path) as requests:
        calls = list(requests.kinds.values())
        for _ in range(4):
            for _ in range(5000):
                call = rng.choice(calls)
                begin = rng.randrange(10_000) * 500
                for number in range(begin, begin + 100):
                    call(number)
            seen.append(memory_of(pid))
    print("bytes at the start, and after each quarter:", seen, file=sys.stderr)
    assert seen[-1] - seen[1] < 2 << 20, seen


def test_inodes_with_numbers_of_their_own(tmp_path: Path) -> None:
    """Those that the union has to number itself, as all of another union's lower are, are forgotten too."""
    lower_tree(tmp_path / "lower")
    many = tmp_path / "lower" / "many"
    many.mkdir()
    for number in range(4000):
        (many / f"{number}").touch()
    with mounted(tmp_path / "lower", tmp_path / "mnt"):
        direct = Direct(os.fspath(tmp_path / "store2"), [os.fspath(tmp_path / "mnt")])
        try:

            def number_of(name: int) -> int:
                number = direct.find(f"many/{name}").ino
                direct.forget()
                return number

            numbers = {name: number_of(name) for name in range(100)}
            assert len(set(numbers.values())) == 100 and os.stat(tmp_path / "mnt/many/0").st_ino >= 1 << 40
            for name in range(100, 1100):
                number_of(name)
            tracemalloc.start()
            number_of(0)
            before, _ = tracemalloc.get_traced_memory()
            for name in range(1100, 4000):
                number_of(name)
            after, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert after - before < 200_000  # three dictionary entries each would be twice that
            assert numbers == {name: number_of(name) for name in numbers}
        finally:
            direct.close()
