"""What the terminal shows of commands that take long, and what the programs that do the work tell of it."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from cowfs.cli import progress
from cowfs.linux import files
from cowfs.store.e2fsprogs import mke2fs, tools
from cowfs.store.offline.check import check_store
from cowfs.store.offline.create import create_store
from cowfs.store.offline.shrink import shrink_store, trim_store

MIB = 1 << 20


class Terminal(io.StringIO):
    """A terminal that somebody looks at, and a clock: it tells the last line."""

    now = 0.0

    def isatty(self) -> bool:
        return True

    def monotonic(self) -> float:
        return self.now

    @property
    def line(self) -> str:
        return self.getvalue().rpartition("\r\x1b[K")[2]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    terminal = Terminal()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=terminal))
    monkeypatch.setattr(progress, "time", terminal)
    return terminal


def test_rate_and_time_left(terminal: Terminal) -> None:
    with progress.progress_line() as show:
        tick = progress.bytes_done(show, 100 * MIB)
        terminal.now = 0.1
        tick(MIB)
        assert terminal.getvalue() == "", "most commands are done by then"
        terminal.now = 0.5
        tick(9 * MIB)
        assert terminal.line == "10 MiB, 20 MiB/s", "too early to tell"
        terminal.now = 2.0
        tick(10 * MIB)
        assert terminal.line == "20 MiB, 10 MiB/s, 8 s left"
        terminal.now = 4000.0
        tick(0)
        assert terminal.line == "20 MiB, 0 MiB/s, 4 h left"
        terminal.now = 4001.0
        tick(80 * MIB)
        assert terminal.line == "100 MiB, 0 MiB/s"
        show("")
        assert terminal.line == ""
    assert terminal.getvalue().endswith("\x1b[K")


def test_steps_and_counts(terminal: Terminal) -> None:
    with progress.progress_line() as show:
        share = progress.share_done(show)
        share("checking", 0.0)
        terminal.now = 10.0
        share("checking", 0.05)
        assert terminal.line == "checking: 5%, 3 min left"
        share("copying", 0.0)
        terminal.now = 12.0
        share("copying", 0.5)
        assert terminal.line == "copying: 50%, 2 s left"
        names = progress.names_done(show, "names")
        paths = progress.paths_done(show, 3 * MIB)
        terminal.now = 14.0
        names(b"a")
        assert terminal.line == "1 names, 0/s"
        terminal.now = 16.0
        paths(b"a", 0)
        terminal.now = 17.0
        paths(b"a", 2 * MIB)
        assert terminal.line == "1 paths, 2 MiB, 0 MiB/s, 2 s left"


def test_nothing_is_shown_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, clock = io.StringIO(), Terminal()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=pipe))
    monkeypatch.setattr(progress, "time", clock)
    with progress.progress_line() as show:
        clock.now = 5.0
        show("something")
    assert pipe.getvalue() == ""


@pytest.fixture
def told() -> list[tuple[str, float]]:
    return []


def steps(told: list[tuple[str, float]]) -> list[str]:
    """The steps that were told of, each once; how much of each was done only grows."""
    names = list(dict.fromkeys(step for step, _ in told))
    for name in names:
        shares = [share for step, share in told if step == name]
        assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] <= 1
    return names


def test_create_check_trim_and_shrink_tell(tmp_path: Path, told: list[tuple[str, float]]) -> None:
    def share(step: str, done: float) -> None:
        told.append((step, done))

    store = str(tmp_path / "s.bs")
    create_store(store, 64 * MIB, share=share)
    assert steps(told) == ["making the filesystem"]
    told.clear()
    for read_only in (True, False):
        assert check_store(store, read_only=read_only, share=share).code == 0
        assert steps(told) == ["checking the filesystem"]  # no changes are in it
        assert told[-1][1] == 1
        told.clear()
    trim_store(store, share=share)
    assert steps(told) == ["checking the filesystem"]
    told.clear()
    from cowfs.exports.target import new_file

    shrink_store(store, 32 * MIB, lambda path: new_file(path, force=True), share=share)
    assert steps(told) == ["copying", "checking the filesystem", "making it smaller"]


def test_zeros_that_must_be_written_are_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[tuple[str, float]]
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(files, "fallocate", refused)
    create_store(str(tmp_path / "s.bs"), 16 * MIB, share=lambda *step: told.append(step))
    assert steps(told) == ["allocating", "making the filesystem"]
    assert ("allocating", 1.0) in told


def test_what_mke2fs_says_is_an_error_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.write_bytes(b"x")
    fd = os.open(path, os.O_RDWR)
    try:
        with pytest.raises(Exception, match=r"mke2fs failed: \S"):
            mke2fs.format_image(fd, str(path), share=tools.untold)
    finally:
        os.close(fd)
