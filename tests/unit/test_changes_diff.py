"""`diff` of uppers that are made by hand, with the attributes of an unprivileged overlay (user.overlay.*)."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cowfs.changes.diff import diff, steps
from cowfs.changes.render import render
from cowfs.layers import beneath
from cowfs.layers.directory import DirectoryLayer, open_directory
from cowfs.overlay.xattr_format import index_name, make_origin

PREFIX = b"user.overlay."
OLD = 1_500_000_000_000_000_001


class Tree:
    """A directory that becomes a layer."""

    def __init__(self, top: Path) -> None:
        self.top = top
        top.mkdir()

    def file(self, path: str, text: str = "text", mode: int = 0o644, **marks: bytes) -> Path:
        made = self.top / path
        made.parent.mkdir(parents=True, exist_ok=True)
        made.write_text(text)
        made.chmod(mode)
        return self._done(made, marks)

    def directory(self, path: str, **marks: bytes) -> Path:
        made = self.top / path
        made.mkdir(parents=True, exist_ok=True)
        return self._done(made, marks)

    def whiteout(self, path: str) -> None:
        made = self.top / path
        made.parent.mkdir(parents=True, exist_ok=True)
        os.mknod(made, stat.S_IFCHR, 0)

    def _done(self, made: Path, marks: dict[str, bytes]) -> Path:
        for name, value in marks.items():
            os.setxattr(made, PREFIX + name.encode(), value)
        os.utime(made, ns=(OLD, OLD))
        return made


@pytest.fixture
def tree(tmp_path: Path) -> Callable[[str], Tree]:
    try:
        os.setxattr(tmp_path, PREFIX + b"probe", b"y")
    except OSError as error:
        pytest.skip(f"the temporary directory's filesystem has no user xattrs: {error.strerror}")
    return lambda name: Tree(tmp_path / name)


@pytest.fixture
def layers() -> Iterator[Callable[..., list[DirectoryLayer]]]:
    opened: list[DirectoryLayer] = []

    def call(*trees: Tree) -> list[DirectoryLayer]:
        new = [open_directory(str(each.top)) for each in trees]
        opened.extend(new)
        return new

    yield call
    for layer in opened:
        layer.close()


@pytest.fixture
def found(layers: Any) -> Callable[..., list[str]]:
    """Return the lines of `diff` of an upper and its lowers, topmost first."""

    def call(upper: Tree, *lowers: Tree) -> list[str]:
        top, *rest = layers(upper, *lowers)
        return list(render(diff(top, top.root, rest, PREFIX)))

    return call


def test_without_a_lower_everything_is_new(tree: Any, found: Any) -> None:
    upper = tree("upper")
    upper.file("etc/fstab")
    assert found(upper) == ["A  etc/", "A  etc/fstab"]


def test_a_whiteout_of_nothing_is_nothing(tree: Any, found: Any) -> None:
    upper, lower = tree("upper"), tree("lower")
    upper.whiteout("gone")
    upper.whiteout("new/gone")
    assert found(upper, lower) == ["A  new/"]


def test_another_device_than_0_0_is_no_whiteout(tree: Any, found: Any) -> None:
    upper, lower = tree("upper"), tree("lower")
    lower.file("a")
    os.mkfifo(upper.top / "a")
    assert found(upper, lower) == ["M  a  (type)"]


def test_an_empty_file_with_the_attribute_is_a_whiteout(tree: Any, found: Any) -> None:
    """Whiteouts of the upper, and of a lower above another."""
    upper, middle, bottom = tree("upper"), tree("middle"), tree("bottom")
    for name in ("gone", "full", "both"):
        bottom.file(name)
    upper.file("gone", "", whiteout=b"y")
    upper.file("full", "other text", whiteout=b"y")
    middle.file("both", "", whiteout=b"y")
    upper.file("both")
    assert found(upper, middle, bottom) == ["A  both", "M  full  (content)", "D  gone"]


def test_private_marks_are_no_change_but_escaped_ones_are(tree: Any, found: Any) -> None:
    upper, lower = tree("upper"), tree("lower")
    for name in ("origin", "escaped"):
        lower.file(name)
    upper.file("origin", origin=b"\0\xfb\0")
    upper.file("escaped", **{"overlay.opaque": b"y"})
    assert found(upper, lower) == ["M  escaped  (xattrs user.overlay.opaque)"]


def test_an_escaped_mark_equals_the_same_in_the_lower(tree: Any, found: Any) -> None:
    upper, lower = tree("upper"), tree("lower")
    lower.file("a", **{"overlay.opaque": b"y"})
    upper.file("a", **{"overlay.opaque": b"y"})
    assert found(upper, lower) == []


def test_the_middle_layer_hides_and_renames(tree: Any, found: Any) -> None:
    upper, middle, bottom = tree("upper"), tree("middle"), tree("bottom")
    for name in ("hidden/a", "opaque/below", "old/in", "file/under", "kept"):
        bottom.file(name)
    middle.whiteout("hidden")
    middle.directory("opaque", opaque=b"y")
    middle.directory("new", redirect=b"old")
    middle.whiteout("old")
    middle.file("file")
    # The same upper on top: only names that the merged lowers lack are new.
    upper.file("hidden/a")
    upper.file("opaque/below")
    upper.file("new/in")
    upper.file("file")
    upper.file("kept")
    assert found(upper, middle, bottom) == ["A  hidden/", "A  hidden/a", "A  opaque/below"]


def test_a_redirect_is_followed_through_those_of_the_layers_below(tree: Any, found: Any) -> None:
    upper, first, second, bottom = (tree(name) for name in ("upper", "first", "second", "bottom"))
    bottom.file("a/b/c/file", "as ever")
    bottom.file("a/b/c/lost")
    second.directory("x", redirect=b"a")  # x/b/c
    first.directory("y", redirect=b"/x/b")  # y/c, from another place
    upper.directory("z", redirect=b"/y/c")
    upper.file("z/file", "as ever")
    upper.file("z/new")
    upper.whiteout("z/lost")
    assert found(upper, first, second, bottom) == ["R  y/c/ -> z/", "D  z/lost", "A  z/new"]


def test_an_opaque_directory_on_the_way_does_not_stop_a_redirect_below_it(tree: Any, found: Any) -> None:
    upper, middle, bottom = tree("upper"), tree("middle"), tree("bottom")
    bottom.file("far/file")
    bottom.file("a/hidden")
    middle.directory("a", opaque=b"y")
    middle.directory("a/b", redirect=b"/far")
    upper.whiteout("a/b")
    upper.directory("moved", redirect=b"/a/b")
    upper.file("moved/file")
    assert found(upper, middle, bottom) == ["R  a/b/ -> moved/"]


def test_a_metacopy_in_the_middle_has_its_data_below(tree: Any, found: Any) -> None:
    upper, middle, bottom = tree("upper"), tree("middle"), tree("bottom")
    for name in ("same", "other"):
        bottom.file(name, "data")
        middle.file(name, "\0\0\0\0", 0o600, metacopy=b"")
    upper.file("same", "data", 0o600)
    upper.file("other", "\0\0\0\0", 0o600)
    assert found(upper, middle, bottom) == ["M  other  (content)"]


def test_an_absolute_redirect_leads_out_of_a_renamed_directory(tree: Any, found: Any) -> None:
    """Its target is in the layers below, not in the layer with the redirect."""
    upper, middle, bottom = tree("upper"), tree("middle"), tree("bottom")
    bottom.file("p/other")
    bottom.file("x/b/old")
    middle.directory("p/y", redirect=b"/x/b")
    middle.file("x/b/made-since")
    middle.directory("x/b", opaque=b"y")
    upper.file("p/y/old")
    upper.file("p/y/made-since")
    assert found(upper, middle, bottom) == ["A  p/y/made-since"]


def test_a_directory_hides_a_file_below_it(tree: Any, found: Any) -> None:
    upper, middle, bottom = tree("upper"), tree("middle"), tree("bottom")
    bottom.file("a")
    middle.file("a/x")
    upper.directory("a", opaque=b"y")
    assert found(upper, middle, bottom) == ["D  a/x"]


def test_a_metacopy_has_no_data_in_a_directory(tree: Any, found: Any) -> None:
    upper, middle, bottom = tree("upper"), tree("middle"), tree("bottom")
    bottom.directory("a")
    middle.file("a", "data", metacopy=b"")
    upper.file("a", "DATA")
    assert found(upper, middle, bottom) == ["M  a  (content)"]


@pytest.mark.parametrize(
    ("new", "old"), [((9,), (1, 9)), ((1, 9), (9,)), ((1, 9), (9, 1)), ((), (5,)), ((5,), ())]
)
def test_data_where_the_other_has_a_hole(tree: Any, found: Any, new: Any, old: Any) -> None:
    upper, lower = tree("upper"), tree("lower")
    for top, where in ((upper, new), (lower, old)):
        path = top.file("a", "")
        with path.open("r+b") as out:
            out.truncate(12 << 20)
            for position in where:
                out.seek(position << 20)
                out.write(b"island")
        os.utime(path, ns=(OLD, OLD))
    assert found(upper, lower) == ([] if sorted(new) == sorted(old) else ["M  a  (content)"])


def test_a_hole_at_the_end_is_content(tree: Any, found: Any) -> None:
    upper, lower = tree("upper"), tree("lower")
    whole_blocks = "x" * (1 << 16)
    lower.file("a", whole_blocks)
    os.truncate(upper.file("a", whole_blocks), 1 << 20)
    os.utime(upper.top / "a", ns=(OLD, OLD))
    assert found(upper, lower) == ["M  a  (content)"]


def test_a_metacopy_is_compared_without_its_data(tree: Any, found: Any) -> None:
    upper, lower = tree("upper"), tree("lower")
    for name in ("quiet", "mode"):
        lower.file(name, "data")
    upper.file("quiet", "\0\0\0\0", metacopy=b"")
    upper.file("mode", "\0\0\0\0", 0o600, metacopy=b"")
    assert found(upper, lower) == ["M  mode  (mode)"]


def test_a_redirect_to_nothing_is_none(tree: Any, found: Any) -> None:
    upper, lower = tree("upper"), tree("lower")
    lower.file("file")
    upper.directory("a", redirect=b"missing")
    upper.directory("b", redirect=b"/file")
    upper.file("c", metacopy=b"", redirect=b"missing")
    upper.whiteout("file")
    assert found(upper, lower) == ["A  a/", "A  b/", "A  c"]


@pytest.mark.parametrize("value", [b"", b"/", b"a/b", b"/a//b", b"/a/../b", b".."])
def test_a_damaged_redirect_is_an_error(tree: Any, found: Any, value: bytes) -> None:
    upper, lower = tree("upper"), tree("lower")
    upper.directory("a", redirect=value)
    with pytest.raises(OSError, match="invalid redirect") as raised:
        found(upper, lower)
    assert raised.value.errno == errno.EINVAL


def test_an_index_entry_changes_every_name_of_its_inode(tree: Any, layers: Any, tmp_path: Path) -> None:
    upper, lower = tree("upper"), tree("lower")
    lower.file("deep/er/one")
    os.link(lower.top / "deep/er/one", lower.top / "two")
    lower.file("other")
    os.link(lower.top / "other", lower.top / "deep/another")
    top, below = layers(upper, lower)
    hit = below.lookup(below.root, b"two")
    handle = below.handle(hit[0])
    if handle is None:
        pytest.skip("the temporary directory's filesystem has no file handles")
    index = Tree(tmp_path / "upper/index")
    name = index_name(make_origin(handle)).decode()
    index.file(name, "changed")
    index.file("00fb" + "0" * 40)  # of a missing inode
    index.file("#1")
    # An upper has no such directory: it is shown as new, which proves that it is not an alias.
    key = top.lookup(top.root, b"index")[0]
    lines = [text for text in render(diff(top, top.root, [below], PREFIX, key)) if "index" not in text]
    assert lines == ["M  deep/er/one  (content)", "M  two  (content)"]


def test_a_caller_gets_its_turn_between_inodes_and_within_large_files(tree: Any, layers: Any) -> None:
    upper, lower = tree("upper"), tree("lower")
    for top in (upper, lower):
        top.file("large", "x" * (5 << 20))
        for number in range(20):
            top.file(f"d/{number}")
    top, below = layers(upper, lower)
    turns = list(steps(top, top.root, [below], PREFIX))
    assert set(turns) == {None}
    assert len(turns) >= 5 + 20 + 20


@pytest.mark.parametrize("within", [(), (b"dir",)])
def test_a_caller_gets_its_turn_within_long_listings(
    tree: Any, layers: Any, monkeypatch: pytest.MonkeyPatch, within: tuple[bytes, ...]
) -> None:
    """Those of the store, of a replaced directory, and of the lowers that are searched for hard links."""
    upper, lower = tree("upper"), tree("lower")
    many = [f"{number:03}" for number in range(100)]
    for name in many:
        upper.file(f"dir/{name}")
        lower.file(f"dir/old {name}")
    upper.directory("dir", opaque=b"y")
    first = lower.file("linked/here")
    os.link(first, lower.directory("linked") / "there")
    above, below = layers(upper, lower)
    hit = below.lookup(below.lookup(below.root, b"linked")[0], b"here")
    index = upper.directory("index")
    upper.file(f"index/{index_name(make_origin(below.handle(hit[0]))).decode()}", "changed")
    read: list[int] = []
    pieces = beneath.pieces

    def seen(*arguments: Any) -> Iterator[list[Any]]:
        for some in pieces(*arguments):
            read.append(len(some))
            yield some

    monkeypatch.setattr(beneath, "_MANY", 10)
    monkeypatch.setattr(beneath, "pieces", seen)
    longest = 0
    at = above.lookup(above.root, os.fsencode(index.name))[0]
    for _ in steps(above, above.root, [below], PREFIX, at, within=within):
        longest = max(longest, sum(read))
        read.clear()
    assert 0 < longest <= 10


def test_a_second_name_in_the_place_of_another_file(tree: Any, found: Any) -> None:
    """The data of a linked metacopy is where its redirect says, not below the new name."""
    upper, lower = tree("upper"), tree("lower")
    lower.file("a", "aaaa")
    lower.file("b", "bbbb")
    upper.file("a", "\0\0\0\0", metacopy=b"", redirect=b"/a")
    os.link(upper.top / "a", upper.top / "b")
    assert found(upper, lower) == ["M  b  (content)"]


class Busy:
    """A layer in use: before call number *moment*, another program removes *victim*."""

    def __init__(self, layer: DirectoryLayer, victim: Path, moment: int) -> None:
        self._layer, self._victim, self._left = layer, victim, moment
        self.root = layer.root

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._layer, name)
        if not callable(call) or name == "forget":
            return call

        def counted(*arguments: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                run = shutil.rmtree if self._victim.is_dir() else os.unlink
                run(self._victim)
            return call(*arguments)

        return counted

    @property
    def calls(self) -> int:
        """How often it was called, if *moment* was -1."""
        return -1 - self._left

    @property
    def struck(self) -> bool:
        return self._left <= 0


def test_of_one_path_nothing_else_is_read(tree: Any, layers: Any) -> None:
    """Nor if it was added or changed in place; if it is gone, it may have been renamed to anywhere."""
    upper, lower = tree("upper"), tree("lower")
    for name in ("etc/fstab", "etc/hosts", "many/old"):
        lower.file(name)
    for number in range(500):
        upper.file(f"many/{number}", "new")
    upper.file("etc/new/file")
    upper.whiteout("etc/hosts")
    top, below = layers(upper, lower)
    origin = make_origin(below.handle(below.lookup(below.lookup(below.root, b"etc")[0], b"fstab")[0]))
    upper.file("etc/fstab", "TEXT", origin=origin)
    for path, line, most in [
        (b"etc/fstab", "M  etc/fstab  (content)", 50),
        (b"etc/new/file", "A  etc/new/file", 50),
        (b"etc/hosts", "D  etc/hosts", 2000),
    ]:
        counting: Any = Busy(top, upper.top, -1)
        assert list(render(diff(counting, top.root, [below], PREFIX, within=[path])))[-1] == line
        assert 0 < counting.calls < most


@pytest.mark.parametrize("victim", ["d", "d/e", "d/e/f", "m", "m/n", "link"])
def test_what_goes_meanwhile_is_left_out(tree: Any, layers: Any, victim: str, tmp_path: Path) -> None:
    lower = tree("lower")
    lower.file("m/n")
    os.symlink("a", lower.top / "link")
    for moment in range(1, 1000):
        upper = tree(f"upper{moment}")
        upper.file("d/e/f")
        upper.file("m/n", "TEXT")
        os.symlink("b", upper.top / "link")
        upper.file("stays")
        top, below = layers(upper, lower)
        busy: Any = Busy(top, upper.top / victim, moment)
        assert list(render(diff(busy, top.root, [below], PREFIX)))[-1] == "A  stays"
        top.close()
        below.close()
        if not busy.struck:
            break
    else:
        pytest.fail("it never ends")
    assert moment > 20
