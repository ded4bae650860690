"""mount(8), umount(8) and /etc/fstab know cowfs by the helpers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import tree
from tests.support.mounts import COWFS, is_mounted, project_root
from tests.support.system import needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True

pytestmark = [needs_fuse, needs_root]

HELPERS = Path(project_root()) / "mount-helpers"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A lower, a mountpoint, and the helpers where mount(8) looks for them."""
    tree.build(tmp_path / "lower", {"file": b"x\n", "dir/y": b"y\n"})
    (tmp_path / "mnt").mkdir()
    sbin = tmp_path / "sbin"
    sbin.mkdir()
    for helper, names in (
        ("mount.cowfs", ("mount.cowfs",)),
        ("umount.cowfs", ("umount.cowfs", "umount.fuse.cowfs")),
    ):
        if not (HELPERS / helper).exists():
            pytest.skip(f"no {helper} yet")
        for name in names:
            os.symlink(HELPERS / helper, sbin / name)
    # The helpers take the cowfs of their own place, or else the one on the path: this.
    command = sbin / "cowfs"
    command.write_text(f'#!/bin/sh\nPYTHONPATH={project_root()} exec {" ".join(COWFS)} "$@"\n')
    command.chmod(0o755)
    return tmp_path


def with_helpers(base: Path, commands: str, fstab: str = "") -> str:
    """Run shell commands in a namespace where the helpers are in /sbin and /etc/fstab is *fstab*."""
    (base / "fstab").write_text(fstab)
    setup = f"""
        mount -t overlay -o lowerdir={base}/sbin:/usr/sbin none /usr/sbin
        mount --bind {base}/fstab /etc/fstab
        cd {base}
    """
    return run("unshare", "-m", "--propagation", "private", "sh", "-euc", setup + commands).stdout


LOOK = """
    test "$(cat mnt/file)" = changed
    test "$(findmnt -n -o FSTYPE -M "$PWD/mnt")" = fuse.cowfs
"""


def test_mount_and_umount(base: Path) -> None:
    with_helpers(
        base,
        f"""
        mount -t cowfs -o store={base}/store,log={base}/log lower mnt
        echo changed > mnt/file
        {LOOK}
        umount mnt
        ! mountpoint -q mnt
        mount -t cowfs -o store={base}/store,ro lower mnt
        {LOOK}
        ! touch mnt/x 2>/dev/null
        umount mnt
        """,
    )
    assert not is_mounted(base / "mnt")


def test_fstab(base: Path) -> None:
    """By its line in fstab, by mount -a, and not twice by mount -a."""
    line = f"{base}/lower {base}/mnt cowfs store={base}/store,nofail,x-systemd.requires=x,_netdev 0 0\n"
    with_helpers(
        base,
        f"""
        mount mnt
        echo changed > mnt/file
        umount mnt
        mount -a
        {LOOK}
        mount -a
        test "$(grep -c " $PWD/mnt " /proc/self/mountinfo)" = 1
        umount {base}/mnt
        """,
        fstab=line,
    )


def test_umount_waits_for_the_store(base: Path) -> None:
    """When umount(8) returns, the store is free: it can be mounted at once, again and again."""
    with_helpers(
        base,
        f"""
        for number in 1 2 3; do
            mount -t cowfs -o store={base}/store lower mnt
            echo $number >> mnt/count
            umount mnt
        done
        mount -t cowfs -o store={base}/store lower mnt
        test "$(wc -l < mnt/count)" = 3
        umount mnt
        """,
    )


def test_exit_code_and_message(base: Path) -> None:
    said = with_helpers(
        base,
        f"""
        code=0; mount -t cowfs -o store={base}/store missing mnt 2>&1 || code=$?
        echo "code $code"
        code=0; mount -t cowfs -o stroe=x lower mnt 2>&1 || code=$?
        echo "code $code"
        mount -t cowfs -s -o stroe=x,store={base}/store lower mnt
        umount mnt
        """,
    )
    lines = said.splitlines()
    assert "missing" in lines[0] and lines[1] == "code 32"
    assert "stroe" in lines[2] and lines[3] == "code 1"


def test_a_dry_run_mounts_nothing(base: Path) -> None:
    with_helpers(base, f"mount -f -t cowfs -o store={base}/store lower mnt; ! mountpoint -q mnt")
    assert not (base / "store").exists()
