"""`diff` after random histories, against a comparison of the two whole trees."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cowfs.changes.select import selected
from cowfs.linux.files import RENAME_EXCHANGE, renameat2
from cowfs.types import Change
from tests.mount.test_diff_kernel import ALL_ON, OLD, age, changes
from tests.support.system import needs_root, run
from tests.support.tree import Snapshot, snapshot

pytestmark = [needs_root, pytest.mark.root]


NAMES = [b"a", b"b", b"c", b"d", b"\xffe"]


def paths(top: Path) -> tuple[list[bytes], list[bytes]]:
    """Return all paths in a tree, and those of directories."""
    every: list[bytes] = []
    folders = [os.fsencode(top)]
    for folder, names, files in os.walk(os.fsencode(top)):
        every += [os.path.join(folder, name) for name in sorted(names + files)]
        folders += [
            os.path.join(folder, n) for n in sorted(names) if not os.path.islink(os.path.join(folder, n))
        ]
    return every, folders


def _open(path: bytes, mode: str) -> IO[Any]:
    """Open a regular file; a pipe would wait for somebody at its other end, a device do what it does."""
    if not os.path.isfile(path):
        raise OSError(errno.EINVAL, "not a regular file")
    return open(path, mode)


def _write(path: bytes, number: int) -> None:
    with _open(path, "r+b") as out:
        out.write(b"%d" % (number % 3))


def _append(path: bytes, number: int) -> None:
    with _open(path, "ab") as out:
        out.write(b"x" * (number % 3))


def _rmtree(path: bytes) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _exchange(path: bytes, other: bytes) -> None:
    renameat2(-100, path, -100, other, RENAME_EXCHANGE)


ON_ONE: dict[str, Callable[[bytes, int], object]] = {
    "write": _write,
    "append": _append,
    "truncate": lambda p, n: os.truncate(p, n % 20),
    "remove": lambda p, n: _rmtree(p),
    "remove one": lambda p, n: os.rmdir(p) if os.path.isdir(p) else os.unlink(p),
    "chmod": lambda p, n: os.chmod(p, 0o600 | n % 8),
    "chown": lambda p, n: os.chown(p, n % 3, n % 2, follow_symlinks=False),
    "utime": lambda p, n: os.utime(p, ns=(OLD, OLD + n % 3), follow_symlinks=False),
    "setxattr": lambda p, n: os.setxattr(p, b"user.x", b"%d" % (n % 3), follow_symlinks=False),
    "removexattr": lambda p, n: os.removexattr(p, b"user.x", follow_symlinks=False),
    "copy up": lambda p, n: _open(p, "r+b").close(),
}
ON_NEW: dict[str, Callable[[bytes, int], object]] = {
    "create": lambda p, n: os.close(os.open(p, os.O_CREAT | os.O_EXCL)),
    "mkdir": lambda p, n: os.mkdir(p),
    "symlink": lambda p, n: os.symlink(b"%d" % (n % 3), p),
    "mkfifo": lambda p, n: os.mkfifo(p),
    "mknod": lambda p, n: os.mknod(p, 0o600 | stat.S_IFCHR, os.makedev(1, (3, 5, 7)[n % 3])),
}
ON_TWO: dict[str, Callable[[bytes, bytes], object]] = {
    "rename": os.rename,
    "link": lambda p, q: os.link(p, q, follow_symlinks=False),
    "exchange": _exchange,
}
number = st.integers(0, 1000)
operation = st.one_of(
    st.tuples(st.sampled_from(sorted(ON_ONE)), number, number),
    st.tuples(st.sampled_from(sorted(ON_NEW)), number, number),
    st.tuples(st.sampled_from(["rename"] * 3 + sorted(ON_TWO)), number, number),
)
history = st.lists(operation, max_size=25)


def play(top: Path, steps: list[tuple[str, int, int]]) -> None:
    """Do what can be done of *steps*."""
    for name, one, two in steps:
        every, folders = paths(top)
        if name not in ON_NEW and not every:
            continue
        made = os.path.join(folders[two % len(folders)], NAMES[one % len(NAMES)])
        with suppress(OSError):
            if name in ON_ONE:
                ON_ONE[name](every[one % len(every)], two)
            elif name in ON_NEW:
                ON_NEW[name](made, two)
            elif name == "exchange":
                _exchange(every[one % len(every)], every[two % len(every)])
            else:
                target = made if two % 2 else every[two % len(every)]
                ON_TWO[name](every[one % len(every)], target)


def plant(top: Path) -> None:
    """A tree with a bit of everything."""
    top.mkdir()
    for folder in (b"a", b"a/b", b"a/b/c", b"b", b"b/\xffe", b"c"):
        os.mkdir(os.fsencode(top) + b"/" + folder)
    for file in (b"a/a", b"a/b/a", b"a/b/c/a", b"b/a", b"b/\xffe/d", b"d"):
        with open(os.fsencode(top) + b"/" + file, "wb") as out:
            out.write(file)
    os.symlink("0", top / "a/d")
    os.mknod(top / "b/b", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    os.link(top / "d", top / "b/d")
    os.link(top / "d", top / "a/b/d")
    os.setxattr(top / "d", "user.x", b"0")
    os.chmod(top, 0o755)
    age(top)


WORDS = {
    "type": "type",
    "size": "content",
    "content": "content",
    "mode": "mode",
    "owner": "owner",
    "mtime": "times",
    "xattrs": "xattrs",
    "target": "target",
    "rdev": "device",
}


def naive(new: dict[str, Any], old: dict[str, Any]) -> set[str]:
    """Return what differs between two entries of snapshots."""
    if new["type"] != old["type"]:
        return {"type"}
    ignored = {"dir": {"mtime"}, "symlink": {"size"}}.get(new["type"], set())
    return {word for fact, word in WORDS.items() if fact not in ignored and new.get(fact) != old.get(fact)}


class Applied:
    """The merged tree as the changes tell it, put together from the lower tree."""

    def __init__(self, found: list[Change], before: Snapshot, after: Snapshot) -> None:
        self.at: dict[str, dict[str, Change]] = {}
        for change in found:
            here = self.at.setdefault(os.fsdecode(change.path) or ".", {})
            assert change.kind not in here, f"told twice: {change}"
            here[change.kind] = change
        self.sources = {os.fsdecode(c.source) for c in found if c.source is not None}
        self.before, self.after = before, after
        self.seen: set[str] = set()

    def check(self) -> None:
        self._compare(".", ".", self.at.get(".", {}))
        self._inside(".", ".")
        assert self.seen == set(self.after), "paths that no change explains"

    def _inside(self, path: str, base: str | None) -> None:
        names = {_last(p) for p in self.at if _parent(p) == path}
        if base is not None:
            names |= {_last(p) for p in self.before if _parent(p) == base}
        for name in names:
            self._entry(_join(path, name), None if base is None else _join(base, name))

    def _entry(self, path: str, natural: str | None) -> None:
        told = self.at.get(path, {})
        base = natural if natural in self.before and natural not in self.sources else None
        if "D" in told:
            assert base is not None, f"{path} was not there, or is explained by a rename"
            assert told.keys() <= {"D", "R"}
            base = None
        if "R" in told:
            assert base is None
            base = os.fsdecode(told["R"].source or b"")
        if "A" in told:
            assert base is None, f"{path} was there before"
            assert path in self.after
            self.seen.add(path)
            if self.after[path]["type"] == "dir":
                self._inside(path, None)
        elif base is None:
            assert path not in self.after, f"{path}: {told}"
        else:
            self._compare(path, base, told)
            if self.after[path]["type"] == "dir":
                self._inside(path, base if self.before[base]["type"] == "dir" else None)

    def _compare(self, path: str, base: str, told: dict[str, Change]) -> None:
        assert path in self.after, f"{path} is gone"
        change = told.get("R") or told.get("M")
        what = set(change.what) if change else set()
        assert what == naive(self.after[path], self.before[base]), f"{path} from {base}: {told}"
        assert "M" not in told or what
        self.seen.add(path)


def _join(path: str, name: str) -> str:
    return name if path == "." else f"{path}/{name}"


def _parent(path: str) -> str | None:
    return None if path == "." else path.rpartition("/")[0] or "."


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def in_order(found: list[Change]) -> bool:
    keys = [change.path.split(b"/") if change.path else [] for change in found]
    return keys == sorted(keys)


def alone(store: Path, lowers: Sequence[Path], found: list[Change]) -> None:
    """The changes at a path are the same whether only they are listed, or all that were *found*."""
    paths = {path for each in found for path in (each.path, each.source or each.path)}
    for path in sorted(paths | {path.rpartition(b"/")[0] for path in paths}):
        selection = selected([glob.escape(path)])
        there = selection.of(changes(store, lowers, selection.places))
        assert list(there) == list(selection.of(found)), path


random_histories = settings(
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Overlay:
    """The kernel's overlayfs with options of choice; without a store, the lowers alone."""

    def __init__(self, lowers: Sequence[Path], store: Path | None, at: Path, options: str) -> None:
        self.at = at
        self.options = "lowerdir=" + ":".join(map(str, lowers))
        at.mkdir(exist_ok=True)
        if store is not None:
            for name in ("upper", "work"):
                (store / name).mkdir(parents=True, exist_ok=True)
                os.chmod(store / name, 0o755)
            self.options += f",upperdir={store}/upper,workdir={store}/work"
        self.options += f",{options}"

    def __enter__(self) -> Path:
        run("mount", "-t", "overlay", "overlay", self.at, "-o", self.options)
        return self.at

    def __exit__(self, *_: object) -> None:
        run("umount", self.at)


def fresh(tmp_path: Path) -> Path:
    place = tmp_path / "example"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    plant(place / "lower")
    return place


@pytest.mark.timeout(600)  # a failure is made small before it is shown: that takes minutes
@random_histories
@given(steps=history)
def test_without_redirects_it_is_the_plain_difference(tmp_path: Path, steps: list[Any]) -> None:
    place = fresh(tmp_path)
    store, lower = place / "store", place / "lower"
    options = "redirect_dir=off,metacopy=off,index=on"
    with Overlay([lower], store, place / "merged", options) as merged:
        play(merged, steps)
    with Overlay([lower], store, place / "merged", options) as merged:
        before, after = snapshot(lower), snapshot(merged)
    found = changes(store, [lower])
    expected: dict[str, tuple[str, set[str]]] = {}
    for path in before.keys() | after.keys():
        above = _parent(path)
        if path not in after:
            if above in after and before[above]["type"] == after[above]["type"]:
                expected[path] = ("D", set())
        elif path not in before:
            expected[path] = ("A", set())
        elif what := naive(after[path], before[path]):
            expected[path] = ("M", what)
    assert {os.fsdecode(c.path) or ".": (c.kind, set(c.what)) for c in found} == expected
    assert len(found) == len(expected) and in_order(found)


@pytest.mark.timeout(600)  # a failure is made small before it is shown: that takes minutes
@random_histories
@given(steps=history)
def test_the_changes_rebuild_the_merged_tree(tmp_path: Path, steps: list[Any]) -> None:
    place = fresh(tmp_path)
    store, lower = place / "store", place / "lower"
    with Overlay([lower], store, place / "merged", ALL_ON) as merged:
        play(merged, steps)
    with Overlay([lower], store, place / "merged", ALL_ON) as merged:
        before, after = snapshot(lower), snapshot(merged)
    found = changes(store, [lower])
    Applied(found, before, after).check()
    assert in_order(found)
    alone(store, [lower], found)


@pytest.mark.timeout(600)  # a failure is made small before it is shown: that takes minutes
@random_histories
@given(first=history, second=history)
def test_several_lowers_with_marks_of_their_own(tmp_path: Path, first: list[Any], second: list[Any]) -> None:
    """The lowers are an upper of the kernel's, with all its whiteouts and redirects, and its lower."""
    place = fresh(tmp_path)
    lower, middle, store = place / "lower", place / "middle", place / "store"
    with Overlay([lower], middle, place / "merged", ALL_ON) as merged:
        play(merged, first)
    lowers = [middle / "upper", lower]
    with Overlay(lowers, None, place / "merged", "redirect_dir=follow,metacopy=on") as merged:
        before = snapshot(merged)
    with Overlay(lowers, store, place / "merged", ALL_ON) as merged:
        play(merged, second)
    with Overlay(lowers, store, place / "merged", ALL_ON) as merged:
        after = snapshot(merged)
    found = changes(store, lowers)
    Applied(found, before, after).check()
    assert in_order(found)
