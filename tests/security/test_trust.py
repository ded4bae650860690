"""A store that another user could change, serve or swap is refused; such a layer makes nobody root."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cowfs.linux import trust
from cowfs.linux.trust import who_can_change, who_can_redirect
from tests.support.mounts import cowfs, eventually, force_umount, is_mounted, mounted
from tests.support.squashfs import mksquashfs, needs_mksquashfs
from tests.support.system import NOBODY, as_nobody_prefix, needs_fuse, needs_root, run
from tests.support.tree import differences, snapshot

pytestmark = [needs_fuse, needs_root]

STRANGER = 65533


@pytest.fixture
def lower(roots: Path) -> Path:
    (roots / "lower").mkdir()
    (roots / "lower/file").write_text("below\n")
    (roots / "mnt").mkdir()
    return roots / "lower"


@pytest.fixture
def store(roots: Path, lower: Path) -> Path:
    with mounted(lower, roots / "mnt", roots / "store") as here:
        (here.path / "new").write_text("x")
    return roots / "store"


def refused(lower: Path, store: Path) -> str:
    """Return the one line about a store that is not mounted; nothing in it has changed."""
    done = cowfs("mount", lower, "/mnt/mnt", "--store", store)
    if is_mounted("/mnt/mnt"):
        force_umount("/mnt/mnt")
    assert done.returncode == 32 and done.stderr.count("\n") == 1, done
    return done.stderr


def chown(path: Path) -> None:
    os.chown(path, NOBODY, NOBODY, follow_symlinks=False)


def give_to_a_group(path: Path) -> None:
    os.chown(path, 0, 1000)
    path.chmod(0o770)


def acl(entry: str) -> Callable[[Path], object]:
    return lambda path: run("setfacl", "-m", entry, path)


PARTS = [
    *("", "work", "work/work", "work/index"),
    *("cowfs", "cowfs/header.json", "cowfs/lock"),
]
WAYS: dict[str, Callable[[Path], object]] = {
    "belongs to": chown,
    "all may write": lambda path: path.chmod(0o777),
    "a group may write": give_to_a_group,
    "an ACL for a user": acl("u:65534:rwx"),
    "an ACL for a group": acl("g:1000:rwx"),
    "a sticky bit does not help": lambda path: path.chmod(0o1777),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_store_of_which_others_may_write_a_part(lower: Path, store: Path, part: str) -> None:
    """They could change the header, take the lock, or put links and files where the daemon makes its own."""
    for way, change in WAYS.items():
        run("cp", "-a", store, lower.parent / "tried")
        change(lower.parent / "tried" / part)
        said = refused(lower, lower.parent / "tried")
        assert ("another user (uid 65534)" if way == "belongs to" else "can write to") in said, (way, said)
        assert part in said
        run("rm", "-rf", lower.parent / "tried")


@pytest.mark.parametrize("change", ["u:0:rwx", "g:0:rwx", "u:65534:r-x", "m::rwx"])
def test_acls_that_give_nobody_else_anything(lower: Path, store: Path, change: str) -> None:
    run("setfacl", "-m", change, store / "work")
    with mounted(lower, lower.parent / "mnt", store) as here:
        assert (here.path / "new").read_text() == "x"


def test_what_is_in_a_store_may_belong_to_anybody(lower: Path, store: Path) -> None:
    with mounted(lower, lower.parent / "mnt", store) as here:
        os.chown(here.path, NOBODY, NOBODY)
        here.path.chmod(0o777)
    with mounted(lower, lower.parent / "mnt", store) as here:
        assert here.path.stat().st_uid == NOBODY


def test_a_new_store_inherits_no_acl(lower: Path) -> None:
    """A directory's default ACL would give its owner all that root makes in the union."""
    above = lower.parent / "above"
    above.mkdir()
    run("setfacl", "-d", "-m", "u:65534:rwx,m::rwx", above)
    with mounted(lower, lower.parent / "mnt", above / "store") as here:
        (here.path / "made").mkdir()
        (here.path / "made/file").touch(0o666)
        (here.path / "file").chmod(0o664)  # copied up
        for path in (here.path, *here.path.rglob("*")):
            assert "65534" not in run("getfacl", "-n", path).stdout, path
    for path in (above / "store", *(above / "store").rglob("*")):
        if not path.is_symlink() and "mark." not in str(path):
            assert "65534" not in run("getfacl", "-n", path).stdout, path


def test_work_lets_nothing_inherit(lower: Path, store: Path) -> None:
    """As overlayfs does, remove a default ACL of work/ before anything is made there."""
    for name in ("work/work", "work/index"):
        run("setfacl", "-d", "-m", "u:65534:r-x", store / name)
    with mounted(lower, lower.parent / "mnt", store) as here:
        (here.path / "file").chmod(0o664)
        assert "65534" not in run("getfacl", "-n", here.path / "file").stdout


def test_another_users_link_to_a_directory(lower: Path, nobody_path: Path) -> None:
    """Following it would make any empty directory of root's a store."""
    victim = lower.parent / "victim"
    victim.mkdir()
    (nobody_path / "above").symlink_to(lower.parent)
    (nobody_path / "store").symlink_to(victim)
    chown(nobody_path / "above")
    chown(nobody_path / "store")
    for store in (nobody_path / "store", nobody_path / "above/victim", nobody_path / "above/missing"):
        assert "symbolic link owned by another user (uid 65534)" in refused(lower, store)
    assert not list(victim.iterdir()) and not (lower.parent / "missing").exists()
    (lower.parent / "link").symlink_to(victim)  # root's own
    with mounted(lower, lower.parent / "mnt", lower.parent / "link"):
        pass


SERVER = """
import errno, os, stat, struct, sys
ROOT, FILE = 1, 2
def attributes(node):
    mode = stat.S_IFDIR | 0o755 if node == ROOT else stat.S_IFREG | 0o644
    return struct.pack("<6Q10I", node, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
fd = int(sys.argv[1])
while True:
    try:
        message = os.read(fd, 1 << 20)
    except OSError:
        break
    length, opcode, unique, node = struct.unpack_from("<IIQQ", message)
    body, code = b"", 0
    if opcode == 26:
        body = struct.pack("<IIIIHHIIHHI28x", 7, 31, 65536, 0, 12, 10, 65536, 1, 0, 0, 0)
    elif opcode == 3:
        body = struct.pack("<QII", 0, 0, 0) + attributes(node)
    elif opcode == 1 and message[40:-1] == b"image":
        body = struct.pack("<QQQQII", FILE, 0, 0, 0, 0, 0) + attributes(FILE)
    elif opcode == 1:
        code = errno.ENOENT
    elif opcode in (2, 42):
        continue
    else:
        code = errno.ENOSYS
    os.write(fd, struct.pack("<IiQ", 16 + len(body), -code, unique) + body)
"""
"""It says that everything belongs to root."""


@contextmanager
def served_by(uid: int, at: Path) -> Iterator[None]:
    """A FUSE filesystem of this user's at a directory, on which everything is root's."""
    fd = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fd},rootmode=40755,user_id={uid},group_id={uid},allow_other"
    mount = (
        "import ctypes,os,sys;"
        "sys.exit(ctypes.CDLL(None).mount(b'x',os.fsencode(sys.argv[1]),b'fuse.x',0,sys.argv[2].encode()))"
    )
    run(sys.executable, "-c", mount, at, options, pass_fds=(fd,))
    prefix = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--"]
    server = subprocess.Popen([*prefix, sys.executable, "-c", SERVER, str(fd)], pass_fds=(fd,))
    os.close(fd)
    try:
        eventually(lambda: at.stat().st_ino == 1, "it answers")
        yield
    finally:
        force_umount(at)
        server.wait(10)


def test_a_filesystem_that_a_user_serves(roots: Path) -> None:
    """An administrator mounted it with suid and dev, and the user decides who owns its files."""
    (roots / "place").mkdir()
    with served_by(STRANGER, roots / "place"):
        assert (roots / "place/image").stat().st_uid == 0
        for path in (roots / "place", roots / "place/image"):
            said = who_can_change(str(path))
            assert said is not None and f"served by uid {STRANGER}" in said
            assert said == who_can_redirect(str(path))
        assert who_can_change(str(roots / "place/..")) is not None, "its daemon says what .. leads by"
    with served_by(0, roots / "place"):
        assert who_can_change(str(roots / "place/image")) is None


def test_a_store_there(lower: Path) -> None:
    place = lower.parent / "place"
    place.mkdir()
    with served_by(STRANGER, place):
        assert f"served by uid {STRANGER}" in refused(lower, place)


def test_the_way_is_the_kernels(roots: Path, nobody_path: Path) -> None:
    """``..`` after a link leads to the parent of what that leads to, not back."""
    (roots / "image").touch()
    (nobody_path / "deep").mkdir()
    (nobody_path / "image").touch()
    (nobody_path / "deep/er").mkdir()
    (roots / "link").symlink_to(nobody_path / "deep/er")
    assert os.path.samefile(roots / "link/../../image", nobody_path / "image")
    assert who_can_change(str(f"{roots}/link/../../image")) is not None
    assert who_can_change(str(f"{roots}/link/../../../../../../..{roots}/image")) is not None
    (roots / "own").mkdir()
    fd = os.open(roots, os.O_PATH)
    assert who_can_redirect(f"{roots}/own/..", fd) is None
    assert who_can_redirect(f"{roots}/own", fd) == f"{roots}/own was replaced by another file"
    os.close(fd)


def test_the_way_is_not_taken_twice(roots: Path, nobody_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory on the way becomes a link when it has been looked at."""
    (nobody_path / "one/two").mkdir(parents=True)
    (roots / "two").mkdir()
    fd = os.open(roots / "two", os.O_PATH)
    real = trust._why_served

    def swap(path: bytes, *more: Any) -> str | None:
        if path == os.fsencode(nobody_path / "one"):
            (nobody_path / "one").rename(nobody_path / "was")
            (nobody_path / "one").symlink_to(roots)
        return real(path, *more)

    monkeypatch.setattr(trust, "_why_served", swap)
    said = trust.who_can_redirect(f"{nobody_path}/one/two", fd)
    os.close(fd)
    assert said == f"{nobody_path}/one/two was replaced by another file"


def test_a_bind_mount_is_what_is_mounted(roots: Path, nobody_path: Path) -> None:
    """A bind mount of root's tree below another user's directory is trusted: the user cannot replace it."""
    tree = nobody_path / "tree"
    tree.mkdir()
    (tree / "image").touch()
    place = roots / "place"
    place.mkdir()
    assert who_can_change(str(tree / "image")) is not None
    run("mount", "--bind", tree, place)
    try:
        assert who_can_change(str(place / "image")) is None
        chown(tree)
        assert who_can_change(str(place / "image")) is not None
    finally:
        run("umount", place)


@pytest.mark.parametrize("entry", ["u:65534:w", "g:65534:rw"])
@pytest.mark.parametrize("at", ["way", "way/image"])
def test_acls_on_the_way(roots: Path, at: str, entry: str) -> None:
    (roots / "way").mkdir()
    (roots / "way/image").touch()
    assert who_can_change(str(roots / "way/image")) is None
    run("setfacl", "-m", entry, roots / at)
    assert who_can_change(str(roots / "way/image")) is not None
    run("setfacl", "-m", "m::r-x", roots / at)
    assert who_can_change(str(roots / "way/image")) is None, "the mask takes it away"


LEADS = ["a link", "a link on the way", "a second name", "a second name in their directory"]


@pytest.fixture
def foreign(roots: Path) -> Path:
    """A filesystem of root's that is no store."""
    (roots / "private").mkdir(mode=0o700)
    image = roots / "private/image"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    run("mke2fs", "-q", "-t", "ext3", image)
    return image


def led_to(file: Path, way: Path, how: str) -> Path:
    """Make what leads to a file, as a user can in a directory for all or in their own."""
    way.mkdir()
    way.chmod(0o1777)
    if how == "a link on the way":
        (way / "deep").symlink_to(file.parent)
        os.chown(way / "deep", NOBODY, NOBODY, follow_symlinks=False)
        return way / "deep" / file.name
    name = way / "name"
    if how == "a link":
        name.symlink_to(file)
        os.chown(name, NOBODY, NOBODY, follow_symlinks=False)
        return name
    os.link(file, name)
    if how == "a second name in their directory":
        way.chmod(0o755)
        os.chown(way, NOBODY, NOBODY)
    return name


@pytest.mark.parametrize("how", LEADS)
def test_a_file_of_roots_that_a_user_leads_to(roots: Path, lower: Path, foreign: Path, how: str) -> None:
    """The file is neither repaired, resized nor written otherwise."""
    name = led_to(foreign, roots / "way", how)
    before = foreign.read_bytes()
    commands: list[list[str | Path]] = [
        ["check", name],
        ["grow", name, "32"],
        ["mount", lower, roots / "mnt", "--store", name],
    ]
    for command in commands:
        done = cowfs(*command)
        assert done.returncode and done.stderr.count("\n") == 1, done
        assert "symbolic link owned by another" in done.stderr or "has another name" in done.stderr, done
    assert foreign.read_bytes() == before


def test_links_of_ones_own(roots: Path, lower: Path) -> None:
    cowfs("create", roots / "image", "16", check=True)
    os.link(roots / "image", roots / "second")
    (roots / "link").symlink_to("second")
    (roots / "more").symlink_to(roots)
    cowfs("check", roots / "more/link", check=True)
    with mounted(lower, roots / "mnt", roots / "more/link"):
        pass


def test_users_may_have_stores_where_they_like(nobody_path: Path) -> None:
    """Behind links of their own, in directories of a group of theirs."""
    (nobody_path / "lower").mkdir()
    (nobody_path / "real").mkdir()
    (nobody_path / "link").symlink_to(nobody_path / "real")
    chown(nobody_path / "real")
    chown(nobody_path / "link")
    (nobody_path / "real").chmod(0o775)
    with mounted(nobody_path / "lower", nobody_path / "mnt", nobody_path / "link", nobody=True) as here:
        assert here.pid() > 0
    assert run(*as_nobody_prefix(), "ls", nobody_path / "real/upper").returncode == 0


@pytest.mark.parametrize("what", ["owner", "mode", "link"])
def test_a_store_that_others_may_write_is_not_converted(
    lower: Path, store: Path, nobody_path: Path, what: str
) -> None:
    """Nor is anything else done to it by root."""
    given = store
    if what == "owner":
        run("chown", "-R", f"{NOBODY}:{NOBODY}", store)
    elif what == "mode":
        (store / "work").chmod(0o777)
    else:
        given = nobody_path / "link"
        given.symlink_to(store)
        os.chown(given, NOBODY, NOBODY, follow_symlinks=False)
    before = snapshot(store)
    done = cowfs("convert", given, "--to", "aufs")
    assert done.returncode == 32 and "other user" in done.stderr, done
    assert differences(before, snapshot(store)) == []


_SWAP = """
import ctypes, os, sys
place, swapped, target = sys.argv[1:]
libc = ctypes.CDLL(None)
watch = libc.inotify_init()
assert libc.inotify_add_watch(watch, os.fsencode(f"{place}/image"), 0x20) > 0  # IN_OPEN
print("ready", flush=True)
os.read(watch, 4096)
try:
    os.rename(f"{place}/{swapped}", f"{place}/aside")
    os.symlink(target, f"{place}/{swapped}")
except OSError:
    pass  # it is mounted already
"""


@pytest.mark.parametrize("swapped", ["above/mnt", "above"])
@needs_mksquashfs
def test_a_mountpoint_that_is_swapped(lower: Path, roots: Path, nobody_path: Path, swapped: str) -> None:
    """A user watches root open the image, and then leads the mount to a directory of root's."""
    (roots / "target/mnt").mkdir(parents=True)
    (nobody_path / "above/mnt").mkdir(parents=True)
    target = roots / "target" / ("mnt" if swapped == "above/mnt" else "")
    mksquashfs(nobody_path / "image", lower)
    for path in (nobody_path / "image", nobody_path / "above", nobody_path / "above/mnt"):
        os.chown(path, NOBODY, NOBODY)
    script: list[str | Path] = [sys.executable, "-c", _SWAP, nobody_path, swapped, target]
    with subprocess.Popen([*as_nobody_prefix(), *script], stdout=subprocess.PIPE) as swapping:
        assert swapping.stdout is not None and swapping.stdout.readline()
        done = cowfs("mount", nobody_path / "image", nobody_path / "above/mnt")
        swapping.wait()
    is_led_elsewhere = is_mounted(roots / "target/mnt")
    if is_led_elsewhere:
        run("umount", "-l", roots / "target/mnt")
    assert not is_led_elsewhere
    if done.returncode == 0:  # the user was too late
        cowfs("umount", nobody_path / "above/mnt", check=True)
    else:
        assert done.returncode == 32 and done.stderr.count("\n") <= 2, done.stderr
