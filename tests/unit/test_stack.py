"""Where the stack finds a name, and by which rule, in layers made by hand."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cowfs.layers.directory import open_directory
from cowfs.overlay.stack import Merging, Stack, Verdict
from cowfs.overlay.xattr_format import XattrFormat

FORMAT = XattrFormat(b"user.overlay.")

Layers = Callable[..., Stack]


@pytest.fixture
def layers(tmp_path: Path) -> Iterator[Layers]:
    """Build directories, topmost first, from dicts of path: text, None (a directory) or attributes."""
    with ExitStack() as opened:

        def make(*trees: dict[str, Any]) -> Stack:
            found = []
            for number, tree in enumerate(trees):
                top = tmp_path / str(number)
                top.mkdir()
                for path, what in tree.items():
                    _put(top / path, what)
                layer = open_directory(str(top))
                opened.callback(layer.close)
                found.append(layer)
            return Stack(found, FORMAT)

        yield make


def _put(at: Path, what: Any) -> None:
    at.parent.mkdir(parents=True, exist_ok=True)
    what, marks = what if isinstance(what, tuple) else (what, {})
    if what is None:
        at.mkdir(exist_ok=True)
    elif what == "whiteout":
        os.mknod(at, stat.S_IFCHR, 0)
    else:
        at.write_text(what)
    for name, value in marks.items():
        try:
            os.setxattr(at, FORMAT.prefix + name.encode(), value)
        except OSError as failure:
            pytest.skip(f"the temporary directory's filesystem has no user xattrs: {failure.strerror}")


def _said(stack: Stack, path: str, **options: Any) -> list[str]:
    """Return the rules for a path, and the layers whose inodes are found."""
    verdicts: list[Verdict] = []
    found = stack.look(stack.roots, tuple(path.encode().split(b"/")), verdicts=verdicts, **options)
    told = [
        f"{verdict.layer} {b'/'.join(verdict.path).decode()} {verdict.rule.name}"
        + (f" {verdict.redirect.decode()}" if verdict.redirect is not None else "")
        for verdict in verdicts
    ]
    return [
        *told,
        f"= {[layer for layer, _, _ in found.hits]}" + ("" if found.is_complete else " without data"),
    ]


def test_the_topmost_file_is_seen(layers: Layers) -> None:
    stack = layers({"other": "x"}, {"a": "middle"}, {"a": "bottom"})
    assert _said(stack, "a") == ["1 a SHOWN", "= [1]"]
    assert _said(stack, "nowhere") == ["= []"]


def test_directories_are_merged_until_something_is_in_the_way(layers: Layers) -> None:
    stack = layers({"a/1": ""}, {"a/2": ""}, {"a": "no directory"}, {"a/3": ""})
    assert _said(stack, "a") == ["0 a SHOWN", "1 a MERGED", "2 a NO_DIRECTORY", "= [0, 1]"]
    assert _said(stack, "a/3") == ["2 a NO_DIRECTORY", "= []"]


def test_a_whiteout_ends_the_search(layers: Layers) -> None:
    stack = layers({"a": None}, {"a": "whiteout"}, {"a/b": ""})
    assert _said(stack, "a") == ["0 a SHOWN", "1 a WHITEOUT", "= [0]"]
    assert _said(stack, "a/b") == ["1 a WHITEOUT", "= []"]


def test_an_empty_file_with_the_attribute_is_a_whiteout(layers: Layers) -> None:
    mark = {"whiteout": b"y"}
    stack = layers({"a": ("", mark), "b": ("data", mark), "c": ""}, {"a": "", "b": "", "d": ("", mark)})
    assert _said(stack, "a") == ["0 a WHITEOUT", "= []"]
    assert _said(stack, "b") == ["0 b SHOWN", "= [0]"]
    assert _said(stack, "c") == ["0 c SHOWN", "= [0]"]
    assert _said(stack, "d") == ["1 d WHITEOUT", "= []"]
    assert [bool(stack.find(stack.roots, name)) for name in (b"a", b"b", b"c", b"d")] == [0, 1, 1, 0]
    assert not stack.shows(stack.roots, b"a") and stack.shows(stack.roots, b"b")


def test_an_opaque_directory_ends_it_below(layers: Layers) -> None:
    stack = layers({"a": None}, {"a": (None, {"opaque": b"y"}), "a/b": "1"}, {"a/b": "2", "a/c": ""})
    assert _said(stack, "a") == ["0 a SHOWN", "1 a OPAQUE", "1 a MERGED", "= [0, 1]"]
    assert _said(stack, "a/c") == ["1 a OPAQUE", "= []"]


def test_a_redirect_renames_what_is_below(layers: Layers) -> None:
    stack = layers(
        {"new": (None, {"redirect": b"old"})},
        {"old/x": "1"},
        {"old": (None, {"redirect": b"/deep/er"})},
        {"deep/er/x": "3"},
    )
    assert _said(stack, "new") == [
        *("0 new REDIRECT old", "0 new SHOWN", "1 old MERGED", "2 old REDIRECT /deep/er", "2 old MERGED"),
        *("3 deep/er MERGED", "= [0, 1, 2, 3]"),
    ]
    assert _said(stack, "new/x") == ["0 new REDIRECT old", "1 old/x SHOWN", "= [1]"]


def test_a_chain_of_metacopies_has_two_ends(layers: Layers) -> None:
    meta = {"metacopy": b""}
    stack = layers(
        {"a": ("1", meta)},
        {"a": ("2", meta | {"redirect": b"b"})},
        {"b": ("3", meta)},
        {"b": "the data"},
        {"b": "hidden"},
    )
    assert _said(stack, "a") == [
        *("0 a METACOPY", "1 a REDIRECT b", "1 a INCOMPLETE", "2 b INCOMPLETE", "3 b DATA", "= [0, 3]"),
    ]


def test_a_metacopy_without_data(layers: Layers) -> None:
    stack = layers({"a": ("1", {"metacopy": b""})}, {"a/in": "the way"})
    assert _said(stack, "a") == ["0 a METACOPY", "1 a NO_FILE", "= [0] without data"]
    with pytest.raises(OSError) as raised:
        stack.search(stack.roots, (b"a",))
    assert raised.value.errno == errno.EIO


def test_a_metacopy_in_the_lowest_layer_has_no_data(layers: Layers) -> None:
    meta = {"metacopy": b""}
    stack = layers({"b": ("1", meta), "c": "whole"}, {"a": ("2", meta), "b": ("2", meta), "c": ("2", meta)})
    assert _said(stack, "a") == ["1 a METACOPY", "= [1] without data"]
    assert _said(stack, "b") == ["0 b METACOPY", "1 b INCOMPLETE", "= [0, 1] without data"]
    finds: list[Callable[[bytes], list[Any]]] = [
        lambda name: stack.find(stack.roots, name),
        lambda name: stack.search(stack.roots, (name,)),
    ]
    for find in finds:
        for name in (b"a", b"b"):
            with pytest.raises(OSError) as raised:
                find(name)
            assert raised.value.errno == errno.EIO
        assert [layer for layer, _, _ in find(b"c")] == [0]


@pytest.mark.parametrize(
    ("value", "is_wrong"), [(b"x", True), (b"xxx", True), (b"xxxx", False), (b"", False)]
)
def test_a_metacopy_that_is_too_short_to_be_one(layers: Layers, value: bytes, is_wrong: bool) -> None:
    """Like the kernel's overlayfs: EIO for one to three bytes."""
    stack = layers({"a": ("1", {"metacopy": value})}, {"a": "the data"})
    if not is_wrong:
        assert _said(stack, "a") == ["0 a METACOPY", "1 a DATA", "= [0, 1]"]
        return
    with pytest.raises(OSError) as raised:
        stack.find(stack.roots, b"a")
    assert raised.value.errno == errno.EIO


def test_under_a_directory_no_file_is_wanted(layers: Layers) -> None:
    stack = layers({"a": "a file"}, {"a/b": ""})
    assert _said(stack, "a", directories=True) == ["0 a NO_DIRECTORY", "= []"]


def test_what_nobody_asks_for_is_found_the_same(layers: Layers) -> None:
    meta = ("", {"metacopy": b"", "redirect": b"b"})
    stack = layers(
        {"a": "1", "d": None}, {"a": "2", "m": meta, "d": "whiteout"}, {"d/x": "", "b": "", "m": ""}
    )
    for name in (b"a", b"b", b"d", b"m", b"nowhere"):
        told: list[Verdict] = []
        found = [layer for layer, _, _ in stack.search(stack.roots, (name,), verdicts=told)]
        assert [layer for layer, _, _ in stack.find(stack.roots, name)] == found
    assert [layer for layer, _, _ in stack.find(stack.roots[2:], b"b")] == [2]


def test_merging_tells_each_name_once(layers: Layers) -> None:
    stack = layers(
        {"a": "", "b": "whiteout"}, {"a": "", "b": "", "c": "whiteout"}, {"b": "", "c": "", "d": ""}
    )
    merging = Merging(FORMAT)
    names = [
        entry.name
        for layer in stack.layers
        for entry in layer.readdir(layer.root)
        if merging.shows(layer, layer.root, entry)
    ]
    assert sorted(names) == [b"a", b"d"]
