"""Reading changes atime of what is in the store as with the kernel's relatime, noatime and strictatime."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.mounts import Mounted, cowfs, mounted
from tests.support.squashfs import needs_mksquashfs
from tests.support.system import as_nobody_prefix, needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True
pytestmark = [needs_fuse, needs_root, needs_mksquashfs]
_COARSE = 5  # CLOCK_REALTIME_COARSE of linux/time.h
DAY = 24 * 60 * 60 * 10**9
LONG_AGO = 10**18
STORES = ["process", "kernel", "directory"]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A squashfs image with a file, a directory and a symbolic link, all old."""
    place = tmp_path_factory.mktemp("atime")
    lower = place / "lower"
    (lower / "dir").mkdir(parents=True)
    lower.chmod(0o777)
    (lower / "file").write_text("here\n")
    (lower / "link").symlink_to("file")
    for name in ("file", "dir", "link"):
        os.utime(lower / name, ns=(LONG_AGO, LONG_AGO), follow_symlinks=False)
    run("mksquashfs", lower, place / "lower.squashfs", "-quiet", "-no-progress")
    return place / "lower.squashfs"


@contextmanager
def mounted_with(image: Path, place: Path, kind: str, *options: str) -> Iterator[Mounted]:
    """A mount with options, and a store of a kind."""
    engine = None if kind == "directory" else kind
    if engine:
        cowfs("create", place / "store", "64", check=True)
    with mounted(image, place / "mnt", place / "store", engine=engine, options=options) as made:
        yield made


@pytest.fixture(scope="module", params=STORES)
def mount(
    request: pytest.FixtureRequest, transport: str, image: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mounted]:
    """One for all who want no options."""
    with mounted_with(image, tmp_path_factory.mktemp(transport), request.param) as made:
        yield made


def read(path: Path) -> None:
    """Have the daemon asked for a file's data: what the kernel has of it is dropped."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.read(fd, 10)
    os.close(fd)


READ: dict[str, Callable[[Path], object]] = {"file": read, "dir": os.listdir, "link": os.readlink}


def make(place: Path) -> Path:
    """Make one of each in a new directory, and return that."""
    place.mkdir()
    (place / "new-file").write_text("new\n")
    (place / "new-dir").mkdir()
    (place / "new-dir" / "file").touch()
    (place / "new-link").symlink_to("file")
    pause()
    return place


def pause() -> None:
    """Let the kernel's clock, which counts in ticks, go on."""
    before = time.clock_gettime_ns(_COARSE)
    while time.clock_gettime_ns(_COARSE) < before + 10**7:
        pass


def changes(path: Path, act: Callable[[Path], object]) -> bool:
    """Whether it changes the atime, to now, and nothing else ever."""
    before = os.lstat(path)
    act(path)
    after = os.lstat(path)
    assert (before.st_mtime_ns, before.st_ctime_ns) == (after.st_mtime_ns, after.st_ctime_ns)
    if before.st_atime_ns == after.st_atime_ns:
        return False
    assert abs(after.st_atime_ns - time.time_ns()) < 10**10
    return True


def test_once_after_each_change(mount: Mounted) -> None:
    place = make(mount.path / "changes")
    for name, act in READ.items():
        path = place / f"new-{name}"
        assert changes(path, act), name
        pause()
        assert not changes(path, act), name
    with (place / "new-file").open("a") as file:
        file.write("more\n")
    (place / "new-dir" / "more").touch()
    pause()
    for name in ("file", "dir"):
        assert changes(place / f"new-{name}", READ[name]), name
        assert not changes(place / f"new-{name}", READ[name]), name


def test_once_a_day(mount: Mounted) -> None:
    path = make(mount.path / "days") / "new-file"
    os.utime(path, ns=(time.time_ns() + DAY, LONG_AGO))  # later than the change that this is
    assert not changes(path, read)
    os.utime(path, ns=(time.time_ns() - DAY, LONG_AGO))
    assert changes(path, read)


def test_what_is_not_in_the_store(mount: Mounted) -> None:
    for name, act in READ.items():
        assert not changes(mount.path / name, act), name
    diff = cowfs("diff", mount.path, check=True).stdout.split()
    assert not {"file", "dir", "link"} & set(diff)
    os.chmod(mount.path / "file", 0o600)
    pause()
    assert changes(mount.path / "file", read)
    os.chmod(mount.path / "file", 0o644)


OTHERS = [pytest.param(kind, marks=[pytest.mark.nightly] if kind == "kernel" else []) for kind in STORES]


@pytest.mark.parametrize("kind", OTHERS)
def test_other_rules(image: Path, tmp_path: Path, kind: str) -> None:
    for option, changed in (("noatime", set()), ("nodiratime", {"file", "link"}), ("strictatime", set(READ))):
        place = tmp_path / option
        place.mkdir()
        with mounted_with(image, place, kind, option) as here:
            top = make(here.path / "top")
            for _ in range(2 if option == "strictatime" else 1):
                now_changed = {name for name, act in READ.items() if changes(top / f"new-{name}", act)}
                assert now_changed >= changed - {"link"}, option
                assert now_changed <= changed, option
                pause()


def test_o_noatime(mount: Mounted) -> None:
    path = make(mount.path / "flag") / "new-file"
    fd = os.open(path, os.O_RDONLY | os.O_NOATIME)
    assert not changes(path, lambda _: os.read(fd, 10))
    os.close(fd)


def test_what_keeps_its_atime(mount: Mounted) -> None:
    place = make(mount.path / "keeps")
    for name in ("file", "dir"):
        path = place / f"new-{name}"
        if run("chattr", "+A", path, check=False).returncode:
            pytest.skip("chattr +A does not work on the disk of the tests")
        assert not changes(path, READ[name]), name
    run("chattr", "-A", place / "new-file")
    pause()
    assert changes(place / "new-file", read)


def test_kept_and_not_changed_where_nothing_may_be(image: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    cowfs("create", store, "64", check=True)
    with mounted(image, tmp_path / "mnt", store) as here:
        path = make(here.path / "top") / "new-file"
        assert changes(path, read)
        atime = path.stat().st_atime_ns
    with mounted(image, tmp_path / "mnt", store, options=["ro"]) as here:
        assert path.stat().st_atime_ns == atime
        assert not changes(here.path / "top" / "new-dir", os.listdir)
    assert run("e2fsck", "-fn", store, check=False).returncode == 0


_READS = """
import os, sys, time
with open(sys.argv[1], "w") as file:
    file.write("x")
fd = os.open(sys.argv[1], os.O_RDONLY)
os.fsync(fd)
before = os.fstat(fd).st_atime_ns
while time.clock_gettime_ns(5) < before + 10**7:
    pass
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
os.read(fd, 9)
print(os.fstat(fd).st_atime_ns > before)
"""


def test_a_users_own(image: Path, nobody_path: Path) -> None:
    assert cowfs("create", nobody_path / "s.bs", "64", nobody=True).returncode == 0
    for store, options in (("s.bs", ["strictatime", "nodiratime"]), ("dir", []), ("dir2", ["noatime"])):
        lower = nobody_path / image.name
        if not lower.exists():
            lower.write_bytes(image.read_bytes())
        at = nobody_path / f"mnt-{store}"
        with mounted(lower, at, nobody_path / store, options=[*options, "noallow_other"], nobody=True):
            done = run(*as_nobody_prefix(), sys.executable, "-c", _READS, at / "new")
            assert done.stdout.strip() == str(store != "dir2"), store


def test_a_users_lower(nobody_path: Path) -> None:
    lower = nobody_path / "lower"
    (lower / "dir" / "below").mkdir(parents=True)
    (lower / "dir" / "file").touch()
    run("chown", "-R", "65534:65534", lower)
    names = ["dir", "dir/below", "dir/file"]
    for name in names:
        os.utime(lower / name, ns=(LONG_AGO, LONG_AGO))
    at = nobody_path / "mnt"
    with mounted(lower, at, nobody_path / "store", nobody=True, options=["noallow_other"]):
        run(*as_nobody_prefix(), "sh", "-c", f"find {at} -ls; cat {at}/dir/file; rmdir {at}/dir/below")
    assert [os.lstat(lower / name).st_atime_ns for name in names] == [LONG_AGO] * len(names)
