"""Thousands of operations on a union and on a plain tree: what the tree says was changed is what `cowfs diff`
says, `cowfs revert --all` gives the lower back with all attributes and `--undo` what was there, and the patch
makes of the lower what there is now.
"""

from __future__ import annotations

import copy
import errno
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from cowfs.api import open_changes, take_back
from tests.model.test_model import compare, load
from tests.model.tree import EXCHANGE, Inode, Model
from tests.mount.test_diff_patch import apply, patch_of
from tests.support import tree
from tests.support.direct import Direct
from tests.support.mounts import cowfs
from tests.support.system import needs_root

pytestmark = [needs_root, pytest.mark.timeout(3600)]

NAMES = [*"abcdefg", "name with blanks", "*", "[x]", "new\nline", "ünicode"]
ROUND = 250
TIMES = [1_300_000_000_123_456_789, 1_400_000_000_000_000_001]
XATTRS = ["user.one", "user.two", "trusted.three"]


class Told(NamedTuple):
    """A change."""

    kind: str
    path: str
    what: frozenset[str] = frozenset()
    source: str | None = None


# --- the changes of the model


def expected(before: Model, after: Model, files: dict[str, str]) -> Counter[Told]:
    """Return the changes between two states of a tree whose inodes kept their numbers.

    A directory that is somewhere else was renamed. *files* are those that are said to have been, by what they
    are called now; that is checked, and that it is said of all large ones whose data nobody touched.
    """
    return _Expected(before, after, files).told


class _Expected:
    def __init__(self, before: Model, after: Model, files: dict[str, str]) -> None:
        self.before = {path: inode for path, inode in before.walk() if path != "."}
        self.home = {inode.number: path for path, inode in self.before.items() if inode.kind == "dir"}
        self.alive = {inode.number for _, inode in after.walk() if inode.kind == "dir"}
        self.files = files
        for path, source in files.items():
            assert self.before[source].kind == "file"
            assert after.find(path).number == self.before[source].number, (path, source)
        self.told: Counter[Told] = Counter()
        self._differences("", after.root, before.root)
        self._inside("", after.root, "", before.root)

    def _shown(self, path: str) -> Inode | None:
        """Return what the lower has at a path, unless it was renamed."""
        inode = self.before.get(path)
        if inode is None or path in self.files.values():
            return None
        return None if inode.kind == "dir" and inode.number in self.alive else inode

    def _inside(self, path: str, directory: Inode, base_path: str, base: Inode | None) -> None:
        for name in {*directory.names, *(base.names if base is not None else ())}:
            here, natural = _join(path, name), _join(base_path, name)
            old = None if base is None else self._shown(natural)
            new = directory.names.get(name)
            home = None if new is None else self.home.get(new.number)
            if new is None:
                if old is not None:
                    self._tell("D", here)
            elif home is not None:
                stays = base is not None and home == natural
                if not stays and old is not None:
                    self._tell("D", here)
                origin = self.before[home]
                self._differences(here, new, origin, None if stays else home)
                self._inside(here, new, home, origin)
            elif here in self.files:
                if old is not None:
                    self._tell("D", here)
                source = self.files[here]
                self._differences(here, new, self.before[source], source)
            else:
                self._other(here, new, natural, old)

    def _other(self, here: str, new: Inode, natural: str, old: Inode | None) -> None:
        if old is None:
            self._tell("A", here)
        else:
            self._differences(here, new, old)
        if new.kind == "dir":
            self._inside(here, new, natural, old if old is not None and old.kind == "dir" else None)

    def _differences(self, path: str, new: Inode, old: Inode, source: str | None = None) -> None:
        what = {name for name, value in _facts(new, old).items() if value}
        if new.kind != old.kind:
            what = {"type"}
        if source is not None:
            self._tell("R", path, what, source)
        elif what:
            self._tell("M", path, what)

    def _tell(self, kind: str, path: str, what: set[str] | None = None, source: str | None = None) -> None:
        self.told[Told(kind, path, frozenset(what or ()), source)] += 1


def _facts(new: Inode, old: Inode) -> dict[str, bool]:
    return {
        "content": new.kind == "file" and new.data != old.data,
        "mode": new.kind != "symlink" and new.mode != old.mode,
        "owner": (new.uid, new.gid) != (old.uid, old.gid),
        "times": new.kind != "dir" and new.mtime != old.mtime,
        "xattrs": new.xattrs != old.xattrs,
        "target": new.kind == "symlink" and new.data != old.data,
    }


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


# --- the operations


class Work:
    """Do the same operations on a union and on the model."""

    def __init__(self, fs: Direct, model: Model, seed: int) -> None:
        self.fs, self.model = fs, model
        self.chance = random.Random(seed)
        self.done = 0

    def run(self, count: int) -> None:
        until = self.done + count
        while self.done < until:
            self._one()

    def _one(self) -> None:
        chance = self.chance
        all_ = [path for path, _ in self.model.walk() if path != "."]
        directories = ["", *(path for path in all_ if self.model.find(path).kind == "dir")]
        others = [path for path in all_ if self.model.find(path).kind != "dir"]
        directory = chance.choice([path for path in directories if path.count("/") < 4])
        new = _join(directory, chance.choice(NAMES))
        path = chance.choice(all_ or [new])
        other = chance.choice(others or [path])
        act = chance.choice(
            ["create", "create", "mkdir", "symlink", "fifo", "link", "unlink", "rmdir", "tree", "anew"]
            + ["rename"] * 4 + ["exchange"] * 2 + ["write", "truncate", "mode", "owner", "times", "xattr"] * 2
        )  # fmt: skip
        with suppress(_Refused):
            self._do(act, path, other, new)

    def _do(self, act: str, path: str, other: str, new: str) -> None:
        fs, model, chance = self.fs, self.model, self.chance
        known = {at for at, _ in model.walk()}
        data = chance.choice([b"", b"a\nb\nc\n", b"no end", b"\0\1\2", b"%d\n" % self.done * 50])
        match act:
            case "create":
                mode = chance.choice([0o600, 0o755])
                self._both(
                    lambda: fs.create(new, data, mode), lambda: model.add(new, Inode("file", mode, data=data))
                )
            case "mkdir":
                self._both(lambda: fs.mkdir(new), lambda: model.add(new, Inode("dir", 0o755)))
            case "symlink":
                link = Inode("symlink", 0o777, data=b"target %d" % self.done)
                self._both(lambda: fs.symlink(link.data, new), lambda: model.add(new, link))
            case "fifo":
                self._both(lambda: fs.mknod(new, 0o010600), lambda: model.add(new, Inode("fifo", 0o600)))
            case "link":
                self._both(lambda: fs.link(other, new), lambda: model.link(other, new))
            case "unlink":
                self._both(lambda: fs.unlink(other), lambda: model.unlink(other))
            case "rmdir":
                self._both(lambda: fs.rmdir(path), lambda: model.rmdir(path))
            case "tree":
                if chance.random() < len(known) / 400 and path in known:
                    self._remove_tree(path)
            case "anew":
                if path in known and model.find(path).kind == "dir":
                    self._remove_tree(path)
                    self._both(lambda: fs.mkdir(path), lambda: model.add(path, Inode("dir", 0o755)))
            case "rename":
                self._both(lambda: fs.rename(path, new), lambda: model.rename(path, new))
            case "exchange":
                self._both(
                    lambda: fs.rename(path, other, EXCHANGE), lambda: model.rename(path, other, EXCHANGE)
                )
            case _:
                self._change(act, path, other)

    def _change(self, act: str, path: str, other: str) -> None:
        fs, chance = self.fs, self.chance
        try:
            inode, any_ = self.model.find(other), self.model.find(path)
        except OSError:
            return  # everything was removed
        kind = inode.kind
        if act == "write" and kind == "file":
            data, at = b"%d\n" % self.done, chance.randrange(len(inode.data) + 1)
            self._both(lambda: fs.write(other, data, at), lambda: Model.write(inode, data, at))
        elif act == "truncate" and kind == "file":
            size = chance.choice([len(inode.data) + 7, len(inode.data) // 2 if inode.data else 1])
            self._both(lambda: fs.set(other, size=size), lambda: Model.truncate(inode, size))
        elif act == "times" and kind in {"file", "symlink"}:
            time = chance.choice(TIMES)
            self._both(lambda: fs.set(other, mtime_ns=time), lambda: setattr(inode, "mtime", time))
        if act == "mode" and any_.kind != "symlink":
            mode = chance.choice([0o600, 0o640, 0o644, 0o750, 0o755])
            self._both(lambda: fs.set(path, mode=mode), lambda: setattr(any_, "mode", mode))
        elif act == "owner":
            uid = chance.choice([0, 5])
            self._both(lambda: fs.set(path, uid=uid), lambda: setattr(any_, "uid", uid))
        elif act == "xattr" and any_.kind in {"dir", "file"}:
            name = chance.choice(XATTRS)
            if name in any_.xattrs:
                self._both(lambda: fs.removexattr(path, name.encode()), lambda: any_.xattrs.pop(name))
            else:
                value = b"%d" % chance.randrange(2)
                self._both(
                    lambda: fs.setxattr(path, name.encode(), value),
                    lambda: any_.xattrs.__setitem__(name, value),
                )

    def _remove_tree(self, path: str) -> None:
        inode = self.model.find(path)
        if inode.kind != "dir":
            self._both(lambda: self.fs.unlink(path), lambda: self.model.unlink(path))
            return
        for name in list(inode.names):
            self._remove_tree(_join(path, name))
        self._both(lambda: self.fs.rmdir(path), lambda: self.model.rmdir(path))

    def _both(self, real: Callable[[], object], model: Callable[[], object]) -> None:
        wanted, got = _errno_of(model), _errno_of(real)
        assert got == wanted, f"step {self.done}: the union gave {got}, the model {wanted}"
        self.done += 1
        if wanted:
            raise _Refused


class _Refused(Exception):
    pass


def _errno_of(act: Callable[[], object]) -> str:
    try:
        act()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""


# --- the tests


def layers_of(seed: int) -> list[dict[str, tree.Node]]:
    chance = random.Random(seed)
    top: dict[str, tree.Node] = {}
    bottom: dict[str, tree.Node] = {}
    for number in range(90):
        layer = chance.choice([top, bottom])
        path = "/".join(chance.choice(NAMES) for _ in range(chance.randint(1, 4)))
        above = [path[:at] for at, character in enumerate(path) if character == "/"]
        if any(known.kind != "dir" for one in (top, bottom) for at in above if (known := one.get(at))):
            continue
        if any(path == known or known.startswith(f"{path}/") for one in (top, bottom) for known in one):
            continue
        xattrs = {chance.choice(XATTRS): b"0"} if chance.random() < 0.3 else {}
        layer[path] = chance.choice(
            [
                tree.Node(data=b"line\n" * chance.randrange(40), mode=0o640, xattrs=xattrs),
                tree.Node(data=bytes(chance.randbytes(300)), mode=0o755, uid=5, xattrs=xattrs),
                tree.Node(data=b"big\n" * 20_000, mode=0o644, xattrs=xattrs),
                tree.directory(0o750, xattrs=xattrs),
                tree.symlink(f"target {number}"),
                tree.Node("fifo", mode=0o600),
            ]
        )
        files = [at for at, known in layer.items() if known.kind == "file" and not at.endswith("-link")]
        if files and chance.random() < 0.1:
            target = chance.choice(files)
            layer[f"{target}-link"] = tree.link(target)
    return [top, bottom]


def model_of(layers: list[dict[str, tree.Node]], places: list[Path]) -> Model:
    model = Model()
    load(model, layers, places)
    for path, inode in model.walk():
        for layer, place in zip(layers, places, strict=True):
            known = layer.get(path)
            if known is not None and known.kind != "link":
                inode.xattrs, inode.uid, inode.gid = dict(known.xattrs), known.uid, known.gid
            if os.path.lexists(place / path):
                break  # only the topmost, even if it exists only for its content
    return model


def files_of(model: Model) -> dict[str, object]:
    """Return what a patch can express of a tree, like :func:`tests.mount.test_diff_patch.tree`."""
    return {
        path: os.fsdecode(inode.data) if inode.kind == "symlink" else (bool(inode.mode & 0o100), inode.data)
        for path, inode in model.walk()
        if inode.kind in {"symlink", "file"}
    }


def without(paths: set[str], files: dict[str, object]) -> dict[str, object]:
    """Leave out what a patch has only in a comment: a file in place of a fifo or device."""
    return {path: what for path, what in files.items() if path not in paths}


def check_diff(
    before: Model, after: Model, store: Path, *, since: str | None = None, until: str | None = None
) -> None:
    """Compare what differs from *before* to *after*, which may be checkpoints, with what a store says."""
    with open_changes(str(store), since=since, until=until) as changes:
        found = [
            Told(
                each.kind,
                os.fsdecode(each.path),
                frozenset(each.what),
                None if each.source is None else os.fsdecode(each.source),
            )
            for each in changes
        ]
        files = {
            each.path: each.source
            for each in found
            if each.source is not None and after.find(each.path).kind == "file"
        }
    wanted = expected(before, after, files)
    wrong, missing = Counter(found) - wanted, wanted - Counter(found)
    assert not wrong, f"told, and not so: {wrong}; missing: {missing}"
    assert not missing, f"so, and not told: {missing}"


@pytest.mark.parametrize(
    ("kind", "seed", "count"),
    [
        ("image", 1, 2 * ROUND),
        *(pytest.param("image", seed, 10_000, marks=pytest.mark.nightly) for seed in (2, 3)),
        *(pytest.param("directory", seed, 10_000, marks=pytest.mark.nightly) for seed in (4, 5)),
        *(pytest.param("fakeroot", seed, 10_000, marks=pytest.mark.nightly) for seed in (6, 7)),
    ],
)
def test_what_was_changed(tmp_path: Path, kind: str, seed: int, count: int) -> None:
    layers = layers_of(seed)
    places = [tmp_path / f"lower{number}" for number in range(len(layers))]
    for place, layer in zip(places, layers, strict=True):
        tree.build(place, layer)
    store = tmp_path / ("store.bs" if kind == "image" else "store")
    if kind == "image":
        assert cowfs("create", store, "64").returncode == 0
    fs = Direct(str(store), list(map(str, places)), fakeroot=kind == "fakeroot")
    lower = fs.snapshot()
    model = model_of(layers, places)
    before = copy.deepcopy(model)
    below = build_for_git(before, tmp_path / "below")
    special = {path for path, inode in before.walk() if inode.kind not in {"dir", "file", "symlink"}}
    work = Work(fs, model, seed)
    for number in range(count // ROUND):
        work.run(ROUND)
        model = work.model
        shown = fs.snapshot()
        assert compare(model.snapshot(), shown, {}) == []
        fs.close()

        check_diff(before, model, store)
        shutil.rmtree(tmp_path / "patched", ignore_errors=True)
        patched = apply(patch_of(store), below, tmp_path / "patched")
        assert without(special, patched) == without(special, files_of(model))

        assert [done for done in take_back(str(store), "revert") if done.why_not] == []
        with open_changes(str(store)) as changes:
            assert list(changes) == []
        fs.reopen()
        assert differences(lower, fs.snapshot(), fifos_made(before, model, shown)) == []
        if number % 3 == 2:
            work.model = copy.deepcopy(before)
            continue
        fs.close()
        assert [done for done in take_back(str(store), "undo") if done.why_not] == []
        check_diff(before, model, store)
        fs.reopen()
        for _, inode in model.walk():
            if inode.kind == "dir":
                inode.mtime = None
        assert compare(model.snapshot(), fs.snapshot(), {}) == []
    fs.close()
    assert cowfs("check", "-n", store).returncode == 0


def build_for_git(model: Model, place: Path) -> Path:
    """Build the source of a patch, without empty directories, which git ignores."""
    place.mkdir()
    for path, inode in model.walk():
        if inode.kind in {"symlink", "file"}:
            (place / path).parent.mkdir(parents=True, exist_ok=True)
        if inode.kind == "symlink":
            (place / path).symlink_to(os.fsdecode(inode.data))
        elif inode.kind == "file":
            (place / path).write_bytes(inode.data)
            (place / path).chmod(inode.mode)
    return place


def fifos_made(before: Model, after: Model, shown: tree.Snapshot) -> dict[str, int]:
    """Return the numbers of fifos that have taken the place of others. One that is like the other in all else
    is no change, and keeps its number: it is in the upper, and has no origin."""
    lowers = {path: inode.number for path, inode in before.walk() if inode.kind == "fifo"}
    return {
        path: shown[path]["ino"]
        for path, inode in after.walk()
        if inode.kind == "fifo" and lowers.get(path, inode.number) != inode.number
    }


def differences(one: tree.Snapshot, other: tree.Snapshot, made: dict[str, int]) -> list[str]:
    """Compare everything, including times and inode numbers; a fifo may have the number of that in *made*."""
    found = []
    for path in one.keys() | other.keys():
        was, is_ = (None if facts is None else dict(facts) for facts in (one.get(path), other.get(path)))
        if made and was and is_ and was["type"] == is_["type"] == "fifo" and is_["ino"] == made.get(path):
            is_["ino"] = was["ino"]
        if was != is_:
            found.append(f"{path}: {was} is now {is_}")
    return found
