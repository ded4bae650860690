"""Compare `cowfs rebase` with three trees in memory: random changes in the store and in the new root.

What the model says of each path is written down here a second time, without overlays: trees of names.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from cowfs.api import Lowers, checkpoints, open_changes
from cowfs.changes import checkpoint
from cowfs.changes.render import line
from cowfs.errors import StoreError
from cowfs.overlay.fs import done_at_once
from cowfs.rebasing import Rebased, rebase
from cowfs.store.offline.create import create_store
from cowfs.store.offline.info import store_info
from cowfs.store.served.open import open_store
from tests.support import tree
from tests.support.direct import EXCHANGE, Direct
from tests.support.mounts import cowfs, kernel_overlay
from tests.support.system import needs_root
from tests.support.system import run as run_command

pytestmark = [needs_root, pytest.mark.timeout(600)]

DIRECTORIES = ("", "a", "a/b", "c", "c/d", "e")
NAMES = ("f", "g", "h", "a", "b", "d")
KEPT = ("type", "mode", "owner", "xattrs", "size", "content", "target", "rdev")
MOST = int(os.environ.get("COWFS_REBASE_SEEDS", "200"))


class Plain:
    """The operations of :class:`Direct`, on a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create(self, path: str, data: bytes) -> None:
        with open(self.root / path, "xb") as file:
            file.write(data)

    def write(self, path: str, data: bytes) -> None:
        with open(self.root / path, "r+b") as file:
            file.write(data)

    def mkdir(self, path: str) -> None:
        os.mkdir(self.root / path)

    def symlink(self, target: bytes, path: str) -> None:
        os.symlink(target, os.fsencode(self.root / path))

    def link(self, old: str, new: str) -> None:
        os.link(self.root / old, self.root / new, follow_symlinks=False)

    def unlink(self, path: str) -> None:
        os.unlink(self.root / path)

    def rmdir(self, path: str) -> None:
        os.rmdir(self.root / path)

    def rename(self, old: str, new: str, flags: int = 0) -> None:
        if flags:
            raise OSError
        os.rename(self.root / old, self.root / new)

    def set(self, path: str, mode: int) -> None:
        if not os.path.islink(self.root / path):
            os.chmod(self.root / path, mode)

    def setxattr(self, path: str, name: bytes, value: bytes) -> None:
        os.setxattr(self.root / path, name, value, follow_symlinks=False)

    def listdir(self, path: str) -> list[str]:
        return sorted(os.listdir(self.root / path))


def change(fs: Any, chance: random.Random, steps: int, *, moves: bool, links: bool) -> None:
    """Do this operation on a tree; ignore it if it fails."""
    for _ in range(steps):
        directory = chance.choice(DIRECTORIES)
        path = f"{directory}/{chance.choice(NAMES)}".strip("/")
        other = f"{chance.choice(DIRECTORIES)}/{chance.choice(NAMES)}".strip("/")
        data = b"%d" % chance.randrange(6) * chance.choice((1, 5000))
        what = chance.randrange(12)
        with suppress(OSError, KeyError):
            if what < 2:
                fs.create(path, data)
            elif what == 2:
                fs.write(path, data)
            elif what == 3:
                fs.mkdir(path)
            elif what == 4:
                fs.symlink(b"to %d" % chance.randrange(3), path)
            elif what == 5:
                fs.set(path, mode=chance.choice((0o600, 0o755, 0o700)))
            elif what == 6:
                remove(fs, path)
            elif what == 7:
                fs.unlink(path)
            elif what == 8:
                fs.setxattr(path, b"user.x", data[:5])
            elif what == 9 and links:
                fs.link(path, other)
            elif moves:
                fs.rename(path, other, chance.choice((0, 0, EXCHANGE)))


def remove(fs: Any, path: str) -> None:
    """Remove all or part of a tree; sometimes create the directory again."""
    try:
        names = fs.listdir(path)
    except OSError:
        fs.unlink(path)
        return
    for name in names:
        remove(fs, f"{path}/{name}")
    fs.rmdir(path)
    if path.endswith("b"):
        fs.mkdir(path)


def built(root: Path, chance: random.Random, *, links: bool) -> Path:
    root.mkdir()
    plain = Plain(root)
    for directory in DIRECTORIES[1:]:
        plain.mkdir(directory)
    change(plain, chance, 60, moves=False, links=links)
    for number, (path, _, names) in enumerate(os.walk(root)):
        for at, name in enumerate([*names, "."]):
            when = (1_600_000_000 + number * 100 + at) * 10**9
            os.utime(os.path.join(path, name), ns=(when, when), follow_symlinks=False)
    return root


def facts_of(snapshot: tree.Snapshot) -> dict[str, Any]:
    return {path: {key: one[key] for key in KEPT if key in one} for path, one in snapshot.items()}


def seen(store: Path, lower: Path) -> tree.Snapshot:
    with closing(Direct(str(store), [str(lower)])) as fs:
        return fs.snapshot()


Nested = dict[str, Any]


def nested(flat: dict[str, Any]) -> Nested:
    """Return ``{"": facts, name: nested, ...}`` of a directory, or the facts of another file."""
    top: Nested = {"": flat["."]}
    for path, facts in sorted(flat.items()):
        if path == ".":
            continue
        *above, name = path.split("/")
        here = top
        for part in above:
            here = here[part]
        here[name] = {"": facts} if facts["type"] == "dir" else facts
    return top


def is_dir(node: Nested | None) -> bool:
    return node is not None and "" in node


def kids(node: Nested | None) -> Nested:
    return {name: one for name, one in node.items() if name} if node is not None and is_dir(node) else {}


def merged(old: Nested | None, changed: Nested | None, new: Nested | None) -> Nested | None:
    """Return what must be at a path."""
    if changed is None:
        return new if old is None else None
    if not is_dir(changed):
        if new is None:
            return None if changed == old else changed
        if old == new:
            return changed
        return new if old in (changed, None) and old is not None else changed
    result: Nested = {}
    for name in kids(old).keys() | kids(changed).keys() | kids(new).keys():
        here = merged(kids(old).get(name), kids(changed).get(name), kids(new).get(name))
        if here is not None:
            result[name] = here
    untouched = is_dir(old) and old is not None and old[""] == changed[""]
    if untouched and not result and not is_dir(new):
        return new
    return {"": new[""] if untouched and new is not None and is_dir(new) else changed[""], **result}


def prepare(place: Path, seed: int, *, moves: bool, links: bool) -> tuple[Path, Path, Path, tree.Snapshot]:
    """Make an old root, a store on it, and a new root; return them, and what the store shows."""
    chance = random.Random(seed)
    old = built(place / "old", chance, links=links)
    new = place / "new"
    shutil.copytree(old, new, symlinks=True)
    if seed % 2:
        store = place / "store.bs"
        create_store(str(store), 16 << 20)
    else:
        store = place / "store"
    with closing(Direct(str(store), [str(old)])) as fs:
        fs.caching = bool(chance.randrange(2))
        change(fs, chance, 25, moves=moves, links=links)
        if seed % 3 == 0:
            fs.remount()
            change(fs, chance, 15, moves=moves, links=links)
    change(Plain(new), chance, chance.choice((1, 10, 30)), moves=False, links=links)
    return old, store, new, seen(store, old)


def run(store: Path, old: Path, new: Path, *, dry_run: bool = False) -> Rebased:
    return rebase(str(store), Lowers([str(new)]), Lowers([str(old)]), dry_run=dry_run)


SEEDS = [*range(4), *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(4, MOST))]
AT_NIGHT = [pytest.param(seed, marks=pytest.mark.nightly) for seed in range(3, MOST)]


@pytest.mark.parametrize("seed", SEEDS)
def test_onto_the_same_root_nothing_changes(tmp_path: Path, seed: int) -> None:
    old, store, _, before = prepare(tmp_path, seed, moves=True, links=True)
    again = tmp_path / "again"
    run_command("cp", "-a", old, again)
    lines = diff(store, old)
    done = run(store, old, again)
    assert done.conflicts == []
    assert diff(store, again) == lines
    after = seen(store, again)
    assert tree.differences(tree.stable(before), tree.stable(after)) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_as_the_model(tmp_path: Path, seed: int) -> None:
    old, store, new, before = prepare(tmp_path, seed, moves=False, links=False)
    trees = [nested(facts_of(one)) for one in (tree.snapshot(old), before, tree.snapshot(new))]
    told = run(store, old, new, dry_run=True).told
    assert run(store, old, new).told == told
    assert nested(facts_of(seen(store, new))) == merged(*trees)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_was_written_is_there(tmp_path: Path, seed: int) -> None:
    """After any renames and links, content that only the store had is kept."""
    old, store, new, before = prepare(tmp_path, seed, moves=True, links=True)
    known = {one.get("content") for one in tree.snapshot(old).values()}
    done = run(store, old, new)
    after = seen(store, new)
    equal = {os.fsdecode(one.path) for one in done.told if one.kind == "dropped"}
    for path, facts in before.items():
        if facts["type"] == "file" and facts["content"] not in known and path not in equal:
            assert after[path]["content"] == facts["content"]
    assert not list(seen_twice(after))


@pytest.mark.parametrize("seed", [2, *(pytest.param(n, marks=pytest.mark.nightly) for n in range(4, 40, 2))])
def test_the_kernel_sees_the_same(tmp_path: Path, seed: int) -> None:
    old, store, new, _ = prepare(tmp_path, seed, moves=True, links=True)
    run(store, old, new)
    ours = facts_of(seen(store, new))
    with kernel_overlay([new], store, tmp_path / "mnt"):
        assert facts_of(tree.snapshot(tmp_path / "mnt")) == ours


@pytest.mark.parametrize("seed", [1, *(pytest.param(n, marks=pytest.mark.nightly) for n in range(2, 40))])
def test_layers_of_deleted_checkpoints_come_along(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    old = built(tmp_path / "old", chance, links=True)
    store, again = tmp_path / "store", tmp_path / "again"
    run_command("cp", "-a", old, again)
    with closing(Direct(str(store), [str(old)])) as fs:
        change(fs, chance, 20, moves=True, links=True)
        union = fs.union
        done_at_once(checkpoint.take(union.store, union.overlay, "one"))
        change(fs, chance, 20, moves=True, links=True)
        before = fs.snapshot()
        done_at_once(checkpoint.delete(union.store, union.overlay, "one"))
    assert store_info(str(store))["layers"]
    assert run(store, old, again).conflicts == []
    assert store_info(str(store))["layers"] == []
    assert tree.differences(tree.stable(before), tree.stable(seen(store, again))) == []


def test_without_room_nothing_changes(tmp_path: Path) -> None:
    """A directory that the new root lacks must be copied, but the image has no space for it."""
    old, new, store = tmp_path / "old", tmp_path / "new", tmp_path / "store.bs"
    tree.build(old, {"gone/big": os.urandom(12 << 20), "a": b"a"})
    tree.build(new, {"a": b"a"})
    create_store(str(store), 16 << 20)
    with closing(Direct(str(store), [str(old)])) as fs:
        fs.rename("gone", "kept")
        fs.write("a", b"mine")
    before, lines, facts = seen(store, old), diff(store, old), store_info(str(store))
    with pytest.raises(StoreError, match="nothing was changed: No space left on device"):
        run(store, old, new)
    assert (seen(store, old), diff(store, old)) == (before, lines)
    for what in ("version", "layers", "lowers", "state"):
        assert store_info(str(store))[what] == facts[what]


def seen_twice(snapshot: tree.Snapshot) -> Any:
    """Yield paths with the same number that are not the same inode."""
    by_number: dict[int, dict[str, Any]] = {}
    for path, facts in snapshot.items():
        first = by_number.setdefault(facts["ino"], facts)
        if any(first.get(key) != facts.get(key) for key in ("type", "content", "mode")):
            yield path


def diff(store: Path, lower: Path, since: str | None = None) -> list[str]:
    with open_changes(str(store), Lowers([str(lower)]), since=since) as changes:
        return [line(one) for one in changes]


def test_what_fails_after_the_exchange_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store belongs to the new root by then, so an error must not say that nothing was changed."""
    old, store, new, _ = prepare(tmp_path, 7, moves=True, links=True)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("cowfs.rebasing.rebased.settle", fail)
    with pytest.raises(StoreError, match="belongs to the new root now"):
        run(store, old, new)
    monkeypatch.undo()
    assert [low["path"] for low in store_info(str(store))["lowers"]] == [str(new)]
    with closing(open_store(str(store))) as opened:
        assert [low.path for low in opened.header.lowers] == [str(new)]


def keep(fs: Direct, name: str) -> None:
    done_at_once(checkpoint.take(fs.union.store, fs.union.overlay, name))


def go_back(fs: Direct, name: str) -> None:
    done_at_once(checkpoint.go_back(fs.union.store, fs.union.overlay, name, lambda _: None))


def states(store: Path, lower: Path, place: Path) -> dict[str, tree.Snapshot]:
    """Return what a store shows now, as "", and at each checkpoint, by rolling back a copy."""
    found = {"": seen(store, lower)}
    for one in checkpoints(str(store)):
        copy = place / f"copy-{one.name}{store.suffix}"
        run_command("cp", "-a", store, copy)
        with closing(Direct(str(copy), [str(lower)])) as fs:
            go_back(fs, one.name)
            found[one.name] = fs.snapshot()
        shutil.rmtree(copy) if copy.is_dir() else copy.unlink()
    return found


def with_checkpoints(place: Path, seed: int, *, moves: bool, links: bool) -> tuple[Path, Path, random.Random]:
    """Make a root and a store with two nested checkpoints, one beside them, and deleted ones."""
    chance = random.Random(seed)
    old = built(place / "old", chance, links=links)
    store = place / ("store.bs" if seed % 2 else "store")
    if seed % 2:
        create_store(str(store), 16 << 20)
    with closing(Direct(str(store), [str(old)])) as fs:
        for name in ("gone", "one", "two", "shared"):
            change(fs, chance, 15, moves=moves, links=links)
            keep(fs, name)
        if seed % 3:
            change(fs, chance, 10, moves=moves, links=links)
            keep(fs, "beside")
            go_back(fs, "shared")
        change(fs, chance, 15, moves=moves, links=links)
        for name in ("gone", "shared"):
            done_at_once(checkpoint.delete(fs.union.store, fs.union.overlay, name))
    return old, store, chance


@pytest.mark.parametrize("seed", [pytest.param(1, marks=pytest.mark.nightly), 2, *AT_NIGHT])
def test_checkpoints_onto_the_same_root(tmp_path: Path, seed: int) -> None:
    old, store, _ = with_checkpoints(tmp_path, seed, moves=True, links=True)
    again = tmp_path / "again"
    run_command("cp", "-a", old, again)
    before, listed = states(store, old, tmp_path), checkpoints(str(store))
    assert set(before) == {"", "one", "two", *(["beside"] if seed % 3 else [])}
    lines = {name: diff(store, old, name) for name in (None, "one", "two")}
    assert run(store, old, again, dry_run=True).told == run(store, old, again).told == []
    assert checkpoints(str(store)) == listed
    assert {name: diff(store, again, name) for name in lines} == lines
    after = states(store, again, tmp_path)
    for name, one in before.items():
        assert tree.differences(tree.stable(one), tree.stable(after[name])) == [], name
    if store.suffix:
        assert cowfs("check", "-n", store).returncode == 0


@pytest.mark.parametrize("seed", [1, *AT_NIGHT])
def test_checkpoints_as_the_model(tmp_path: Path, seed: int) -> None:
    """Each checkpoint is rebased on the result of the one below it."""
    chance = random.Random(seed)
    old, new = built(tmp_path / "old", chance, links=False), tmp_path / "new"
    shutil.copytree(old, new, symlinks=True)
    change(Plain(new), chance, chance.choice((1, 10, 30)), moves=False, links=False)
    store = tmp_path / "store"
    wanted, trees = nested(facts_of(tree.snapshot(new))), [nested(facts_of(tree.snapshot(old)))]
    models: dict[str, Nested | None] = {}
    with closing(Direct(str(store), [str(old)])) as fs:
        for name in ("one", "two", ""):
            change(fs, chance, 15, moves=False, links=False)
            if name:
                keep(fs, name)
            trees.append(nested(facts_of(fs.snapshot())))
            models[name] = merged(trees[-2], trees[-1], wanted)
            wanted = models[name] or {}
    told = run(store, old, new, dry_run=True).told
    assert run(store, old, new).told == told
    assert {name: nested(facts_of(one)) for name, one in states(store, new, tmp_path).items()} == models


def test_what_came_back_into_a_new_directory(tmp_path: Path) -> None:
    """Its redirect leads to its place, but no lower shows there, because the parent is another directory."""
    old, new, store = tmp_path / "old", tmp_path / "new", tmp_path / "store"
    tree.build(old, {"usr/bin/one": b"1", "usr/bin/two": b"2", "usr/file": b"f", "usr/lib": b"l"})
    shutil.copytree(old, new)
    with closing(Direct(str(store), [str(old)])) as fs:
        fs.rename("usr", "away")
        fs.mkdir("usr")
        fs.rename("away/bin", "usr/bin")
        fs.rename("away/file", "usr/file")
    before, lines = seen(store, old), diff(store, old)
    again = tmp_path / "again"
    run_command("cp", "-a", old, again)
    run_command("cp", "-a", store, tmp_path / "kept")
    assert run(tmp_path / "kept", old, again).told == []
    assert facts_of(seen(tmp_path / "kept", again)) == facts_of(before)
    assert diff(tmp_path / "kept", again) == lines
    (new / "usr/bin/three").write_bytes(b"3")
    assert run(store, old, new).conflicts == []
    after = seen(store, new)
    files = {path for path in after if after[path]["type"] == "file"}
    assert files == {"usr/bin/one", "usr/bin/two", "usr/bin/three", "usr/file", "away/lib"}


def test_a_deletion_of_what_only_a_deleted_checkpoint_had_is_not_told(tmp_path: Path) -> None:
    old, again, store = tmp_path / "old", tmp_path / "again", tmp_path / "store"
    tree.build(old, {"d/f": b"f"})
    shutil.copytree(old, again)
    with closing(Direct(str(store), [str(old)])) as fs:
        fs.unlink("d/f")
        keep(fs, "one")
        fs.create("d/f", b"again")
        keep(fs, "two")
        fs.unlink("d/f")
        done_at_once(checkpoint.delete(fs.union.store, fs.union.overlay, "two"))
    assert run(store, old, again).told == []
    assert "d/f" not in seen(store, again)
