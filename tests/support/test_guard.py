"""The guard reports what a test leaves behind, and removes it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.support import guard, tree
from tests.support.system import needs_root, run


def test_nothing(surroundings: guard.Guard) -> None:
    assert guard.Guard(surroundings.mark, surroundings.below).left_behind(0) == []


def test_a_process(surroundings: guard.Guard) -> None:
    watch = guard.Guard(surroundings.mark, surroundings.below)
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as left:
        assert f"process {left.pid}: sleep 600" in watch.left_behind(0.1)
        assert left.wait(10) != 0


@needs_root
def test_a_mount_and_its_loop_device(surroundings: guard.Guard, tmp_path: Path) -> None:
    image, at = tmp_path / "image", tmp_path / "m t"
    with image.open("wb") as out:
        out.truncate(1 << 20)
    run("mke2fs", "-q", image)
    at.mkdir()
    watch = guard.Guard(surroundings.mark, surroundings.below)
    run("mount", "-o", "loop", image, at)
    left = watch.left_behind(0.1)
    assert any(line.startswith("mount") and "m\\040t" in line for line in left), left
    assert any(line.startswith("loop device") and str(image) in line for line in left), left
    assert not os.path.ismount(at)
    assert guard.Guard(surroundings.mark, surroundings.below).left_behind(0) == []


def test_snapshots_show_each_kind_of_change(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    contents: tree.Tree = {"d/a": b"a", "b": tree.link("d/a"), "s": tree.symlink("x"), "x": b"12"}
    for place in (one, two):
        tree.build(place, contents)

    def differs() -> str:
        return " ".join(tree.differences(tree.stable(tree.snapshot(one)), tree.stable(tree.snapshot(two))))

    assert differs() == ""
    os.utime(two / "x")
    assert "'x': mtime" in differs()
    (two / "d/a").chmod(0o600)
    assert "'b': mode" in differs() and "'d/a': mode" in differs()
    (two / "x").write_bytes(b"21")
    assert "'x': content" in differs()
    (two / "b").unlink()
    assert "'b': only in left" in differs() and "'d/a': nlink" in differs()
    (two / "s").unlink()
    os.symlink("y", two / "s")
    assert "'s': target" in differs()
    os.setxattr(two / "d", "user.x", b"1")
    assert "'d': xattrs" in differs()
