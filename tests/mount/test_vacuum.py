"""`cowfs vacuum`: what says nothing is removed, mounted and not, and nothing that is seen changes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from pathlib import Path

import pytest

from cowfs.api import take_back
from tests.mount.test_diff_patch import random_work, script
from tests.mount.test_revert import KINDS, MAKE, WORK, lower_of, refused, reverted, tree
from tests.support.mounts import COWFS, cowfs, make_store, mounted, project_root
from tests.support.system import needs_fuse

DEV_FUSE_AT_NIGHT = True

pytestmark = needs_fuse


@KINDS
def test_vacuum_removes_what_says_nothing(tmp_path: Path, kind: str) -> None:
    lower, store = lower_of(tmp_path, kind), make_store(tmp_path, kind)
    with mounted(lower, tmp_path / "mnt", store) as here:
        script(
            "chmod 600 etc/fstab; chmod 644 etc/fstab; cp -p usr/tool t; rm usr/tool; mv t usr/tool",
            here.path,
        )
        script("echo x >>script; mkdir usr/d; rmdir usr/d; touch -d 2019-05-05 usr", here.path)
        script("ln old/g etc/linked; ln -P etc/link etc/second", here.path)  # unchanged, but with more names
        os.utime(here.path / "usr/tool", ns=(0, (tmp_path / "lower/usr/tool").stat().st_mtime_ns))
        seen = tree(here.path)
    upper = {"D", "M", "A"}
    before = store.read_bytes() if store.is_file() else b""
    dry = cowfs("vacuum", store, "--dry-run")
    assert before == (store.read_bytes() if store.is_file() else b"")
    done = cowfs("vacuum", store)
    assert (done.returncode, done.stdout) == (0, dry.stdout), done.stderr
    removed = {line.split(maxsplit=1)[1] for line in done.stdout.splitlines()}
    assert {"etc/fstab", "usr/tool"} <= removed, done.stdout
    assert "script" not in removed
    with mounted(lower, tmp_path / "mnt", store) as here:
        assert tree(here.path) == seen
        assert cowfs("vacuum", here.path).stdout == ""
        assert {line[0] for line in cowfs("diff", here.path).stdout.splitlines()} <= upper


@pytest.mark.crash
@pytest.mark.parametrize(
    "seed", [1, 2, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(3, 103))]
)
def test_vacuum_killed_in_the_middle(tmp_path: Path, seed: int) -> None:
    """Nothing that is seen changes: of a mount the daemon is killed, of a store the command."""
    rng = random.Random(seed)
    script(MAKE.replace("mkfifo pipe", "touch pipe"), tmp_path)
    store = make_store(tmp_path, "image" if seed % 2 else "directory")
    lower, mnt = tmp_path / "lower", tmp_path / "mnt"
    needless = (
        'find . -type f | while read -r f; do m=$(stat -c %a "$f"); chmod 600 "$f"; chmod $m "$f"; done\n'
        'find . -type d | while read -r d; do touch -r "$d" /tmp/$$; mkdir "$d/.x"; rmdir "$d/.x";'
        ' touch -r /tmp/$$ "$d"; done; rm /tmp/$$'
    )
    with mounted(lower, mnt, store, quiet=False) as here:
        script(needless, here.path)
        script(WORK, here.path)
        random_work(here.path, seed, 20)
        changed = tree(here.path)
        is_mount = seed % 4 < 2
        if not is_mount:
            cowfs("umount", here.path, check=True)
        with subprocess.Popen(
            [*COWFS, "vacuum", here.path if is_mount else store, "--json"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": project_root(), "PYTHONUNBUFFERED": "1"},
        ) as process:  # fmt: skip
            assert process.stdout is not None
            for _ in range(rng.randrange(0, 25)):
                process.stdout.readline()
            os.kill(here.pid() if is_mount else process.pid, signal.SIGKILL)
            process.stdout.read()
        if is_mount:
            cowfs("umount", here.path, check=True)
        cowfs("mount", lower, mnt, "--store", store, check=True)
        assert tree(here.path) == changed
        removed = cowfs("vacuum", here.path, "--json", check=True).stdout.splitlines()
        assert all(json.loads(line)["version"] == 1 for line in removed)
        assert tree(here.path) == changed
        assert cowfs("vacuum", here.path, "--json", check=True).stdout == ""


def test_vacuum_leaves_what_is_in_use(tmp_path: Path) -> None:
    script(MAKE, tmp_path)
    with mounted(tmp_path / "lower", tmp_path / "mnt", tmp_path / "store") as here:
        script("chmod 600 etc/fstab; chmod 644 etc/fstab", here.path)
        with (here.path / "etc/fstab").open("rb") as file:
            number = os.fstat(file.fileno()).st_ino
            cowfs("vacuum", here.path, check=True)
            assert os.fstat(file.fileno()).st_ino == number == (here.path / "etc/fstab").stat().st_ino
            assert file.read() == (tmp_path / "lower/etc/fstab").read_bytes()
        assert "etc/fstab" in cowfs("vacuum", here.path).stdout


def test_the_trash_is_emptied(tmp_path: Path) -> None:
    script(MAKE, tmp_path)
    store = tmp_path / "store"
    seen: list[tuple[int, int]] = []
    with mounted(tmp_path / "lower", tmp_path / "mnt", store) as here:
        script(WORK, here.path)
        reverted(here.path, "--all")
        kept = list((store / "cowfs/trash/1").rglob("*"))
        assert list(take_back(str(here.path), "trash", tick=lambda *counts: seen.append(counts))) == []
        assert seen == [(0, len(kept))]
        assert list((store / "cowfs/trash").iterdir()) == []
        refused(here.path, "--undo", code=32, word="nothing was reverted")
