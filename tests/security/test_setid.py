"""Root's mounts make nobody root: no set-user-ID programs and no devices from what others can change."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cowfs.linux.trust import who_can_change
from tests.support.mounts import Mounted, cowfs, is_mounted, mounted
from tests.support.squashfs import mksquashfs, needs_mksquashfs
from tests.support.system import NOBODY, as_nobody_prefix, needs_fuse, needs_root, run

pytestmark = [needs_fuse, needs_root]


@pytest.fixture
def tree(roots: Path) -> Path:
    """Make a set-ID program and a device, as an attacker can in a user namespace or with a tool."""
    made = roots / "tree"
    made.mkdir()
    shutil.copy("/usr/bin/id", made / "id")
    (made / "id").chmod(0o4755)
    os.mknod(made / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    return made


def becomes_root(here: Mounted) -> bool:
    return run(*as_nobody_prefix(), here.path / "id", "-u").stdout == "0\n"


def opens_device(here: Mounted) -> bool:
    done = subprocess.run([*as_nobody_prefix(), "head", "-c1", here.path / "zero"], capture_output=True)
    return done.returncode == 0


def theirs(path: Path) -> Path:
    os.chown(path, NOBODY, NOBODY)
    return path


def image(tree: Path, at: Path) -> Path:
    mksquashfs(at, tree)
    at.chmod(0o644)
    return at


def writable(path: Path) -> Path:
    path.chmod(0o666)
    return path


def by_a_link(path: Path, nobody_path: Path) -> Path:
    link = nobody_path / "link"
    link.symlink_to(path)
    return link


LOWERS: dict[str, Callable[[Path, Path, Path], Path]] = {
    "a user's image": lambda tree, roots, _: theirs(image(tree, roots / "image")),
    "an image that users can write to": lambda tree, roots, _: writable(image(tree, roots / "image")),
    "an image in a user's directory": lambda tree, _, users: image(tree, users / "image"),
    "an image behind a user's link": lambda tree, roots, users: by_a_link(image(tree, roots / "i"), users),
    "a user's directory": lambda tree, *_: theirs(tree),
}


@needs_mksquashfs
@pytest.mark.parametrize("which", LOWERS)
def test_a_lower_that_others_can_change(roots: Path, nobody_path: Path, tree: Path, which: str) -> None:
    lower = LOWERS[which](tree, roots, nobody_path)
    mountpoint = roots / "mnt"
    mountpoint.mkdir()
    with mounted(lower, mountpoint) as here:
        assert not becomes_root(here) and not opens_device(here)
        assert "mounted with nosuid,nodev: " in here.said and "-o suid,dev if you trust it" in here.said
    with mounted(lower, mountpoint, options=["suid", "dev"]) as here:
        assert becomes_root(here) and opens_device(here), "or the test shows nothing"
        assert "nosuid" not in here.said


@needs_mksquashfs
@pytest.mark.parametrize("kind", ["image", "directory"])
def test_layers_that_are_roots_alone(roots: Path, tree: Path, kind: str) -> None:
    """Set-ID programs and devices work, as with mount(8)."""
    lower = tree if kind == "directory" else image(tree, roots / "image")
    with mounted(lower, roots / "mnt") as here:
        assert becomes_root(here) and opens_device(here)
    with mounted(lower, roots / "mnt", options=["nosuid"]) as here:
        assert not becomes_root(here) and opens_device(here)


def test_a_store_that_others_can_change(roots: Path, nobody_path: Path, tree: Path) -> None:
    """A set-ID program of root's in an image that a user has made with any tool they like."""
    store = nobody_path / "store.bs"
    assert cowfs("create", store, "16").returncode == 0
    with mounted(tree, roots / "mnt", store, options=["suid", "dev"]) as here:
        shutil.copy("/usr/bin/id", here.path / "id")
        (here.path / "id").chmod(0o4755)
    theirs(store)
    for engine in ("process", "kernel"):
        with mounted(tree, roots / "mnt", store, engine=engine) as here:
            assert not becomes_root(here) and not opens_device(here)


@pytest.mark.parametrize("why", ["a user's", "writable by all"])
def test_a_directory_store_of_others(roots: Path, nobody_path: Path, tree: Path, why: str) -> None:
    """The store is refused: its owner can forge owner notes, and change it under the daemon."""
    store = nobody_path / "store"
    mountpoint = nobody_path / "mnt"
    mountpoint.mkdir()
    os.chown(mountpoint, NOBODY, NOBODY)
    with mounted(tree, mountpoint, store, nobody=why == "a user's"):
        pass
    if why != "a user's":
        store.chmod(0o777)
    done = cowfs("mount", tree, mountpoint, "--store", store)
    assert done.returncode == 32 and done.stderr.count("\n") == 1
    assert (
        "belongs to another user (uid 65534)" if why == "a user's" else "other users can write to"
    ) in done.stderr
    assert not is_mounted(mountpoint)


def test_new_directory_stores_are_closed_to_others(roots: Path, tree: Path) -> None:
    with mounted(tree, roots / "mnt", roots / "store"):
        assert stat.S_IMODE((roots / "store").stat().st_mode) == 0o700


@pytest.mark.parametrize("how", ["append", "truncate", "truncate at once"])
def test_a_program_that_a_user_has_written_to(roots: Path, tree: Path, how: str) -> None:
    """Is the user's, although nobody has asked for its mode since."""
    (tree / "id").chmod(0o6777)
    content = Path("/usr/bin/id").read_bytes()
    script = {
        "append": "os.write(os.open(path, os.O_WRONLY | os.O_APPEND), b'x')",
        "truncate": f"os.truncate(path, {len(content)})",
        "truncate at once": "os.open(path, os.O_WRONLY | os.O_TRUNC)",
    }[how]
    with mounted(tree, roots / "mnt", roots / "store", options=["allow_other"]) as here:
        path = here.path / "id"
        assert becomes_root(here), "or the test shows nothing"
        writing = run(*as_nobody_prefix(), sys.executable, "-c", f"import os; path = {str(path)!r}; {script}")
        if how == "truncate at once":
            path.write_bytes(content)  # by root, who takes nothing
        assert not writing.stderr and not becomes_root(here)


def test_a_filesystem_that_is_mounted_nosuid_or_nodev(roots: Path, tree: Path) -> None:
    """The union does not allow what the filesystem of a layer forbids."""
    other = roots / "other"
    other.mkdir()
    for option in ("nosuid", "nodev"):
        run("mount", "-t", "tmpfs", "-o", f"mode=755,{option}", "tmpfs", other)
        try:
            run("cp", "-a", tree, other / "tree")
            with mounted(other / "tree", roots / "mnt") as here:
                assert (becomes_root(here), opens_device(here)) == (option == "nodev", option == "nosuid")
        finally:
            run("umount", other)


def test_who_can_change(roots: Path, nobody_path: Path) -> None:
    (roots / "file").touch()
    (roots / "deep/er").mkdir(parents=True)
    (roots / "deep/er/up").symlink_to("../../file")
    (roots / "away").symlink_to(nobody_path / "file")
    (nobody_path / "file").touch()
    assert who_can_change(str(roots / "file")) is None
    assert who_can_change(str(roots / "deep/er/up")) is None
    assert who_can_change(str(roots / "deep/../file")) is None
    assert who_can_change(str(roots / "away")) == f"{nobody_path} belongs to uid 65534"
    (roots / "file").chmod(0o664)
    assert who_can_change(str(roots / "deep/er/up")) == f"{roots}/file is writable by users other than root"
    (roots / "file").chmod(0o644)
    run("setfacl", "-m", "u:nobody:rw", roots / "file")
    assert who_can_change(str(roots / "file")) is not None
    (roots / "loop").symlink_to("loop")
    with pytest.raises(OSError):
        who_can_change(str(roots / "loop"))
