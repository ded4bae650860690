"""Run all cases on one system, and compare the results of two systems."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.parity.places import Place
from tests.parity.quick import Quick
from tests.parity.script import Step
from tests.support import tree, upper
from tests.support.mounts import project_root


@dataclass
class Seen:
    """What one system showed."""

    steps: dict[str, list[Step]] = field(default_factory=dict)
    crashed: dict[str, str] = field(default_factory=dict)
    final: dict[str, tree.Snapshot] = field(default_factory=dict)
    again: dict[str, tree.Snapshot] = field(default_factory=dict)
    by_other: dict[str, tree.Snapshot] = field(default_factory=dict)
    """What the other system shows of the same store."""
    upper: dict[str, tree.Snapshot] = field(default_factory=dict)
    leftovers: list[str] = field(default_factory=list)

    def count(self) -> int:
        """Return the number of steps."""
        return sum(map(len, self.steps.values()))


def run_all(
    cases: dict[str, Quick], system: str, other: str, place: Place, *, looks: str, pattern: str = "*"
) -> Seen:
    """Run the cases; *looks* may have ``again`` (snapshots after a remount) and ``other`` (by the other)."""
    fill(cases, place)
    seen = run_steps(cases, system, place, pattern, looks)
    if "again" in looks:
        seen.again = look(cases, system, place)
    with place.seen() as store:
        seen.upper = in_upper(store, place.lowers)
        seen.leftovers = upper.leftovers(str(store))
    if "other" in looks:
        seen.by_other = look(cases, other, place)
    return seen


def run_steps(cases: dict[str, Quick], system: str, place: Place, pattern: str, looks: str = "again") -> Seen:
    """Run the cases on one system, with the remounts that they ask for."""
    seen = Seen()
    result = place.at.with_name(f"{place.at.name}.steps")
    command = [sys.executable, "-S", "-m", "tests.parity.quick_child"]
    child = subprocess.Popen(
        [*command, str(place.at), system, str(result), pattern, looks],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/",
        env={**os.environ, "PYTHONPATH": project_root(), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert child.stdin and child.stdout
    try:
        wants_more = True
        while wants_more:
            with place.by(system):
                child.stdin.write(b"mounted\n")
                child.stdin.flush()
                wants_more = child.stdout.readline() == b"remount\n"
                if not wants_more:
                    child.wait(60)
                    seen.final = {name: tree.snapshot(place.at / name) for name in cases}
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()
    seen.steps, seen.crashed = pickle.loads(result.read_bytes())
    return seen


def fill(cases: dict[str, Quick], place: Place) -> None:
    """Build the upper trees that some cases need."""
    wanted = {
        case.name: case.long.upper for case in cases.values() if case.long and case.long.upper is not None
    }
    if not wanted:
        return
    with place.seen() as store:
        (store / "work").mkdir(parents=True, exist_ok=True)
        (store / "upper").mkdir(exist_ok=True)
        for name, upper_tree in wanted.items():
            tree.build(store / "upper" / name, upper_tree)
        os.utime(store / "upper", ns=(tree.EPOCH_NS, tree.EPOCH_NS))


def look(cases: dict[str, Quick], system: str, place: Place) -> dict[str, tree.Snapshot]:
    """Return the snapshots that one system shows of a store."""
    with place.by(system):
        return {name: tree.snapshot(place.at / name) for name in cases}


def in_upper(store: Path, lowers: Sequence[Path], prefix: str = upper.P) -> dict[str, tree.Snapshot]:
    """Return the meaning of the upper in a store, for each case."""
    result: dict[str, tree.Snapshot] = {}
    for path, facts in upper.meaning(f"{store}/upper", [str(lower) for lower in lowers], prefix).items():
        name, _, rest = path.partition("/")
        result.setdefault(name, {})[rest] = facts
    return result


def compare(case: Quick, kernel: Seen, subject: Seen, names: tuple[str, str]) -> Iterator[str]:
    """Yield descriptions of the errors of one case."""
    name = case.name
    for system, seen in zip(names, (kernel, subject), strict=True):
        if name in seen.crashed:
            yield f"{name}: on {system}: {seen.crashed[name]}"
            return
    both = list(zip(kernel.steps[name], subject.steps[name], strict=False))
    for number, (one, two) in enumerate(both, 1):
        if one.expected is not None:
            for system, step in zip(names, (one, two), strict=True):
                if step.result != one.expected[system]:
                    wanted = f"{one.expected[system]!r} ({one.reason})"
                    yield f"{name}: step {number}, {one.said}: {system} gave {step.result!r}, not {wanted}"
        elif one.result != two.result:
            yield f"{name}: step {number}, {one.said}: kernel {one.result!r}, {names[1]} {two.result!r}"
    yield from _compare_looks(name, both, names)
    for system, seen in zip(names, (kernel, subject), strict=True):
        if seen.again:
            moved = tree.moved_inodes(seen.final[name], seen.again[name])
            if moved:
                yield f"{name}: {system}: a remount changed the inode numbers of {moved}"
            yield from _unlike(name, seen.final, seen.again, f"{system} before remount", "after")
        if name in seen.by_other:
            yield from _unlike(
                name, seen.final, seen.by_other, f"{system}'s store seen by itself", "by the other"
            )
    if not case.merged_differs:
        yield from _unlike(name, kernel.final, subject.final, *names)
    if not case.upper_differs:
        one_upper, other_upper = (seen.upper.get(name, {}) for seen in (kernel, subject))
        yield from (f"{name}: upper: {line}" for line in tree.differences(one_upper, other_upper, names))


def _compare_looks(name: str, both: Sequence[tuple[Step, Step]], names: tuple[str, str]) -> Iterator[str]:
    """Yield the differences after the first step at which the trees differ."""
    before: tuple[tree.Snapshot, tree.Snapshot] | None = None
    for number, (one, two) in enumerate(both, 1):
        if one.snapshot is None or two.snapshot is None:
            continue
        now = one.snapshot, two.snapshot
        wrong = tree.differences(tree.stable(now[0]), tree.stable(now[1]), names)
        moved = [tree.moved_inodes(*pair) for pair in zip(before or now, now, strict=True)]
        if not set(moved[1]) <= set(moved[0]):
            wrong.append(f"inode numbers changed: {names[0]} {moved[0]}, {names[1]} {moved[1]}")
        if wrong:
            yield from (f"{name}: after step {number}, {one.said}: {line}" for line in wrong)
            return
        before = now


def _unlike(
    name: str, one: dict[str, tree.Snapshot], two: dict[str, tree.Snapshot], first: str, second: str
) -> Iterator[str]:
    found = tree.differences(tree.stable(one[name]), tree.stable(two[name]), (first, second))
    yield from (f"{name}: {line}" for line in found)
