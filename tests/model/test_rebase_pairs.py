"""`cowfs rebase` of each combination of what a path is in the old root, in the new root and in the store."""

from __future__ import annotations

import itertools
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cowfs.store.offline.create import create_store
from tests.model.test_rebase import Plain, facts_of, is_dir, kids, merged, nested, remove, run, seen
from tests.support import tree
from tests.support.direct import Direct
from tests.support.system import needs_root

pytestmark = [needs_root, pytest.mark.timeout(600)]

KINDS: dict[str, Any] = {
    "absent": None,
    "file": b"one",
    "other": b"two",
    "link": "one",
    "another": "two",
    "empty": {},
    "dir": {"f": b"one"},
    "private": {"f": b"one", "": 0o700},
    "changed": {"f": b"two", "g": {}},
    "null": 0o020600,
    "pipe": 0o010644,
}
"""What a path may be: content, target, names (and mode), or the mode of a special file."""
NULL = os.makedev(1, 3)


class Root(Plain):
    """Also makes special files."""

    def mknod(self, path: str, mode: int, rdev: int) -> None:
        os.mknod(self.root / path, mode, rdev)


def make(fs: Any, path: str, what: Any) -> None:
    """Make a file of KINDS."""
    if isinstance(what, bytes):
        fs.create(path, what)
    elif isinstance(what, str):
        fs.symlink(os.fsencode(what), path)
    elif isinstance(what, dict):
        fs.mkdir(path)
        for name, one in what.items():
            if name:
                make(fs, f"{path}/{name}", one)
        if "" in what:
            fs.set(path, mode=what[""])
    elif what is not None:
        fs.mknod(path, what, NULL if what == KINDS["null"] else 0)


def news(old: Any, new: Any, result: Any, path: str = "") -> list[str]:
    """Return the paths of what the new root has, the old one had not, and the result has not."""
    if new is None or new in (result, old):
        return []
    if not is_dir(new):
        return [path]
    found = [path] if not is_dir(result) and not kids(new) else []
    for name, one in kids(new).items():
        found += news(kids(old).get(name), one, kids(result).get(name), f"{path}/{name}")
    return found


def is_disputed(was: Any, now: Any, to: Any, got: Any) -> bool:
    """Whether both changed a path in different ways, or the result lacks what is new."""
    if any(map(is_dir, (was, now, to))):
        lost = is_dir(was) and is_dir(now) and to is None and was[""] != now[""]
        return lost or news(was, to, got) != []
    return was not in (now, to) and now != to


@pytest.mark.parametrize("rewritten", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_each_combination(tmp_path: Path, rewritten: bool) -> None:
    """All in one store; *rewritten* also makes anew what is the same in the store."""
    old, new, store = tmp_path / "old", tmp_path / "new", tmp_path / "store.bs"
    all_of_them = list(itertools.product(KINDS, repeat=3))
    for at, root in enumerate((old, new)):
        root.mkdir()
        for kinds in all_of_them:
            make(Root(root), "-".join(kinds), KINDS[kinds[at]])
    create_store(str(store), 64 << 20)
    with closing(Direct(str(store), [str(old)])) as fs:
        for kinds in all_of_them:
            path, (was, _, now) = "-".join(kinds), kinds
            if was != now or rewritten:
                if was != "absent":
                    remove(fs, path)
                make(fs, path, KINDS[now])
    before = nested(facts_of(seen(store, old)))
    trees = [nested(facts_of(tree.snapshot(old))), before, nested(facts_of(tree.snapshot(new)))]
    done = run(store, old, new)
    after = nested(facts_of(seen(store, new)))
    named = {os.fsdecode(one.path).partition("/")[0] for one in done.conflicts}
    wrong = {}
    for kinds in all_of_them:
        path = "-".join(kinds)
        first, mine, theirs = (kids(one).get(path) for one in trees)
        got = kids(after).get(path)
        if got != merged(first, mine, theirs):
            wrong[path] = got
        elif path in named and (first in (mine, theirs) or mine == theirs):
            wrong[path] = "a conflict"
        elif path not in named and is_disputed(first, mine, theirs, got):
            wrong[path] = "no conflict"
    assert wrong == {}
