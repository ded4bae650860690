"""Disks are looked at after the machine has slept, and at no other time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowfs.linux import sleep


def test_the_disk_of_a_file_is_a_whole_one() -> None:
    found = sleep.disk_of(__file__)
    if found:  # the checkout may be on what has no single disk
        assert found.startswith("/dev/")
        assert not Path("/sys/class/block", Path(found).name, "partition").exists()


@pytest.mark.parametrize("path", ["memory", "/proc/self/stat"])
def test_what_is_on_no_disk_has_none(path: str) -> None:
    assert sleep.disk_of(path) == ""


def test_disks_are_opened_once_after_each_sleep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    answers: Iterator[tuple[bytes, int]] = iter([(b"0", 0), (b"0", 0), (b"1", 0), (b"1", 0), (b"1", 60)])
    monkeypatch.setattr(sleep, "_slept", lambda *_: next(answers))
    monkeypatch.setattr(sleep, "disk_of", lambda path: "" if path == "memory" else f"{tmp_path}/disk")
    disks = sleep.Disks(["image", "store", "memory"])
    monkeypatch.setattr(os, "open", lambda name, flags: opened.append(name) or os.dup(0))
    for expected in (0, 1, 1, 2):
        disks.look_after_sleep()
        assert opened == [f"{tmp_path}/disk"] * expected


def test_a_disk_that_is_gone_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([(b"0", 0), (b"1", 0)])
    monkeypatch.setattr(sleep, "_slept", lambda *_: next(answers))
    monkeypatch.setattr(sleep, "disk_of", lambda path: f"{tmp_path}/none")
    sleep.Disks(["store"]).look_after_sleep()
