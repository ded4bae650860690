"""What chattr(1) has made immutable or append-only stays so: in a lower, in the store, after a copy-up."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cowfs.linux import inode_flags
from cowfs.linux.inode_flags import APPEND, IMMUTABLE
from tests.support.mounts import Mounted, cowfs, kernel_overlay, mounted
from tests.support.system import as_nobody_prefix, needs_fuse, needs_root, run

pytestmark = [needs_fuse, needs_root]
DEV_FUSE_AT_NIGHT = True
EITHER = IMMUTABLE | APPEND


def flags_of(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        return inode_flags.get(fd) & EITHER
    finally:
        os.close(fd)


def protect(path: Path, flags: int) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        inode_flags.put(fd, inode_flags.get(fd) & ~EITHER | flags)
    finally:
        os.close(fd)


def fill(tree: Path) -> None:
    """A file and a directory of each kind, and one that is as others."""
    for name in ("i", "a"):
        (tree / f"file-{name}").write_bytes(b"x" * 100_000)
        (tree / f"dir-{name}" / "sub").mkdir(parents=True)
        (tree / f"dir-{name}" / "inside").write_text("inside")
    (tree / "plain").write_text("plain")


PROTECTED = {"file-i": IMMUTABLE, "file-a": APPEND, "dir-i": IMMUTABLE, "dir-a": APPEND}


@pytest.fixture
def lower(nobody_path: Path) -> Iterator[Path]:
    """A directory with such things."""
    tree = nobody_path / "lower"
    tree.mkdir()
    fill(tree)
    try:
        try:
            for name, flags in PROTECTED.items():
                protect(tree / name, flags)
        except OSError as error:
            pytest.skip(f"needs a filesystem with the flags of chattr(1): {error.strerror}")
        yield tree
    finally:
        for path in tree.iterdir():
            if flags_of(path):
                protect(path, 0)


@pytest.fixture(params=["process", "kernel", "directory"])
def mount(request: pytest.FixtureRequest, lower: Path, nobody_path: Path) -> Iterator[Mounted]:
    engine = None if request.param == "directory" else request.param
    if engine:
        cowfs("create", nobody_path / "store", "64", check=True)
    with mounted(lower, nobody_path / "mnt", nobody_path / "store", engine=engine) as made:
        (made.path / "own").mkdir()
        fill(made.path / "own")
        for name, flags in PROTECTED.items():
            protect(made.path / "own" / name, flags)
        yield made


def write(path: Path, flags: int) -> None:
    fd = os.open(path, os.O_WRONLY | flags)
    with closing(os.fdopen(fd, "wb", buffering=0)) as file:
        file.write(b"y")


BY_BOTH: dict[str, Callable[[Path], object]] = {
    "write": lambda path: write(path, 0),
    "open to truncate": lambda path: write(path, os.O_TRUNC),
    "truncate": lambda path: os.truncate(path, 10),
    "chmod": lambda path: path.chmod(0o600),
    "chown": lambda path: os.chown(path, 5, 5),
    "utime": lambda path: os.utime(path, (5, 5)),
    "setxattr": lambda path: os.setxattr(path, "user.x", b""),
    "removexattr": lambda path: os.removexattr(path, "user.x"),
    "link": lambda path: os.link(path, path.with_name("linked")),
    "rename": lambda path: path.rename(path.with_name("renamed")),
    "replace": lambda path: (path.parent / "plain").rename(path),
    "unlink": lambda path: path.unlink(),
}
APPENDS: dict[str, Callable[[Path], object]] = {
    "append": lambda path: write(path, os.O_APPEND),
    "touch": os.utime,
}
REMOVES: dict[str, Callable[[Path], object]] = {
    "unlink": lambda path: (path / "inside").unlink(),
    "rmdir": lambda path: (path / "sub").rmdir(),
    "rename": lambda path: (path / "inside").rename(path.parent / "outside"),
    "chmod": lambda path: path.chmod(0o700),
    "move": lambda path: path.rename(path.with_name("moved")),
}
ADDS: dict[str, Callable[[Path], object]] = {
    "create": lambda path: (path / "new").touch(),
    "mkdir": lambda path: (path / "newdir").mkdir(),
    "symlink": lambda path: (path / "newlink").symlink_to("x"),
    "mkfifo": lambda path: os.mkfifo(path / "newfifo"),
    "link": lambda path: os.link(path.parent / "plain", path / "newname"),
}


def refused(what: dict[str, Callable[[Path], object]], path: Path) -> None:
    for name, act in what.items():
        with pytest.raises(OSError) as caught:
            act(path)
        assert caught.value.errno == errno.EPERM, (name, path)


@pytest.mark.parametrize("where", [".", "own"])
def test_holds(mount: Mounted, where: str) -> None:
    top = mount.path / where
    for name in ("file-i", "file-a"):
        before = (top / name).read_bytes()
        refused(BY_BOTH, top / name)
        assert (top / name).read_bytes() == before
    refused(APPENDS, top / "file-i")
    for act in APPENDS.values():
        act(top / "file-a")
    refused({**REMOVES, **ADDS}, top / "dir-i")
    refused(REMOVES, top / "dir-a")
    for act in ADDS.values():
        act(top / "dir-a")
    for name in ("dir-i", "dir-a"):  # what is in them may change
        (top / name / "inside").write_text("changed")
        (top / name / "inside").chmod(0o640)
    assert {name: flags_of(top / name) for name in PROTECTED} == PROTECTED


CAPABILITY = bytes.fromhex("0100000200000000000000000000000000000000")
"""The value of security.capability: none."""


def test_appends_and_capabilities(mount: Mounted) -> None:
    """As on ext3: an append removes a capability, but set-ID bits that it would clear make it fail."""
    by = {"root": [], "nobody": as_nobody_prefix()}
    for where, user, mode, appends in [
        ("own", "root", 0o6777, True),
        ("own", "nobody", 0o6777, False),
        ("own", "nobody", 0o777, True),
        (".", "nobody", 0o777, True),
    ]:
        path = mount.path / where / "file-a"
        protect(path, 0)
        path.chmod(mode)
        os.setxattr(path, "security.capability", CAPABILITY)
        protect(path, APPEND)
        refused({"set": lambda at: os.setxattr(at, "security.capability", CAPABILITY)}, path)
        done = run(*by[user], "sh", "-c", 'echo >>"$0"', path, check=False)
        assert (done.returncode == 0) is appends, (where, user, mode, done.stderr)
        assert ("security.capability" in os.listxattr(path)) is not appends, (where, user, mode)
        assert path.stat().st_mode & 0o7777 == mode, (where, user, mode)


def test_kept_and_taken_away(lower: Path, nobody_path: Path) -> None:
    """At the next mount, by the kernel's overlayfs, and until somebody takes it away."""
    at, store = nobody_path / "mnt", nobody_path / "store"
    with mounted(lower, at, store):
        write(at / "file-a", os.O_APPEND)
        (at / "dir-i" / "inside").write_text("changed")
        (at / "new").touch()
        protect(at / "new", IMMUTABLE)
    everything = {**PROTECTED, "new": IMMUTABLE}
    with kernel_overlay([lower], store, at):
        assert {name: flags_of(at / name) for name in everything} == everything
        refused(BY_BOTH, at / "new")
    with mounted(lower, at, store):
        assert {name: flags_of(at / name) for name in everything} == everything
        for name in everything:
            protect(at / name, 0)
        (at / "dir-i" / "inside").unlink()
        for name in ("file-i", "file-a", "new"):
            (at / name).write_text("changed")
            (at / name).unlink()
    with kernel_overlay([lower], store, at):
        assert flags_of(at / "dir-i") == 0


def test_who_has_it_open(lower: Path, nobody_path: Path) -> None:
    """In an image, as on ext3."""
    cowfs("create", nobody_path / "store", "64", check=True)
    with (
        mounted(lower, nobody_path / "mnt", nobody_path / "store") as here,
        (here.path / "plain").open("r+b", buffering=0) as file,
    ):
        file.write(b"P")
        protect(here.path / "plain", IMMUTABLE)
        for act in (lambda: file.write(b"L"), lambda: file.truncate(2), lambda: os.fchmod(file.fileno(), 0)):
            with pytest.raises(PermissionError):
                act()
        protect(here.path / "plain", 0)
        file.write(b"L")


def test_for_users_too(lower: Path, nobody_path: Path) -> None:
    os.chown(lower, 65534, 65534)
    for name in ("file-i", "file-a"):
        protect(lower / name, 0)
        os.chown(lower / name, 65534, 65534)
        protect(lower / name, PROTECTED[name])
    with mounted(lower, nobody_path / "mnt", nobody_path / "store", nobody=True) as here:
        for program in (
            f"rm -f {here.path}/file-i",
            f"chmod 600 {here.path}/file-a",
            f": > {here.path}/file-a",
        ):
            done = subprocess.run(
                ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", program],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert "Operation not permitted" in done.stderr, program
