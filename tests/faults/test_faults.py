"""Every operation that changes several things in the upper, with a failure at each of its steps."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.faulty import ALLOCATES, CALLS, Fault, faulty
from tests.support import tree, upper
from tests.support.direct import Direct
from tests.support.system import needs_root
from tests.support.tree import Node, Snapshot, directory, link, symlink

pytestmark = needs_root

LOWER: tree.Tree = {
    "file": Node(data=b"file\n", mode=0o640, uid=1000, xattrs={"user.a": b"1"}),
    "big": Node(data=b"0123456789abcdef" * 8192, mode=0o755),
    "dir/sub/deep": b"deep\n",
    "dir/a": b"a\n",
    "empty": directory(0o700),
    "one": b"linked\n",
    "dir/two": link("one"),
    "sym": symlink("file"),
    "fifo": Node("fifo"),
}

Act = Callable[[Direct], object]


def _hollow(fs: Direct) -> None:
    """Fill ``dir`` with whiteouts only."""
    for path in ("dir/a", "dir/two", "dir/sub/deep"):
        fs.unlink(path)
    fs.rmdir("dir/sub")


def _nothing(fs: Direct) -> None:
    pass


def _both(*acts: Act) -> Act:
    def act(fs: Direct) -> None:
        for one in acts:
            one(fs)

    return act


def _new_dir(fs: Direct) -> None:
    fs.mkdir("new")
    fs.create("new/x", b"x")


OPERATIONS: dict[str, tuple[Act, Act]] = {
    # copy-up
    "append to a file": (_nothing, lambda fs: fs.write("file", b"more", 5)),
    "append to a large file": (_nothing, lambda fs: fs.write("big", b"more", 8)),
    "append in a deep directory": (_nothing, lambda fs: fs.write("dir/sub/deep", b"more", 5)),
    "open with O_TRUNC": (
        _nothing,
        lambda fs: fs.fs.release_handle(fs.open("big", os.O_WRONLY | os.O_TRUNC)),
    ),
    "truncate": (_nothing, lambda fs: fs.set("dir/a", size=1)),
    "chmod": (_nothing, lambda fs: fs.set("file", mode=0o600)),
    "chmod of a large file": (_nothing, lambda fs: fs.set("big", mode=0o600)),
    "data of a metacopy": (lambda fs: fs.set("big", mode=0o600), lambda fs: fs.write("big", b"x", 3)),
    "data of a renamed metacopy": (lambda fs: fs.rename("big", "dir/b"), lambda fs: fs.write("dir/b", b"x")),
    "chown of a directory": (_nothing, lambda fs: fs.set("dir/sub", uid=5)),
    "chown of a symlink": (_nothing, lambda fs: fs.set("sym", uid=7)),
    "setxattr": (_nothing, lambda fs: fs.setxattr("dir/a", b"user.x", b"y")),
    "removexattr": (_nothing, lambda fs: fs.removexattr("file", b"user.a")),
    "append to a hard link": (_nothing, lambda fs: fs.write("one", b"more", 7)),
    "chmod of a hard link": (_nothing, lambda fs: fs.set("one", mode=0o600)),
    "append to its other name": (lambda fs: fs.set("one", mode=0o600), lambda fs: fs.write("dir/two", b"+")),
    # making and removing
    "create": (_nothing, lambda fs: fs.create("dir/sub/new")),
    "create over a whiteout": (lambda fs: fs.unlink("file"), lambda fs: fs.create("file")),
    "mkdir over a whiteout": (lambda fs: fs.rmdir("empty"), lambda fs: fs.mkdir("empty")),
    "symlink over a whiteout": (lambda fs: fs.unlink("file"), lambda fs: fs.symlink(b"x", "file")),
    "mkdir": (_nothing, lambda fs: fs.mkdir("dir/new")),
    "unlink a lower file": (_nothing, lambda fs: fs.unlink("dir/a")),
    "unlink the second": (lambda fs: fs.unlink("file"), lambda fs: fs.unlink("dir/a")),
    "unlink a changed file": (lambda fs: fs.write("file", b"x"), lambda fs: fs.unlink("file")),
    "unlink a new file": (lambda fs: fs.create("new"), lambda fs: fs.unlink("new")),
    "unlink a hard link": (_nothing, lambda fs: fs.unlink("one")),
    "unlink a changed hard link": (lambda fs: fs.write("one", b"x"), lambda fs: fs.unlink("dir/two")),
    "unlink the last hard link": (
        _both(lambda fs: fs.write("one", b"x"), lambda fs: fs.unlink("dir/two")),
        lambda fs: fs.unlink("one"),
    ),
    "rmdir of a lower directory": (_nothing, lambda fs: fs.rmdir("empty")),
    "rmdir of a merged directory": (_hollow, lambda fs: fs.rmdir("dir")),
    "rmdir of a directory of whiteouts": (
        _both(_hollow, lambda fs: fs.rename("dir", "moved")),
        lambda fs: fs.rmdir("moved"),
    ),
    # links and renames
    "link": (_nothing, lambda fs: fs.link("file", "dir/new")),
    "link over a whiteout": (lambda fs: fs.unlink("dir/a"), lambda fs: fs.link("one", "dir/a")),
    "rename a file": (_nothing, lambda fs: fs.rename("file", "dir/new")),
    "rename a large file": (_nothing, lambda fs: fs.rename("big", "dir/new")),
    "rename over a file": (_nothing, lambda fs: fs.rename("file", "dir/a")),
    "rename over a hard link": (_nothing, lambda fs: fs.rename("file", "one")),
    "rename a hard link": (_nothing, lambda fs: fs.rename("one", "dir/a")),
    "rename a directory": (_nothing, lambda fs: fs.rename("dir", "moved")),
    "rename it back": (lambda fs: fs.rename("dir", "moved"), lambda fs: fs.rename("moved", "dir")),
    "rename a directory within another": (_nothing, lambda fs: fs.rename("dir/sub", "empty/sub")),
    "rename to a whiteout": (lambda fs: fs.rmdir("empty"), lambda fs: fs.rename("dir", "empty")),
    "rename over a merged directory": (_both(_hollow, _new_dir), lambda fs: fs.rename("new", "dir")),
    "rename over a lower directory": (_nothing, lambda fs: fs.rename("dir", "empty")),
    "exchange": (_nothing, lambda fs: fs.rename("file", "dir/a", 2)),
    "exchange directories": (_nothing, lambda fs: fs.rename("dir", "empty", 2)),
    "exchange a file and a directory": (_nothing, lambda fs: fs.rename("file", "dir", 2)),
}

FAULTS = {
    "EIO once": lambda at: Fault(errno.EIO, at, calls=CALLS),
    "EIO for good": lambda at: Fault(errno.EIO, at, for_good=True, calls=CALLS),
    "ENOSPC once": lambda at: Fault(errno.ENOSPC, at, calls=ALLOCATES),
    "ENOSPC for good": lambda at: Fault(errno.ENOSPC, at, for_good=True, calls=ALLOCATES),
}


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory in memory, because hundreds of unions are opened here."""
    place = Path(tempfile.mkdtemp(prefix="cowfs-faults-", dir="/dev/shm"))
    tree.build(place / "lower", LOWER)
    yield place
    shutil.rmtree(place)


def opened(scratch: Path, fault: Fault, prepare: Act, *, slow: bool = False) -> Direct:
    """Return a new union after *prepare*, with the fault armed."""
    store = scratch / "store"
    shutil.rmtree(store, ignore_errors=True)
    fs = Direct(str(store), [str(scratch / "lower")], faulty(fault), slow=slow)
    prepare(fs)
    fs.forget()
    return fs


@pytest.mark.parametrize("how", FAULTS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_old_or_new(name: str, how: str, scratch: Path) -> None:
    prepare, act = OPERATIONS[name]
    fs = opened(scratch, Fault(0, 0), prepare)
    old = fs.snapshot()
    act(fs)
    new = fs.snapshot()
    fs.close()
    assert seen(old) != seen(new), "the operation changes nothing that can be seen"
    for at in range(1, 400):
        fault = FAULTS[how](at)
        fs = opened(scratch, fault, prepare)
        try:
            fault.armed = True
            failed = error_of(lambda fs=fs: act(fs))  # type: ignore[misc]
            fault.armed = False
            where = f"call {at} ({fault.hit[:1]}) failed"
            check(fs, fault, failed, old, new, where)
            fs.crash()
            check(fs, fault, failed, old, new, f"{where}, reopened")
            # The next operation finds no leftovers.
            if failed is not None and old_or_new(fs.snapshot(), old, new) == "old":
                act(fs)
                assert seen(fs.snapshot()) == seen(new), f"{where}: done again it gives another tree"
        finally:
            fs.close()
        assert upper.leftovers(str(scratch / "store")) == []
        if not fault.hit:
            assert failed is None
            assert at > 1 or "ENOSPC" in how, "the operation did not touch the upper"
            return
    pytest.fail("it never succeeds")


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_same_with_a_slow_lower(name: str, scratch: Path) -> None:
    """With a slow lower, an operation restarts for each answer that it needs."""
    prepare, act = OPERATIONS[name]
    trees = []
    for slow in (False, True):
        fs = opened(scratch, Fault(0, 0), prepare, slow=slow)
        act(fs)
        trees.append(seen(fs.snapshot()))
        fs.crash()
        trees.append(seen(fs.snapshot()))
        fs.close()
        assert upper.leftovers(str(scratch / "store")) == []
    assert all(one == trees[0] for one in trees)


def check(fs: Direct, fault: Fault, failed: OSError | None, old: Snapshot, new: Snapshot, where: str) -> None:
    """The tree is the old or the new one; the new one if the operation succeeded."""
    if failed is not None:
        assert failed.errno == fault.code, f"{where}: answered {failed!r}"
    now = fs.snapshot()
    which = old_or_new(now, old, new)
    unlike_old = tree.differences(seen(old), seen(now), ("old", "now"))
    unlike_new = tree.differences(seen(new), seen(now), ("new", "now"))
    assert which, f"{where}: neither old nor new: {'; '.join(unlike_old)} --- or --- {'; '.join(unlike_new)}"
    assert failed is not None or which == "new", f"{where}: success was answered, but nothing has changed"


def old_or_new(now: Snapshot, old: Snapshot, new: Snapshot) -> str:
    """Return which of the two trees this is."""
    if seen(now) == seen(new):
        return "new"
    return "old" if seen(now) == seen(old) else ""


def seen(snap: Snapshot) -> Snapshot:
    """Return what must be old or new: not the times, which a failed attempt may change."""
    return tree.stable(snap, ignore=("ino", "mtime"))


def error_of(operation: Callable[[], Any]) -> OSError | None:
    """Return the OSError of an operation; any other exception fails the test."""
    try:
        operation()
    except OSError as error:
        return error
    return None


def test_links_that_only_the_index_has(scratch: Path) -> None:
    """A restarted operation finds no inode that the first attempt left half registered."""
    tree.build(scratch / "links", {"one": b"linked\n", "dir/two": link("one"), "dir/three": link("one")})
    fs = Direct(str(scratch / "store"), [str(scratch / "links")], slow=True)
    fs.set("one", mode=0o600)
    fs.crash()
    shown = fs.snapshot()
    assert [shown[path]["nlink"] for path in ("one", "dir/two", "dir/three")] == [3, 3, 3]
    fs.close()
