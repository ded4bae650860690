"""Run a case on two systems, and compare everything visible."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.parity.script import Case, Step
from tests.support import tree, upper
from tests.support.mounts import kernel_overlay, mounted, project_root

Mounter = Callable[[Sequence[Path], Path, Path], AbstractContextManager[Any]]


@contextmanager
def _cowfs(lowers: Sequence[Path], store: Path, at: Path) -> Iterator[None]:
    with mounted(list(lowers), at, store):
        yield


SYSTEMS: dict[str, Mounter] = {"kernel": kernel_overlay, "cowfs": _cowfs}


@dataclass
class Seen:
    """What one system showed in one case."""

    steps: list[Step] = field(default_factory=list)
    crashed: str = ""
    final: tree.Snapshot = field(default_factory=dict)
    again: tree.Snapshot = field(default_factory=dict)
    """The tree after a remount."""
    upper: tree.Snapshot = field(default_factory=dict)
    leftovers: list[str] = field(default_factory=list)


def run_case(case: Case, system: str, lowers: Sequence[Path], store: Path, at: Path, place: Path) -> Seen:
    """Run *case* on *system* with its upper in *store*; take snapshots at the end and after a remount."""
    seen, mount = Seen(), SYSTEMS[system]
    result = place / f"{at.name}.steps"
    command = [sys.executable, "-S", "-m", "tests.parity.child", str(at), system, case.name, str(result)]
    errors = place / f"{at.name}.stderr"
    with errors.open("wb") as stderr:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, cwd="/",
            env={**os.environ, "PYTHONPATH": project_root(), "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
    assert child.stdin and child.stdout
    try:
        wants_more = True
        while wants_more:
            with mount(lowers, store, at):
                child.stdin.write(b"mounted\n")
                child.stdin.flush()
                wants_more = child.stdout.readline() == b"remount\n"
                if not wants_more:
                    child.wait(60)
                    seen.final = tree.snapshot(at)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        child.stdin.close()
        child.stdout.close()
    if child.returncode != 0:
        seen.crashed = errors.read_text()
    seen.steps = pickle.loads(result.read_bytes()) if result.exists() else []
    if seen.steps and seen.steps[-1].said == "remount":
        seen.again = seen.final
    else:
        with mount(lowers, store, at):
            seen.again = tree.snapshot(at)
    seen.upper = upper.meaning(f"{store}/upper", [str(lower) for lower in lowers])
    seen.leftovers = upper.leftovers(str(store))
    return seen


def compare_steps(one: Seen, two: Seen, names: tuple[str, str]) -> list[str]:
    """Describe the first step at which two systems differ; return an empty list if they never do."""
    before: list[tree.Snapshot | None] = [None, None]
    for number, (left, right) in enumerate(zip(one.steps, two.steps, strict=False), 1):
        wrong = _compare_results(left, right, names)
        if left.snapshot is not None and right.snapshot is not None:
            wrong += tree.differences(tree.stable(left.snapshot), tree.stable(right.snapshot), names)
            moved = [
                tree.moved_inodes(old, new) if old is not None else []
                for old, new in zip(before, (left.snapshot, right.snapshot), strict=True)
            ]
            if moved[0] != moved[1]:
                wrong.append(f"inode numbers changed: {names[0]} {moved[0]}, {names[1]} {moved[1]}")
            before = [left.snapshot, right.snapshot]
        if wrong:
            return [f"step {number}, {left.said}:", *wrong]
    if len(one.steps) != len(two.steps):
        return [f"{names[0]} did {len(one.steps)} steps, {names[1]} {len(two.steps)}"]
    return []


def _compare_results(left: Step, right: Step, names: tuple[str, str]) -> list[str]:
    if left.expected is not None:
        return [
            f"{name} gave {step.result!r}, not {left.expected[name]!r} ({left.reason})"
            for name, step in zip(names, (left, right), strict=True)
            if step.result != left.expected[name]
        ]
    if left.result != right.result:
        return [f"{names[0]} gave {left.result!r}, {names[1]} gave {right.result!r}"]
    return []
