"""SIGKILL during writes to a large file and its copy-up in the background; then compare after a mount."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.crash.test_crash import clear_away, in_use, rounds
from tests.support import tree
from tests.support.mounts import cowfs, eventually, mounted
from tests.support.system import NOBODY, as_nobody_prefix, needs_fuse, needs_root, run
from tests.support.tree import Node

pytestmark = [needs_fuse, needs_root, pytest.mark.crash, pytest.mark.timeout(180)]

MIB = 1 << 20
BIG = b"".join(number.to_bytes(8, "big") + random.Random(7).randbytes(MIB - 8) for number in range(66))
WRITER = """
import os, random, sys, time
path, seed, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
chance = random.Random(seed)
fd = os.open(path, os.O_RDWR)
try:
    for number in range(1_000_000):
        data = chance.randbytes(chance.choice([1, 100, 4096, 70_000]))
        os.pwrite(fd, data, chance.randrange(size))
        if chance.random() < 0.05:
            os.fsync(fd)
        print(number, flush=True)
        time.sleep(0.005)
except OSError:
    pass
"""


def replay(model: bytearray, chance: random.Random) -> tuple[int, bytes]:
    """Do the writer's next step on the model; return the data that it overwrites."""
    data = chance.randbytes(chance.choice([1, 100, 4096, 70_000]))
    at = chance.randrange(len(BIG))
    chance.random()
    model.extend(bytes(max(at + len(data) - len(model), 0)))
    before = bytes(model[at : at + len(data)])
    model[at : at + len(data)] = data
    return at, before


@pytest.mark.parametrize("nobody", [False, True], ids=["root", "nobody"])
@pytest.mark.parametrize("seed", rounds(1))
def test_killed_while_it_is_copied_up(tmp_path: Path, nobody_path: Path, seed: int, nobody: bool) -> None:
    """Written data is there, the rest is the lower's, and the next mount copies the rest up."""
    base = nobody_path if nobody else tmp_path
    uid = NOBODY if nobody else 0
    tree.build(base / "lower", {"big": Node(data=BIG, uid=uid, gid=uid)})
    if nobody:
        run("chown", "-R", f"{NOBODY}:{NOBODY}", base)
    store, prefix = base / "store.bs", as_nobody_prefix() if nobody else []
    cowfs("create", store, "160", nobody=nobody, check=True)
    acknowledged = -1
    with mounted(base / "lower", base / "mnt", store, nobody=nobody, quiet=False) as mount:
        pid = mount.pid()
        path = mount.path / "big"
        command = [*prefix, sys.executable, "-S", "-c", WRITER, str(path), str(seed), str(len(BIG))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
            assert child.stdout
            child.stdout.readline()
            acknowledged = 0
            end = time.monotonic() + random.Random(seed).uniform(1.8, 4.5)  # copying starts after 2 s
            for line in child.stdout:
                acknowledged = int(line)
                if time.monotonic() > end:
                    os.kill(pid, signal.SIGKILL)
                    end += 100
            child.wait(30)
        clear_away(mount)
    eventually(lambda: not in_use(store), "the kernel lets go of the image")
    model, chance = bytearray(BIG), random.Random(seed)
    for _ in range(acknowledged + 1):
        replay(model, chance)
    old = bytes(model)
    replay(model, chance)
    log = base / "again.log"
    with mounted(base / "lower", base / "mnt", store, nobody=nobody, log=log) as mount:

        def content() -> bytes:
            command: list[str | Path] = [*prefix, "cat", mount.path / "big"]
            return subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=60).stdout

        def whole() -> bool:
            return '"files": 0' in cowfs("info", mount.path, "--json", nobody=nobody, check=True).stdout

        compare(content(), old, bytes(model))
        eventually(whole, "the rest is copied up", 60)
        compare(content(), old, bytes(model))
    assert run("e2fsck", "-fn", store, check=False).returncode == 0


def compare(found: bytes, old: bytes, new: bytes) -> None:
    """The file has all acknowledged writes, and perhaps all or part of the next one."""
    assert len(found) in {len(old), len(new)} or len(old) < len(found) < len(new)
    for at in range(0, len(found), 4096):
        here = found[at : at + 4096]
        if here not in {old[at : at + 4096], new[at : at + 4096]}:
            for byte, value in enumerate(here, at):
                assert value in {*old[byte : byte + 1], *new[byte : byte + 1]}, f"byte {byte} of {len(found)}"
