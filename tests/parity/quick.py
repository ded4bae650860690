"""Cases that share one mount: each acts in its own directory, which is compared at the end.

A case is a function, or a generator that yields where it needs a remount. All cases share their remounts.
Standard library only, because the child process that runs them imports it too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from tests.parity.script import Case, Script, attempt, load_cases
from tests.parity.trees import directory, link, symlink
from tests.support import tree
from tests.support.tree import Node

Act = Callable[[Script], Generator[None, None, None] | None]

LONGEST = "n" * 255
"""The longest possible name."""

SMALL: tree.Tree = {
    "f": b"lower\n",
    "empty": b"",
    "prog": Node(data=b"#!/bin/sh\necho ran\n", mode=0o755),
    "d/a": b"a\n",
    "d/b": b"bb\n",
    "d/s/c": b"c\n",
    "x": directory(0o750),
    "l": symlink("f"),
    "ld": symlink("d"),
    "dangling": symlink("nowhere"),
    "h1": b"hard\n",
    "h2": link("h1"),
    "d/h3": link("h1"),
    "p": Node("fifo"),
    "n": Node("char", rdev=os.makedev(1, 3), mode=0o666),
    "w": Node(data=b"for all\n", mode=0o666),
    "dressed": Node(data=b"x\n", xattrs={"user.color": b"red", "trusted.t": b"\0\1"}),
    "theirs": directory(0o755, uid=1000, gid=1000),
    "theirs/f": Node(data=b"theirs\n", mode=0o644, uid=1000, gid=1000),
    "sticky": directory(0o1777),
    "sticky/f": Node(data=b"theirs\n", mode=0o666, uid=1001, gid=1001),
}


@dataclass
class Quick:
    """A small case."""

    name: str
    act: Act
    lowers: tuple[tree.Tree, ...]
    upper_differs: str
    """Why the uppers differ after this case; "" if they must be equal."""
    merged_differs: str
    """Why the kernel shows a different tree; "" if the trees must be equal."""
    long: Case | None = None
    """The long case that runs in its own process instead of *act*."""


CASES: dict[str, Quick] = {}


def quick(*lowers: tree.Tree, upper_differs: str = "", merged_differs: str = "") -> Callable[[Act], Act]:
    """Register a case with *lowers*, topmost first, by the name of its function."""

    def register(act: Act) -> Act:
        assert act.__name__ not in CASES, f"two cases are called {act.__name__}"
        CASES[act.__name__] = Quick(act.__name__, act, lowers or (SMALL,), upper_differs, merged_differs)
        return act

    return register


def load() -> dict[str, Quick]:
    """Import every module of cases; return the cases that do not need their own mount."""
    import importlib
    from pathlib import Path

    for path in sorted(Path(__file__).parent.glob("quick_*.py")):
        if path.stem != "quick_child":
            importlib.import_module(f"tests.parity.{path.stem}")
    for name, case in load_cases().items():
        if not case.alone and (name not in CASES or CASES[name].long is None):
            assert name not in CASES, f"two cases are called {name}"
            CASES[name] = Quick(name, _stands_in, case.lowers, case.upper_differs, "", case)
    return CASES


def _stands_in(s: Script) -> None:
    raise NotImplementedError("a long case has a process of its own")


class Brief(Script):
    """A script that takes no snapshots by itself."""

    def look(self) -> tree.Snapshot:
        return {}


def errno_of(operation: Callable[[], Any]) -> Any:
    """Return the errno of an operation, or None if it succeeds, whatever its result."""
    result = attempt(operation)
    return result if isinstance(result, str) and result.startswith("errno") else None


def clear(s: Script, path: str) -> None:
    """Remove a directory and everything in it."""
    for name in sorted(os.listdir(s.at(path))):
        here = f"{path}/{name}"
        if os.path.isdir(s.at(here)) and not os.path.islink(s.at(here)):
            clear(s, here)
        else:
            s.unlink(here)
    s.rmdir(path)
