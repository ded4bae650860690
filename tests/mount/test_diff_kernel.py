"""`diff` of stores that the kernel's own overlayfs wrote, against what really differs."""

from __future__ import annotations

import errno
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

from cowfs.changes.diff import diff
from cowfs.changes.render import render
from cowfs.layers.directory import open_directory
from cowfs.linux.files import RENAME_EXCHANGE, renameat2
from cowfs.types import Change
from tests.support.mounts import kernel_overlay
from tests.support.system import needs_root, run
from tests.support.tree import Snapshot, snapshot

pytestmark = [needs_root, pytest.mark.root]

OLD = 1_500_000_000_123_456_789
ALL_ON = "redirect_dir=on,metacopy=on,index=on,xino=on"


def changes(store: Path, lowers: Sequence[Path]) -> list[Change]:
    """What `diff` says about a store."""
    upper = open_directory(str(store))
    layers = [open_directory(str(lower)) for lower in lowers]
    descriptors = len(os.listdir("/proc/self/fd"))
    try:
        root = upper.lookup(upper.root, b"upper")
        work = upper.lookup(upper.root, b"work")
        assert root and work
        index = upper.lookup(work[0], b"index")
        return list(diff(upper, root[0], layers, b"trusted.overlay.", index[0] if index else None))
    finally:
        upper.close()
        for layer in layers:
            layer.close()
        assert len(os.listdir("/proc/self/fd")) <= descriptors


def lines(store: Path, *lowers: Path) -> list[str]:
    return list(render(changes(store, lowers)))


def age(top: Path) -> None:
    """Give everything an old mtime that no test sets by accident."""
    for folder, names, files in os.walk(top, topdown=False):
        for name in names + files:
            os.utime(os.path.join(folder, name), ns=(OLD, OLD), follow_symlinks=False)
    os.utime(top, ns=(OLD, OLD))


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    top = tmp_path / "lower"
    for name in ("etc", "usr/share/doc/pkg", "var/log", "empty", "old/deep"):
        (top / name).mkdir(parents=True)
    (top / "etc/fstab").write_text("/dev/sda1 / ext3\n")
    (top / "etc/hosts").write_text("localhost\n")
    (top / "usr/share/doc/pkg/README").write_text("read me\n")
    (top / "usr/share/doc/NEWS").write_text("news\n")
    (top / "big").write_bytes(os.urandom(3 << 20))
    (top / "old/inside").write_text("inside\n")
    (top / "old/deep/er").write_text("er\n")
    (top / "link").symlink_to("etc/fstab")
    (top / "one").write_text("linked\n")
    os.link(top / "one", top / "etc/two")
    os.link(top / "one", top / "old/deep/three")
    os.mknod(top / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    age(top)
    return top


@pytest.fixture
def edit(tmp_path: Path, lower: Path) -> Callable[..., list[str]]:
    """Run a function on the merged tree of the kernel, unmount, and return the lines of `diff`."""

    def call(work: Callable[[Path], object]) -> list[str]:
        with kernel_overlay([lower], tmp_path / "store", tmp_path / "merged") as merged:
            work(merged)
        return lines(tmp_path / "store", lower)

    return call


def test_nothing(edit: Any) -> None:
    assert edit(lambda m: None) == []


def test_a_copy_up_is_no_change_and_neither_are_its_directories(edit: Any) -> None:
    def work(m: Path) -> None:
        for path in (m / "usr/share/doc/pkg/README", m / "etc/fstab"):
            with path.open("r+"):
                pass
        os.chmod(m / "big", 0o600)
        os.chmod(m / "big", 0o644)

    assert edit(work) == []


def test_added(edit: Any) -> None:
    def work(m: Path) -> None:
        (m / "etc/new.d/sub").mkdir(parents=True)
        (m / "etc/new.d/a.conf").write_text("a")
        (m / "etc/ptr").symlink_to("nowhere")
        os.mkfifo(m / "etc/pipe")

    assert edit(work) == [
        "A  etc/new.d/",
        "A  etc/new.d/a.conf",
        "A  etc/new.d/sub/",
        "A  etc/pipe",
        "A  etc/ptr",
    ]


def test_each_way_to_modify(edit: Any) -> None:
    def work(m: Path) -> None:
        with (m / "etc/fstab").open("a") as out:
            out.write("more")
        (m / "etc/hosts").write_text("LOCALHOST\n")  # the same size
        os.utime(m / "etc/hosts", ns=(OLD, OLD))
        os.utime(m / "usr/share/doc/NEWS", ns=(OLD, OLD + 1))
        os.chmod(m / "usr", 0o700)
        os.chown(m / "big", 12, 34)
        os.setxattr(m / "big", "user.comment", b"x")
        os.unlink(m / "link")
        os.symlink("etc/hosts", m / "link")
        os.utime(m / "link", ns=(OLD, OLD), follow_symlinks=False)
        os.unlink(m / "null")
        os.mknod(m / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 5))
        os.chmod(m / "null", stat.S_IMODE(0o666 & ~0o022))
        os.utime(m / "null", ns=(OLD, OLD))
        shutil.rmtree(m / "old")
        (m / "old").write_text("a file now")
        os.unlink(m / "usr/share/doc/pkg/README")
        (m / "usr/share/doc/pkg/README").mkdir()

    assert edit(work) == [
        "M  big  (owner, xattrs user.comment)",
        "M  etc/fstab  (content, times)",
        "M  etc/hosts  (content)",
        "M  link  (target)",
        "M  null  (device)",
        "M  old  (type)",
        "M  usr/  (mode)",
        "M  usr/share/doc/NEWS  (times)",
        "M  usr/share/doc/pkg/README/  (type)",
    ]


def test_the_last_byte_of_a_large_file_counts(edit: Any) -> None:
    def work(m: Path) -> None:
        with (m / "big").open("r+b") as out:
            out.seek(-1, os.SEEK_END)
            last = out.read(1)
            out.seek(-1, os.SEEK_END)
            out.write(bytes([last[0] ^ 1]))
        os.utime(m / "big", ns=(OLD, OLD))

    assert edit(work) == ["M  big  (content)"]


def test_holes_are_compared_as_zeros(edit: Any, lower: Path) -> None:
    for name in ("sparse", "other"):
        with (lower / name).open("wb") as out:
            out.truncate(1 << 40)  # reading it would take hours
            out.seek(5 << 20)
            out.write(b"island")
    age(lower)

    def work(m: Path) -> None:
        for name in ("sparse", "other"):
            with (m / name).open("r+b") as out:
                out.seek((1 << 40) - 9)
                out.write(b"x" if name == "other" else b"\0")
            os.utime(m / name, ns=(OLD, OLD))

    assert edit(work) == ["M  other  (content)"]


def test_deleted_directories_are_one_line(edit: Any) -> None:
    def work(m: Path) -> None:
        shutil.rmtree(m / "usr/share/doc")
        os.unlink(m / "etc/hosts")

    assert edit(work) == ["D  etc/hosts", "D  usr/share/doc/"]


def test_a_directory_made_anew(edit: Any) -> None:
    def work(m: Path) -> None:
        shutil.rmtree(m / "usr/share/doc")
        (m / "usr/share/doc").mkdir()
        (m / "usr/share/doc/NEWS").write_text("news\n")
        os.utime(m / "usr/share/doc/NEWS", ns=(OLD, OLD))
        (m / "usr/share/doc/more").touch()

    assert edit(work) == ["A  usr/share/doc/more", "D  usr/share/doc/pkg/"]


def test_directories_in_a_directory_made_anew(edit: Any) -> None:
    """The kernel marks only the topmost as opaque: what is in it shows nothing of the lower either."""

    def work(m: Path) -> None:
        shutil.rmtree(m / "usr")
        (m / "usr/share/doc").mkdir(parents=True)

    assert edit(work) == ["D  usr/share/doc/NEWS", "D  usr/share/doc/pkg/"]


def test_a_directory_returns_to_where_another_took_the_place_of_its_parent(edit: Any) -> None:
    def work(m: Path) -> None:
        os.rename(m / "old", m / "new")
        (m / "old").mkdir()
        os.rename(m / "new/deep", m / "old/deep")

    # `old` is `new` now, so seen from there `deep` did move.
    assert edit(work) == ["R  old/ -> new/", "A  old/", "R  old/deep/ -> old/deep/"]


def test_a_renamed_directory_explains_itself(edit: Any) -> None:
    def work(m: Path) -> None:
        os.rename(m / "old", m / "new")
        (m / "new/inside").write_text("changed\n")
        os.unlink(m / "new/deep/er")
        os.rename(m / "new/deep", m / "etc/depth")
        os.chmod(m / "etc/depth", 0o700)
        (m / "old").mkdir()

    assert edit(work) == [
        "R  old/deep/ -> etc/depth/  (mode)",
        "D  etc/depth/er",
        "R  old/ -> new/",
        "M  new/inside  (content, times)",
        "A  old/",
    ]


def test_renamed_within_its_directory_and_back(edit: Any) -> None:
    def work(m: Path) -> None:
        os.rename(m / "old/deep", m / "old/shallow")
        os.rename(m / "usr/share", m / "usr/elsewhere")
        os.rename(m / "usr/elsewhere", m / "usr/share")

    assert edit(work) == ["R  old/deep/ -> old/shallow/"]


def test_a_renamed_directory_returns_to_one_made_anew(edit: Any) -> None:
    def work(m: Path) -> None:
        os.rename(m / "old/deep", m / "aside")
        shutil.rmtree(m / "old")
        (m / "old").mkdir()
        os.rename(m / "aside", m / "old/deep")

    assert edit(work) == ["D  old/inside"]


def test_exchanged(edit: Any) -> None:
    def work(m: Path) -> None:
        fd = os.open(m, os.O_RDONLY)
        renameat2(fd, b"old", fd, b"etc", RENAME_EXCHANGE)
        os.close(fd)

    assert edit(work) == ["R  old/ -> etc/", "R  etc/ -> old/"]


def test_a_rename_over_another(edit: Any) -> None:
    def work(m: Path) -> None:
        os.rename(m / "old", m / "empty")
        os.rename(m / "big", m / "etc/hosts")

    assert edit(work) == [
        "D  empty/",
        "R  old/ -> empty/",
        "D  etc/hosts",
        "R  big -> etc/hosts",
    ]


def test_a_renamed_file(edit: Any) -> None:
    def work(m: Path) -> None:
        os.rename(m / "big", m / "huge")
        os.chmod(m / "huge", 0o600)
        os.rename(m / "etc/hosts", m / "etc/guests")
        with (m / "etc/guests").open("a") as out:  # brings the data up: nothing tells any more
            out.write("x")

    assert edit(work) == ["A  etc/guests", "D  etc/hosts", "R  big -> huge  (mode)"]


def test_a_second_name_is_no_rename(edit: Any) -> None:
    def work(m: Path) -> None:
        os.link(m / "big", m / "another")

    assert edit(work) == ["A  another"]


def test_all_names_of_a_hard_link_change(edit: Any) -> None:
    assert edit(lambda m: os.chmod(m / "one", 0o600)) == [
        "M  etc/two  (mode)",
        "M  old/deep/three  (mode)",
        "M  one  (mode)",
    ]


def test_hard_links_below_a_renamed_directory(edit: Any) -> None:
    def work(m: Path) -> None:
        os.rename(m / "old", m / "new")
        (m / "one").write_text("LINKED\n")
        os.unlink(m / "etc/two")

    assert edit(work) == [
        "D  etc/two",
        "R  old/ -> new/",
        "M  new/deep/three  (content, times)",
        "M  one  (content, times)",
    ]


def test_names_that_are_not_text(edit: Any) -> None:
    def work(m: Path) -> None:
        (m / "two\nlines").touch()
        with open(os.fsencode(m) + b"/\xff\x01", "w"):
            pass
        (m / ("n" * 255)).touch()

    assert edit(work) == ["A  " + "n" * 255, "A  two\\nlines", "A  \\377\\001"]


def test_deeper_than_a_path_can_be(edit: Any, tmp_path: Path) -> None:
    depth = 1200  # more than the interpreter's stack, too

    def work(m: Path) -> None:
        here = os.open(m, os.O_RDONLY)
        for _ in range(depth):
            os.mkdir("deep-down", dir_fd=here)
            there = os.open("deep-down", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = there
        os.close(here)

    try:
        assert len(edit(work)) == depth
    finally:
        run("rm", "-rf", tmp_path / "store")  # pytest's own clean-up would drown in it


def test_modes_of_the_root_itself(edit: Any, lower: Path) -> None:
    os.chmod(lower, 0o711)
    assert edit(lambda m: os.chmod(m, 0o755)) == ["M  /  (mode)"]


def test_an_upper_that_knows_whole_seconds_only(tmp_path: Path, lower: Path) -> None:
    """On ext3 with inodes of 128 bytes a copy-up loses the nanoseconds: that is no change."""
    image, place = tmp_path / "image", tmp_path / "mnt"
    place.mkdir()
    with image.open("wb") as out:
        out.truncate(16 << 20)
    run("mke2fs", "-q", "-t", "ext3", "-I", "128", image)
    run("mount", "-o", "loop", image, place)
    try:
        with kernel_overlay([lower], place / "store", tmp_path / "merged") as merged:
            os.chmod(merged / "etc/fstab", 0o600)
            os.utime(merged / "etc/hosts", ns=(OLD, OLD + 2_000_000_000))
        assert lines(place / "store", lower) == ["M  etc/fstab  (mode)", "M  etc/hosts  (times)"]
    finally:
        run("umount", place)


# --- random histories, against a comparison of the two whole trees

NAMES = [b"a", b"b", b"c", b"d", b"\xffe"]


def paths(top: Path) -> tuple[list[bytes], list[bytes]]:
    """All paths in a tree, and those of directories."""
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
    """What differs between two entries of snapshots."""
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
