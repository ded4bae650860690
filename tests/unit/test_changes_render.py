"""Changes as text and as JSON lose nothing, and are unambiguous."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cowfs.changes.render import Summary, escape, from_json, json_line, line, render, to_json, unescape
from cowfs.types import Change

# The characters with a meaning in a line are frequent: spaces, arrows, brackets, slashes, escapes.
nasty = st.lists(
    st.sampled_from(
        [b" ", b"->", b"(", b")", b"\\", b"\n", b"a", b"\xff", "é".encode(), b"\033[31m", b"040"]
    ),
    max_size=8,
).map(b"".join)
path = st.one_of(nasty, st.binary(max_size=12).map(lambda raw: raw.replace(b"\0", b"")))
whats = st.lists(st.sampled_from(["content", "mode", "owner"]), unique=True).map(tuple)
types = st.sampled_from(["file", "directory", "symlink"])
changes = st.one_of(
    st.builds(Change, st.sampled_from("AMD"), path, whats, type=types),
    st.builds(Change, st.just("R"), path, whats, path, types),
)


@settings(deadline=None)
@given(path)
def test_an_escaped_path_can_be_read_back(raw: bytes) -> None:
    shown = escape(raw)
    assert unescape(shown) == raw
    assert shown.isprintable()  # no control characters: names cannot drive the terminal


@settings(deadline=None)
@given(changes, changes)
def test_no_two_changes_look_the_same(one: Change, two: Change) -> None:
    assert (line(one) == line(two)) == _same(one, two)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (Change("R", b"b -> c", (), b"a"), Change("R", b"c", (), b"a -> b")),
        (Change("A", b"x ->"), Change("A", b"x\\040->")),
        (Change("M", b"x  (mode)", ("owner",)), Change("M", b"x", ("mode",))),
        (Change("M", b"x ", ("mode",)), Change("M", b"x", ("mode",))),
        (Change("A", b"a\nb"), Change("A", b"a\\nb")),
        (Change("A", b"\xff"), Change("A", b"\\377")),
    ],
)
def test_names_that_look_like_ours(one: Change, two: Change) -> None:
    assert line(one) != line(two)
    for change in (one, two):
        if change.source is not None:
            assert line(change).count(" -> ") == 1


def _same(one: Change, two: Change) -> bool:
    """Both are equal in the text, which does not show the types of non-directories."""
    slash = [change.type == "directory" for change in (one, two)]
    # A directory `a` and a file `a/` would look alike, but no file has a slash at its end.
    paths = [
        (c.path + b"/" * s, c.source and c.source + b"/" * s) for c, s in zip((one, two), slash, strict=True)
    ]
    sources = [change.source is None for change in (one, two)]
    return paths[0] == paths[1] and sources[0] == sources[1] and (one.kind, one.what) == (two.kind, two.what)


@settings(deadline=None)
@given(changes)
def test_json_is_exact(change: Change) -> None:
    text = json_line(change)
    assert "\n" not in text and text.isascii()
    assert from_json(json.loads(text)) == change


def test_lines() -> None:
    found = [
        Change("M", b"", ("mode",), type="directory"),
        Change("A", b"etc/new.conf"),
        Change("D", b"usr/share/doc", type="directory"),
        Change("M", b"etc/fstab", ("content", "times")),
        Change("R", b"new", ("mode",), b"old/dir", "directory"),
        Change("A", b"two\nlines \xff"),
        Change("A", "naïve file".encode()),
    ]
    assert list(render(found)) == [
        "M  /  (mode)",
        "A  etc/new.conf",
        "D  usr/share/doc/",
        "M  etc/fstab  (content, times)",
        "R  old/dir/ -> new/  (mode)",
        "A  two\\nlines \\377",
        "A  naïve file",
    ]


def test_colour() -> None:
    assert line(Change("D", b"x"), colour=True) == "\033[31mD  x\033[0m"


def test_json_objects() -> None:
    assert to_json(Change("M", b"etc/fstab", ("content",))) == {
        "kind": "M",
        "path": "etc/fstab",
        "type": "file",
        "what": ["content"],
        "source": None,
    }
    named = Change("M", b"a", ("mode", "xattrs"), xattrs=(b"system.posix_acl_access", b"user.a b\xff"))
    assert to_json(named)["xattrs"] == ["system.posix_acl_access", r"user.a b\377"]
    assert from_json(to_json(named)) == named
    assert line(named) == r"M  a  (mode, xattrs system.posix_acl_access user.a\040b\377)"
    found = to_json(Change("R", b"\xff", (), b"\xfe", "directory"))
    assert (found["path"], found["path_b64"]) == ("\ufffd", "/w==")
    assert (found["source"], found["source_b64"]) == ("\ufffd", "/g==")


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"kind": "A"},
        {"kind": "X", "path": "a", "type": "file", "what": []},
        [],
        {"kind": "A", "path": 1, "what": [], "type": "file"},
        {"kind": "M", "path": "a", "what": ["xattrs"], "type": "file", "xattrs": [1]},
    ],
)
def test_what_is_no_change_is_refused(entry: object) -> None:
    with pytest.raises(ValueError, match="not a change"):
        from_json(entry)  # type: ignore[arg-type]


def test_summary() -> None:
    summary = Summary()
    assert str(summary) == "no changes"
    kinds = ["A", "D", "A", "M", "R"]
    assert [c.kind for c in summary.counted(Change(kind, b"x") for kind in kinds)] == kinds
    assert str(summary) == "2 added, 1 modified, 1 deleted, 1 renamed"
    assert summary.total == 5
