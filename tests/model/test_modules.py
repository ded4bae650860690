"""Add and remove modules while the kernel knows the tree: it must see what a new union would show.

And what the kernel is not told to ask for again is still true.
"""

from __future__ import annotations

import os
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cowfs.changes import checkpoint
from cowfs.layers.module import ModuleLayer
from cowfs.overlay import modules
from cowfs.overlay.freeze import link_all
from cowfs.overlay.fs import OverlayFs, done_at_once
from cowfs.overlay.uncover import Stale
from cowfs.store.format.identity import identify_lower
from tests.mount.test_modules import FEW, a_tree
from tests.support.direct import EXCHANGE, Direct
from tests.support.mounts import cowfs
from tests.support.squashfs import mksquashfs
from tests.support.tree import Snapshot

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: whiteouts, trusted xattrs")


def change(tree: Direct, rng: random.Random, count: int) -> None:
    """Do random operations on a tree of few names; ignore those that fail."""

    def somewhere() -> str:
        return "/".join(rng.choice(FEW) for _ in range(rng.randrange(1, 4)))

    for number in range(count):
        path, other, data = somewhere(), somewhere(), b"%d\n" % number
        with suppress(OSError):
            match rng.randrange(9):
                case 0:
                    tree.create(path, data)
                case 1:
                    tree.write(path, data, rng.choice([0, 5]))
                case 2:
                    tree.unlink(path)
                case 3:
                    remove(tree, path)
                case 4:
                    tree.mkdir(path)
                case 5:
                    tree.rename(path, other, rng.choice([0, 0, 0, EXCHANGE]))
                case 6:
                    tree.set(path, mode=rng.choice([0o700, 0o755]))
                case 7:
                    tree.link(path, other)
                case _:
                    remove(tree, path)
                    tree.mkdir(path)


def remove(tree: Direct, path: str) -> None:
    """rm -r."""
    with suppress(NotADirectoryError):
        for name in tree.listdir(path):
            remove(tree, f"{path}/{name}")
        tree.rmdir(path)
        return
    tree.unlink(path)


def seen(tree: Direct) -> Snapshot:
    """Return the tree without inode numbers, which copies of modules change, and times of directories."""
    found = tree.snapshot()
    for facts in found.values():
        facts.pop("ino", None)
        if facts["type"] == "dir":
            facts.pop("mtime", None)
            facts.pop("nlink", None)
    return found


Known = dict[tuple[int, bytes], int | None]
Facts = dict[int, tuple[Any, ...]]


def known(fs: OverlayFs, tree: Direct) -> tuple[Known, Facts]:
    """Return what the kernel may have cached: names, missing names, and attributes."""
    names: Known = {}
    for node in fs.nodes.all():
        if node.is_dir and not node.dead:
            for name in FEW:
                with suppress(OSError):
                    found = tree.fs.lookup(node, name.encode())
                    names[node.ino, name.encode()] = None if found is None else tree.take(found[0]).ino
    return names, {node.ino: facts_of(fs, node) for node in fs.nodes.all() if not node.dead}


def facts_of(fs: OverlayFs, node: Any) -> tuple[Any, ...]:
    attr = fs.stat(node)
    return node, attr.st_mode, attr.st_size, attr.st_mtime_ns, attr.st_uid


def must_be_true(fs: OverlayFs, names: Known, facts: Facts, stale: Stale) -> None:
    """Fail if something that was not invalidated has changed."""
    for ino, name in stale:
        if name is None:
            facts.pop(ino, None)
        else:
            names.pop((ino, name), None)
    for (ino, name), before in names.items():
        node = fs.nodes.get(ino)
        if node is not None and not node.dead:
            found = fs.lookup(node, name)  # type: ignore[attr-defined]
            assert (None if found is None else found[0].ino) == before, (node, name)
    for ino, was in facts.items():
        node = fs.nodes.get(ino)
        if node is was[0] and not node.dead:
            assert facts_of(fs, node) == was


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(first, marks=pytest.mark.nightly) for first in range(20, 400, 20))]
)
def test_what_is_known_is_what_would_be_found(tmp_path: Path, first: int) -> None:
    for seed in range(first, first + (3 if first == 0 else 20)):
        place = tmp_path / str(seed)
        place.mkdir()
        one_tree(place, random.Random(seed), image=bool(seed % 2))


def one_tree(place: Path, rng: random.Random, *, image: bool) -> None:
    store = place / ("store.bs" if image else "store")
    if image:
        assert cowfs("create", store, "64").returncode == 0
    for name in ("lower", "one", "two"):
        a_tree(place / name, rng)
    root, *images = (str(mksquashfs(place / f"{name}.sb", place / name)) for name in ("lower", "one", "two"))
    tree = Direct(str(store), [root])
    tree.union.store.know_modules([identify_lower(path) for path in images])
    loaded: dict[str, int] = {}
    for turn in range(8):
        change(tree, rng, 12)
        fs, union = tree.fs, tree.union
        names, facts = known(fs, tree)
        opened = [(path, tree.read(path), tree.open(path, os.O_RDONLY)) for path in files(tree)[::3]]
        module = rng.choice(images)
        if module in loaded:
            stale = modules.remove(fs, loaded.pop(module))
        else:
            done_at_once(link_all(fs))
            names, facts = known(fs, tree)
            number, stale = modules.add(fs, ModuleLayer(module))
            loaded = {module: number, **loaded}
        must_be_true(fs, names, facts, stale)
        for path, content, handle in opened:
            assert handle.file.pread(1 << 20, 0) == content, path
            fs.release_handle(handle)
        if rng.random() < 0.2:
            done_at_once(checkpoint.take(union.store, fs, f"{turn}"))
        if rng.random() < 0.3:
            change(tree, rng, 6)
        before = seen(tree)
        if rng.random() < 0.5:
            tree.forget()
            tree.union.close()
            tree = Direct(str(store), [*loaded, root])
            loaded = dict(zip(loaded, tree.fs.loaded, strict=True))
        else:
            tree.forget()
        assert seen(tree) == before
    tree.close()
    for lowers in ([root], [*images, root], [images[1], root]):
        tree = Direct(str(store), lowers)
        seen(tree)
        tree.close()


def files(tree: Direct) -> list[str]:
    return sorted(path for path, facts in tree.snapshot().items() if facts["type"] == "file")
