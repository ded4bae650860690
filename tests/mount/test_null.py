"""``-z``: names as they are, with newlines and bytes that are not UTF-8, each field ended by a NUL."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.support.mounts import COWFS, cowfs, mounted, project_root
from tests.support.system import needs_fuse

pytestmark = needs_fuse
DEV_FUSE_AT_NIGHT = True
ODD = b"a\nb\xff"


def fields(*arguments: str | Path) -> list[bytes]:
    """Return the fields that a command prints, separated by NUL."""
    env = {**os.environ, "PYTHONPATH": project_root()}
    done = subprocess.run(
        [*COWFS, *map(str, arguments)], stdout=subprocess.PIPE, env=env, check=True, timeout=60
    )
    assert not done.stdout or done.stdout.endswith(b"\0")
    return done.stdout.split(b"\0")[:-1]


def test_each_command_that_prints_names(tmp_path: Path) -> None:
    lower, store = tmp_path / "lower", tmp_path / "store"
    lower.mkdir()
    below, path = bytes(lower) + b"/" + ODD, bytes(tmp_path) + b"/mnt/" + ODD
    Path(os.fsdecode(below)).write_bytes(b"below")
    Path(os.fsdecode(below + b"2")).write_bytes(b"same")
    with mounted(lower, tmp_path / "mnt", store):
        Path(os.fsdecode(path)).write_bytes(b"above!")
        os.utime(path, ns=(0, 1_000_000_001))
        same = os.stat(path + b"2")
        Path(os.fsdecode(path + b"2")).write_bytes(b"same")
        os.utime(path + b"2", ns=(same.st_atime_ns, same.st_mtime_ns))
    cowfs("checkpoint", store, "first", check=True)

    listed = fields("checkpoints", store, "-z")
    assert [listed[0], listed[2:]] == [b"*", [b"first", b""]]
    used = fields("du", store, "-z")
    assert (ODD, b"changed") in list(zip(used[2::3], used[::3], strict=True))
    explained = fields("explain", store, os.fsdecode(ODD), "-z")
    assert len(explained) % 11 == 0
    assert explained[0] == ODD and explained[11 + 0] == ODD
    layers = [explained[at : at + 11] for at in range(0, len(explained), 11)]
    regular = [layer for layer in layers if layer[7]]
    assert [layer[7] for layer in regular] == [b"6", b"5"]
    assert regular[0][8] == b"1000000001"
    cowfs("rollback", store, "first", check=True)
    cowfs("checkpoint", "--delete", store, "first", check=True)
    assert fields("vacuum", "-n", store, "-z")[2::3] == [ODD + b"2"]
    assert fields("revert", "-n", store, os.fsdecode(ODD), "-z") == [b"M", ODD]
    assert fields("revert", store, os.fsdecode(ODD), "-z") == [ODD, b""]
    assert cowfs("du", store, "-z", "--json").returncode == 1
