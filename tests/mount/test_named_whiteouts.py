"""Lowers whose whiteouts are names: branches of aufs, and layers of OCI images (-o whiteouts=)."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import pytest

from tests.support.mounts import cowfs, mounted
from tests.support.squashfs import mksquashfs
from tests.support.system import as_nobody_prefix, needs_fuse, needs_root, run

pytestmark = needs_fuse
DEV_FUSE_AT_NIGHT = True

Tree = dict[str, "Tree | str"]


def tree(top: Path) -> Tree:
    """Return the tree of a directory by name: contents of files, and directories."""
    listed = {entry.name for entry in os.scandir(top)}
    shown: Tree = {}
    for name in sorted(listed):
        path = top / name
        shown[name] = tree(path) if path.is_dir() else path.read_text()
    return shown


def put(top: Path, content: Tree) -> None:
    """Make a tree; what is there stays."""
    top.mkdir(exist_ok=True, parents=True)
    for name, what in content.items():
        if isinstance(what, str):
            (top / name).write_text(what)
        else:
            put(top / name, what)


BOTTOM: Tree = {
    "etc": {"passwd": "root", "motd": "old", "conf.d": {"a": "a", "b": "b"}},
    "var": {"log": {"one": "1"}, "file": "below"},
    "gone": {"deep": {"x": "x"}},
    "plain": "plain",
    "both": {"low": "low"},
}
TOP: Tree = {
    "etc": {".wh.motd": "", "conf.d": {".wh..wh..opq": "", "c": "c"}},
    "var": {"log": {".wh.one": "", "two": "2"}, ".wh.file": ""},
    ".wh.gone": "",
    ".wh.both": "",
    "both": {"top": "top"},
    ".wh..wh.aufs": "",
    ".wh..wh.plnk": {"1.2": "plink"},
    ".wh..wh.orph": {},
}
MERGED: Tree = {
    "etc": {"passwd": "root", "conf.d": {"c": "c"}},
    "var": {"log": {"two": "2"}},
    "plain": "plain",
}


@pytest.fixture
def layers(tmp_path: Path) -> list[Path]:
    top, bottom = tmp_path / "top", tmp_path / "bottom"
    put(top, TOP)
    put(bottom, BOTTOM)
    return [top, bottom]


def test_layers_in_the_storage_of_containers(tmp_path: Path) -> None:
    """podman and buildah have them in overlay/ID/diff: nobody has to say how their whiteouts are written."""
    storage = tmp_path / "storage/overlay"
    top, bottom = (storage / (digit * 64) / "diff" for digit in "ab")
    for layer, name in ((top, ".wh.gone"), (bottom, "gone"), (bottom, "kept")):
        layer.mkdir(parents=True, exist_ok=True)
        (layer / name).touch()
        (layer.parent / "link").write_text("SHORT")
    (storage / "l").mkdir()
    (storage / "l/SHORT").symlink_to(f"../{'a' * 64}/diff")
    for above in top, storage / "l/SHORT":
        with mounted([above, bottom], tmp_path / "m") as mount:
            assert os.listdir(mount.path) == ["kept"]
    with mounted([top, bottom], tmp_path / "m", options=["whiteouts=overlayfs"]) as mount:
        assert set(os.listdir(mount.path)) == {".wh.gone", "gone", "kept"}


@pytest.mark.parametrize("style", ["auto", pytest.param("aufs", marks=pytest.mark.nightly), "oci"])
def test_merged_and_changed(layers: list[Path], tmp_path: Path, style: str) -> None:
    expected = dict(MERGED)
    if style == "oci":  # the whiteout says nothing of its own layer
        expected["both"] = {"top": "top"}
    store = tmp_path / "store"
    options = [] if style == "auto" else [f"whiteouts={style}"]
    with mounted(layers, tmp_path / "m", store, options=options) as mount:
        top = mount.path
        assert tree(top) == expected
        for name in (".wh.gone", ".wh..wh.aufs", "gone", "etc/motd", "etc/.wh.motd", "etc/conf.d/a"):
            assert not os.path.lexists(top / name), name
        assert os.listxattr(top / "etc/conf.d") == []
        (top / "gone").mkdir()  # over whiteouts of the lower, and below them
        (top / "etc/motd").write_text("new")
        (top / "etc/conf.d/c").unlink()
        (top / "etc/conf.d").rmdir()
        (top / "etc/.wh.passwd").write_text("a plain name in the store")
        expected |= {
            "gone": {},
            "etc": {"passwd": "root", "motd": "new", ".wh.passwd": "a plain name in the store"},
        }
        assert tree(top) == expected
        live = cowfs("diff", top, check=True).stdout
    assert "A  gone" in live.replace("A ", "A  ") or "gone" in live
    again = cowfs("diff", store, check=True).stdout
    assert again == live
    told = json.loads(cowfs("info", store, "--json", check=True).stdout)
    fingerprint = told["lowers"][0]["fingerprint"]
    assert fingerprint.startswith("whiteouts-oci:" if style == "oci" else "whiteouts-aufs:")
    refused = cowfs(
        "mount", ":".join(map(str, layers)), tmp_path / "m", "--store", store, "-o", "whiteouts=overlayfs"
    )
    assert refused.returncode and "belongs to" in refused.stderr and "whiteouts of" in refused.stderr
    with mounted(layers, tmp_path / "m", store, options=options) as mount:
        assert tree(mount.path) == expected


def test_overlayfs_lowers_show_such_names(tmp_path: Path) -> None:
    """Nothing is known of them unless it is asked for, or aufs has been there."""
    put(tmp_path / "low", {"file": "x", ".wh.file": "y", "d": {".wh..wh..opq": ""}})
    with mounted(tmp_path / "low", tmp_path / "m") as mount:
        assert tree(mount.path) == {"file": "x", ".wh.file": "y", "d": {".wh..wh..opq": ""}}
    with mounted(tmp_path / "low", tmp_path / "m", options=["whiteouts=aufs"]) as mount:
        assert tree(mount.path) == {"d": {}}


@needs_root
def test_squashfs_modules(layers: list[Path], tmp_path: Path) -> None:
    """Stack squashfs modules as Slax, Porteus and Puppy do."""
    images = []
    for layer in layers:
        images.append(tmp_path / f"{layer.name}.sb")
        run("mksquashfs", layer, images[-1], "-quiet", "-no-progress", check=True)
    with mounted(images, tmp_path / "m", tmp_path / "store", options=["whiteouts=aufs"]) as mount:
        assert tree(mount.path) == MERGED
        said = cowfs("explain", mount.path / "etc" / "motd").stdout
        assert "whiteout" in said


# --- any layers


def _random_layer(chance: random.Random, depth: int = 0) -> Tree:
    layer: Tree = {}
    for name in "abcd":
        kind = chance.choice(["file", "dir", "dir", "hidden", "none", "none"])
        if kind == "file":
            layer[name] = f"{chance.random()}"
        elif kind == "hidden":
            layer[f".wh.{name}"] = ""
        elif kind == "dir" and depth < 3:
            below = layer[name] = _random_layer(chance, depth + 1)
            if chance.random() < 0.3:
                below[".wh..wh..opq"] = ""
    return layer


def _merge(layers: list[Tree]) -> Tree:
    """Merge layers, topmost first, as the manual of aufs has it."""
    merged: Tree = {}
    names = {name for layer in layers for name in layer if not name.startswith(".wh.")}
    for name in sorted(names):
        below: list[Tree] = []
        for layer in layers:
            if f".wh.{name}" in layer:
                break
            what = layer.get(name)
            if isinstance(what, str):
                if not below:
                    merged[name] = what
                break
            if what is not None:
                below.append(what)
                if ".wh..wh..opq" in what:
                    break
        if below:
            merged[name] = _merge(below)
    return merged


def test_any_layers(tmp_path: Path) -> None:
    chance = random.Random(2026)
    kinds = [[_random_layer(chance) for _ in range(3)] for _ in range(40)]
    layers: list[Path] = []
    for number in range(3):  # one mount shows all of them
        put(tmp_path / f"{number}", {f"case{case}": kind[number] for case, kind in enumerate(kinds)})
        layers.append(tmp_path / f"{number}")
    with mounted(layers, tmp_path / "m", options=["whiteouts=aufs"]) as mount:
        for case, kind in enumerate(kinds):
            assert tree(mount.path / f"case{case}") == _merge(kind), f"case {case}"


@needs_root
@pytest.mark.parametrize("style", ["userxattr", "trustedxattr"])
def test_marks_of_the_other_kind(style: str, nobody_path: Path) -> None:
    """Read a user's overlayfs layer below an image, and root's below a user's directory."""
    base, merged, changed = (nobody_path / name for name in ("base", "merged", "changed"))
    put(base, BOTTOM)
    prefix, by_root = ("trusted", True) if style == "trustedxattr" else ("user", False)
    run("chown", "-R", "65534:65534", base)
    changed.mkdir()
    if not by_root:
        os.chown(changed, 65534, 65534)
    with mounted(base, merged, changed, nobody=not by_root):
        act = [*([] if by_root else as_nobody_prefix()), "sh", "-c"]
        run(
            *act,
            f"cd {merged}; rm -r etc/conf.d gone plain; mkdir etc/conf.d; echo c > etc/conf.d/c; mv var v",
        )
    expected = {
        "etc": {"passwd": "root", "motd": "old", "conf.d": {"c": "c\n"}},
        "v": {"log": {"one": "1"}, "file": "below"},
        "both": {"low": "low"},
    }
    top = changed / "upper"
    assert os.getxattr(top / "v", f"{prefix}.overlay.redirect") == b"var"
    if by_root:
        top = mksquashfs(nobody_path / "top.sqfs", top)
        top.chmod(0o644)
    store = nobody_path / ("store" if by_root else "store.bs")
    if not by_root:
        cowfs("create", store, "16", nobody=True, check=True)
    else:
        store.mkdir()
        os.chown(store, 65534, 65534)
    merged = nobody_path / "again"
    with mounted([top, base], merged, store, nobody=True, options=[f"whiteouts={style}"]):
        seen = json.loads(run(*as_nobody_prefix(), sys.executable, "-c", _TREE, merged).stdout)
        run(*as_nobody_prefix(), "rm", merged / "v/file")
    assert seen == expected
    assert cowfs("diff", store, nobody=True, check=True).stdout == "D  v/file\n"


_TREE = """
import json, os, sys
def tree(top):
    return {name: tree(f"{top}/{name}") if os.path.isdir(f"{top}/{name}") else open(f"{top}/{name}").read()
            for name in os.listdir(top)}
print(json.dumps(tree(sys.argv[1])))
"""
