"""A command of `cowfs run` reaches nothing of the system beside the merged tree, nor do other users by it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from cowfs.cli.sandbox import Part, forget_unused
from tests.support.mounts import cowfs, force_umount
from tests.support.system import NOBODY, makes_user_namespaces, needs_fuse, needs_root, run

pytestmark = [needs_fuse, needs_root]
_ATTEMPTS = """
for process in $(grep -la cowfs /proc/[0-9]*/cmdline 2>/dev/null); do
    process=${process%/cmdline}
    echo evil 2>/dev/null >>$process/root$0
    nsenter --mount=$process/ns/mnt sh -c "echo evil >>$0" 2>/dev/null
    test $process = /proc/$$ || cat $process/environ $process/maps 2>/dev/null
done
echo evil >>$0; cat $0
"""


def test_a_users_command_does_not_find_the_system(nobody_path: Path) -> None:
    """The processes that serve it see the system, and are the same user's."""
    if not makes_user_namespaces():
        pytest.skip("needs user namespaces")
    victim = nobody_path / "victim"
    victim.write_text("good\n")
    victim.chmod(0o666)
    done = cowfs("run", "--root", "/", "--discard", "--", "sh", "-c", _ATTEMPTS, victim, nobody=True)
    assert (done.returncode, set(done.stdout.split())) == (0, {"good", "evil"}), done
    assert victim.read_text() == "good\n"


def test_an_unused_store_is_removed_where_it_was_made(nobody_path: Path, tmp_path: Path) -> None:
    """Who owns the directory above has put a link to a directory of root's there meanwhile."""
    (tmp_path / "boot").mkdir()
    (tmp_path / "boot/kernel").touch()
    (nobody_path / "store.mounts").symlink_to(tmp_path)
    os.chown(nobody_path / "store.mounts", NOBODY, NOBODY, follow_symlinks=False)
    parts = [Part("/", "/", b"", str(nobody_path / "store"), is_new=True)]
    parts.append(Part("/boot", "/boot", b"boot", str(nobody_path / "store.mounts/boot"), is_new=True))
    forget_unused(parts, set())
    assert (tmp_path / "boot/kernel").exists()
    (nobody_path / "store.mounts").unlink()
    (nobody_path / "store.mounts/boot/upper").mkdir(parents=True)
    forget_unused(parts, set())
    assert not (nobody_path / "store.mounts").exists()


_MOUNT = """
import ctypes, os, sys
mounted = ctypes.CDLL(None).mount(b"x", os.fsencode(sys.argv[1]), b"fuse.x", 0, sys.argv[2].encode())
sys.exit(mounted)
"""
_REMOVE = """
import sys, tempfile
from cowfs.cli import run
tempfile.tempdir = sys.argv[1]
run._remove_abandoned()
"""


def test_what_seems_abandoned_is_not_waited_for(nobody_path: Path) -> None:
    """Another user's filesystem is mounted in /tmp at a name of ours, and does not answer."""
    for name in ("left/root", "mounted"):
        (nobody_path / f"cowfs-run-{name}").mkdir(parents=True)
    at = nobody_path / "cowfs-run-mounted"
    fd = os.open("/dev/fuse", os.O_RDWR)
    try:
        options = f"fd={fd},rootmode=40755,user_id={NOBODY},group_id={NOBODY},allow_other"
        run(sys.executable, "-c", _MOUNT, at, options, pass_fds=(fd,))
        run(sys.executable, "-c", _REMOVE, nobody_path, timeout=30)
    finally:
        os.close(fd)
        force_umount(at)
    assert os.listdir(nobody_path) == ["cowfs-run-mounted"]
