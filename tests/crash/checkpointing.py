"""The process to kill: change a union, and create, roll back and delete checkpoints, as a seed determines.

The process can kill itself before or after its Nth change to the store. What the tree is after each step, and
what each checkpoint holds, is written to a file, where that is wanted.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cowfs.changes import checkpoint
from cowfs.layers.directory import DirectoryLayer
from cowfs.layers.ext3 import Ext3Layer
from cowfs.overlay.fs import done_at_once
from tests.support.direct import Direct

CHANGES = (
    *("create", "mkdir", "symlink", "mknod", "link", "unlink", "rmdir", "rename", "chmod", "chown"),
    *("utimens", "truncate", "setxattr", "removexattr", "sync"),
)
COMPARED = ("type", "mode", "owner", "xattrs", "size", "content", "target")
"""The facts that are the same in two runs with the same seed, without times and inode numbers."""
Tree = dict[str, Any]


def tree_of(fs: Direct) -> Tree:
    """Return what a union shows."""
    return {
        path: {key: facts[key] for key in COMPARED if key in facts} for path, facts in fs.snapshot().items()
    }


class Killer:
    """Count the changes to a layer, and exit the process at one of them."""

    def __init__(self, at: int) -> None:
        self.count = 0
        self._at = at
        for kind in (DirectoryLayer, Ext3Layer):
            for name in CHANGES:
                setattr(kind, name, self._counted(getattr(kind, name)))

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*arguments: Any, **named: Any) -> Any:
            self._tick()
            result = method(*arguments, **named)
            self._tick()
            return result

        return call

    def _tick(self) -> None:
        self.count += 1
        if self.count == self._at:
            os.kill(os.getpid(), signal.SIGKILL)


class Steps:
    """Yield the steps of a seed. Each has only one visible change."""

    def __init__(self, fs: Direct, seed: int) -> None:
        self.fs = fs
        self.chance = random.Random(seed)
        self.kept: dict[str, Tree] = {}
        self._made = 0

    def step(self, number: int) -> None:
        fs, chance = self.fs, self.chance
        files = sorted(path for path, facts in fs.snapshot().items() if facts["type"] == "file")
        directories = sorted(path for path, facts in fs.snapshot().items() if facts["type"] == "dir")
        directory = chance.choice(directories).removeprefix(".")
        new = f"{directory}/n{number}".lstrip("/")
        file, act = chance.choice(files or [""]), chance.randrange(14)
        with suppress(OSError):  # an operation that fails is no step
            if act <= 1 or not file:
                fs.create(new, b"", 0o644)
            elif act <= 3:
                fs.write(file, b"%d\n" % number, 0)
            elif act == 4:
                fs.mkdir(new)
            elif act == 5:
                fs.unlink(file)
            elif act == 6:
                fs.rename(directory or file, new)
            elif act == 7:
                fs.set(file, mode=chance.choice([0o600, 0o640]))
            elif act == 8:
                fs.link(file, new)
            else:
                self._checkpoints(act)

    def _checkpoints(self, act: int) -> None:
        store, overlay = self.fs.union.store, self.fs.union.overlay
        if act <= 11 or not self.kept:
            self._made += 1
            name = f"c{self._made}"
            done_at_once(checkpoint.take(store, overlay, name))
            self.kept[name] = tree_of(self.fs)
        elif act == 12:
            self.fs.forget()
            name = self.chance.choice(sorted(self.kept))
            done_at_once(checkpoint.go_back(store, overlay, name, lambda _: None))
        else:
            name = self.chance.choice(sorted(self.kept))
            del self.kept[name]
            done_at_once(checkpoint.delete(store, overlay, name))
            self.fs.remount()  # merges its layer with the one above


def main(store: str, lower: str, seed: int, count: int, kill_at: int, states: str) -> None:
    """Do this number of steps, and print the number of changes after each."""
    killer = Killer(kill_at)
    fs = Direct(store, [lower])
    steps = Steps(fs, seed)
    seen = [{"tree": tree_of(fs), "kept": {}}]
    print(f"step 0 {killer.count}", flush=True)
    for number in range(1, count + 1):
        steps.step(number)
        print(f"step {number} {killer.count}", flush=True)
        if states:
            seen.append({"tree": tree_of(fs), "kept": dict(steps.kept)})
    if states:
        Path(states).write_text(json.dumps(seen))
    fs.close()


if __name__ == "__main__":
    seed, count, kill_at = map(int, sys.argv[3:6])
    main(sys.argv[1], sys.argv[2], seed, count, kill_at, sys.argv[6])
