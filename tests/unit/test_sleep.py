"""Disks are checked after the machine has slept, and at no other time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfs.linux import sleep


def on_disks() -> list[str]:
    """Return a mount of each disk with a filesystem here."""
    found = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        words = line.split()
        if os.path.exists(f"/sys/dev/block/{words[2]}"):
            found[words[2]] = words[4].encode().decode("unicode_escape")
    return [path for number, path in found.items() if _number(os.stat(path).st_dev) == number]


def _number(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def test_the_disk_of_a_file_is_a_whole_one() -> None:
    paths = on_disks()
    if not paths:
        pytest.skip("needs a filesystem that is mounted from a disk")
    for path in paths:
        found = sleep.disk_of(path)
        assert found.startswith("/dev/")
        block = Path("/sys/class/block", found.removeprefix("/dev/").replace("/", "!"))
        assert block.is_dir() and not (block / "partition").exists()


@pytest.mark.parametrize("path", ["memory", "/proc/self/stat"])
def test_what_is_on_no_disk_has_none(path: str) -> None:
    assert sleep.disk_of(path) == ""


def test_disks_are_opened_once_after_each_sleep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    answers: Iterator[tuple[bytes, int]] = iter([(b"0", 0), (b"0", 0), (b"1", 0), (b"1", 0), (b"1", 60)])
    monkeypatch.setattr(sleep, "_slept", lambda *_: next(answers))
    monkeypatch.setattr(sleep, "disk_of", lambda path: "" if path == "memory" else f"{tmp_path}/disk")
    disks = sleep.Disks(["image", "store", "memory"])

    def note(name: str, flags: int) -> int:
        opened.append(name)
        return os.dup(0)

    monkeypatch.setattr(os, "open", note)
    for expected in (0, 1, 1, 2):
        disks.reopen_after_sleep()
        assert opened == [f"{tmp_path}/disk"] * expected


def test_a_disk_that_is_gone_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([(b"0", 0), (b"1", 0)])
    monkeypatch.setattr(sleep, "_slept", lambda *_: next(answers))
    monkeypatch.setattr(sleep, "disk_of", lambda path: f"{tmp_path}/none")
    sleep.Disks(["store"]).reopen_after_sleep()
