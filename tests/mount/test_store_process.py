"""A store that is an image, mounted by a user without any privilege; then looked at by the kernel."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from cowfs.linux import safe_paths
from tests.support import tree
from tests.support.mounts import (
    KERNEL_OPTIONS,
    Mounted,
    cowfs,
    eventually,
    is_mounted,
    mounted,
    project_root,
)
from tests.support.system import NOBODY, as_nobody_prefix, needs_fuse, needs_root, run
from tests.support.tree import Node, link, symlink

DEV_FUSE_AT_NIGHT = True
pytestmark = needs_fuse

LOWER: tree.Tree = {
    "etc/hosts": b"127.0.0.1 localhost\n",
    "etc/passwd": b"root:x:0:0::/root:/bin/sh\n",
    "usr/bin/tool": Node(data=b"#!/bin/sh\necho tool\n", mode=0o755),
    "usr/lib/big": Node(data=b"library" * 100_000),
    "usr/lib/alias": link("usr/lib/big"),
    "usr/lib/link": symlink("big"),
    "sparse": Node(data=b"begin", size=64 << 20),
    "dressed": Node(data=b"d", xattrs={"user.color": b"red"}),
    **{f"many/{number}": b"x" * number for number in range(200)},
}
WORK = r"""
echo more >> etc/hosts
rm etc/passwd
mv usr user
chmod 700 user/bin/tool
rm -r many
mkdir many && echo new > many/5
ln user/lib/big hard
echo more >> hard
truncate -s 100M sparse && printf end >> sparse
mkfifo pipe
mkdir unpacked && tar -C "$TREE" -S -cf - . | tar -C unpacked -xf -
rm -r unpacked/many
git init -q repository
cd repository
git -c user.name=n -c user.email=e commit -q --allow-empty -m first
cp -r ../unpacked/usr .
git add -A && git -c user.name=n -c user.email=e commit -q -m second
git gc -q
git fsck --strict
"""
LOOK = r"""
test "$(tail -n 1 etc/hosts)" = more
test ! -e etc/passwd
test "$(stat -c %i hard)" = "$(stat -c %i user/lib/big)"
test "$(stat -c %h hard)" = 3
test "$(tail -c 5 user/lib/alias)" = more
test "$(ls many)" = 5
test "$(tail -c 3 sparse)" = end
test "$(stat -c %b sparse)" -lt 1000
test "$(user/bin/tool)" = tool
cd repository
git fsck --strict
test -z "$(git status --porcelain)"
"""


@pytest.fixture
def base(nobody_path: Path) -> Iterator[Path]:
    """A tree and its image, all of them nobody's, and a store of nobody's own making."""
    tree.build(nobody_path / "tree", LOWER)
    if os.geteuid() == 0:
        run("chown", "-R", f"{NOBODY}:{NOBODY}", nobody_path)
    prefix = as_nobody_prefix()
    run(*prefix, "mksquashfs", nobody_path / "tree", nobody_path / "root.sqsh", "-quiet", "-no-progress")
    cowfs("create", nobody_path / "sysrcd.bs", "64", nobody=True, check=True)
    yield nobody_path
    run("e2fsck", "-fn", nobody_path / "sysrcd.bs")


def script(text: str, mount: Mounted, base: Path) -> str:
    more = {"TREE": str(base / "tree"), "HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1"}
    command: list[str | Path] = ["sh", "-euc", f'cd "$1"\n{text}', "sh", mount.path]
    return run(*as_nobody_prefix(), *command, env={**os.environ, **more}).stdout


def seen(mount: Mounted) -> tree.Snapshot:
    """The tree as its user sees it: nobody else may look into his mount."""
    child = "import json, sys; from tests.support import tree; print(json.dumps(tree.snapshot(sys.argv[1])))"
    command: list[str | Path] = [sys.executable, "-c", child, mount.path]
    said = run(*as_nobody_prefix(), *command, env={**os.environ, "PYTHONPATH": project_root()}).stdout
    result: tree.Snapshot = json.loads(said)
    return result


def mount(base: Path, name: str = "mnt") -> AbstractContextManager[Mounted]:
    return mounted(base / "root.sqsh", base / name, base / "sysrcd.bs", nobody=True)


def test_a_user_works_on_an_image_of_his_own(base: Path) -> None:
    with mount(base) as here:
        script(WORK, here, base)
        script(LOOK, here, base)
        before = seen(here)
    with mount(base) as here:
        again = seen(here)
        assert tree.differences(tree.stable(before), tree.stable(again)) == []
        assert tree.moved_inodes(before, again) == []
        script(LOOK, here, base)
    said = cowfs("check", base / "sysrcd.bs", nobody=True)
    assert said.returncode == 0, said.stdout + said.stderr


@needs_root
def test_the_kernel_shows_the_same_tree(base: Path) -> None:
    with mount(base) as here:
        script(WORK, here, base)
        ours = seen(here)
    lower, store, merged = (base / name for name in ("lower", "store", "merged"))
    for path in (lower, store, merged):
        path.mkdir()
    run("mount", "-o", "loop,ro", base / "root.sqsh", lower)
    run("mount", "-t", "ext3", "-o", "loop", base / "sysrcd.bs", store)
    try:
        options = f"lowerdir={lower},upperdir={store}/upper,workdir={store}/work,{KERNEL_OPTIONS}"
        run("mount", "-t", "overlay", "-o", options, "overlay", merged)
        try:
            theirs = tree.snapshot(merged)
            (merged / "theirs").write_text("theirs")
            (merged / "etc/hosts").unlink()
        finally:
            run("umount", merged)
        assert {(store / name).lstat().st_uid for name in ("cowfs/header.json", "work", "work/work")} == {0}
    finally:
        run("umount", store)
        run("umount", lower)
    ignore = ("ino", "same_dev", "d_ino")
    assert tree.differences(tree.stable(ours, ignore=ignore), tree.stable(theirs, ignore=ignore)) == []
    with mount(base) as here:
        script("test $(cat theirs) = theirs && test ! -e etc/hosts", here, base)


def test_what_was_synced_survives_a_kill(base: Path) -> None:
    with mounted(base / "root.sqsh", base / "mnt", base / "sysrcd.bs", nobody=True, quiet=False) as here:
        script("echo kept > kept && sync kept", here, base)
        os.kill(here.pid(), signal.SIGKILL)
        cowfs("umount", here.path, nobody=True)
        eventually(lambda: not is_mounted(here.path), "the dead mount is gone")
    with mount(base) as here:
        script("test $(cat kept) = kept", here, base)


def test_a_second_mount_is_refused(base: Path) -> None:
    with mount(base):
        (base / "other").mkdir()
        os.chown(base / "other", NOBODY, NOBODY)
        done = cowfs("mount", base / "root.sqsh", base / "other", "--store", base / "sysrcd.bs", nobody=True)
        assert done.returncode == 32
        assert "in use by process" in done.stderr
        assert not safe_paths.loop_users(base / "sysrcd.bs")


def test_a_full_store_says_so(base: Path) -> None:
    with mount(base) as here:
        done = subprocess.run(
            [*as_nobody_prefix(), "dd", "if=/dev/zero", f"of={here.path}/big", "bs=1M", "count=100"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "No space left on device" in done.stderr
        script("rm big && echo fits > fits", here, base)
    with mount(base) as here:
        script("test $(cat fits) = fits", here, base)


def test_a_store_in_memory(base: Path) -> None:
    """Has real owners, devices and whiteouts too, and a size."""
    with mounted(base / "root.sqsh", base / "mnt", "memory", nobody=True, options=["size=100M"]) as here:
        script(WORK, here, base)
        script(LOOK, here, base)
        room = int(script("echo $(($(stat -f -c '%b * %S' .)))", here, base))
        assert 80 << 20 < room <= 100 << 20
        script("test -p pipe", here, base)
