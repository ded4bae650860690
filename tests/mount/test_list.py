"""``cowfs list``: what is mounted where, with which store, by whom."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from tests.support.mounts import cowfs, eventually
from tests.support.system import needs_root, run

pytestmark = needs_root
TRANSPORT = "io_uring"  # nothing here depends on how requests come


def rows(*, nobody: bool = False) -> list[list[str]]:
    return [line.split() for line in cowfs("list", check=True, nobody=nobody).stdout.splitlines()]


def test_what_is_mounted(nobody_path: Path) -> None:
    lower, first, second = (nobody_path / name for name in ("lower", "first", "second"))
    for directory in (lower, first, second):
        directory.mkdir()
    os.chown(second, 65534, 65534)
    cowfs("create", nobody_path / "s.bs", "16", check=True)
    cowfs("mount", lower, first, "--store", nobody_path / "s.bs", check=True)
    try:
        cowfs("mount", lower, second, "-o", "ro", nobody=True, check=True)
        try:
            heading, *found = rows()
            assert heading == ["MOUNTPOINT", "LOWER", "STORE", "USER", "STATE"]
            assert [str(first), str(lower), str(nobody_path / "s.bs"), "root", "rw"] in found
            assert [str(second), str(lower), "memory", "nobody", "ro"] in found
            assert [str(first), str(lower), "?", "root", "rw"] in rows(nobody=True), "that is root's affair"
            told = {one["mountpoint"]: one for one in json.loads(cowfs("list", "--json", check=True).stdout)}
            mine = told[str(first)]
            assert mine["store"] == {"kind": "image", "path": str(nobody_path / "s.bs")}
            assert (mine["lowers"], mine["uid"], mine["readonly"]) == ([str(lower)], 0, False)
            os.kill(mine["pid"], signal.SIGSTOP)
            try:
                began = time.monotonic()
                assert [str(first), str(lower), "?", "root", "no", "answer"] in rows()
                assert time.monotonic() - began < 30, "it waited for ever"
            finally:
                os.kill(mine["pid"], signal.SIGCONT)
            os.kill(told[str(second)]["pid"], signal.SIGKILL)
            dead = [str(second), str(lower), "?", "nobody", "dead"]
            eventually(lambda: dead in rows(), "its daemon is dead")
        finally:
            cowfs("umount", second, nobody=True, check=True)
    finally:
        cowfs("umount", first, check=True)
    assert str(first) not in cowfs("list", check=True).stdout


def test_info_says_where_a_mount_is_now(tmp_path: Path) -> None:
    lower, first, second = (tmp_path / name for name in ("lower", "first", "second"))
    for directory in (lower, first, second):
        directory.mkdir()
    cowfs("mount", lower, first, check=True)
    try:
        run("mount", "--bind", first, second)
        try:
            run("umount", first)
            assert f"mounted at: {second}\n" in cowfs("info", second, check=True).stdout
        finally:
            cowfs("umount", second, check=True)
    finally:
        cowfs("umount", first)
