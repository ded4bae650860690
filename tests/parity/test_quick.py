"""All small cases on the kernel's overlayfs and on cowfs, and each system on what the other has written.

COWFS_PARITY_CASES limits them to the names that match; with COWFS_PARITY_SUBJECT=kernel the kernel is held
against itself: a case that fails then is wrong.
"""

from __future__ import annotations

import fnmatch
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.parity.places import Place
from tests.parity.quick import Quick, load
from tests.parity.script import Step
from tests.support import tree, upper
from tests.support.mounts import project_root
from tests.support.system import needs_fuse, needs_root

DEV_FUSE_AT_NIGHT = True
SUBJECT = os.environ.get("COWFS_PARITY_SUBJECT", "cowfs")
PATTERN = os.environ.get("COWFS_PARITY_CASES", "*")
pytestmark = [needs_root, needs_fuse, pytest.mark.timeout(120)]
LAYERS = 3


@dataclass
class Seen:
    """All that one system showed."""

    steps: dict[str, list[Step]] = field(default_factory=dict)
    crashed: dict[str, str] = field(default_factory=dict)
    final: dict[str, tree.Snapshot] = field(default_factory=dict)
    again: dict[str, tree.Snapshot] = field(default_factory=dict)
    by_other: dict[str, tree.Snapshot] = field(default_factory=dict)
    """What the other system shows of the same store."""
    upper: dict[str, tree.Snapshot] = field(default_factory=dict)
    leftovers: list[str] = field(default_factory=list)


def run_all(cases: dict[str, Quick], system: str, other: str, place: Place, *, looks: str) -> Seen:
    """Run the cases and look; *looks*: ``again`` after a mount, and at what the ``other`` shows."""
    seen = Seen()
    result = place.at.with_name(f"{place.at.name}.steps")
    child = subprocess.Popen(
        [sys.executable, "-S", "-m", "tests.parity.quick_child", str(place.at), system, str(result), PATTERN],
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
    if "again" in looks:
        with place.by(system):
            seen.again = {name: tree.snapshot(place.at / name) for name in cases}
    with place.seen() as store:
        meaning = upper.meaning(f"{store}/upper", [str(lower) for lower in place.lowers])
        seen.leftovers = upper.leftovers(str(store))
    for path, facts in meaning.items():
        name, _, rest = path.partition("/")
        seen.upper.setdefault(name, {})[rest] = facts
    if "other" in looks:
        with place.by(other):
            seen.by_other = {name: tree.snapshot(place.at / name) for name in cases}
    return seen


@pytest.mark.parametrize(
    ("kind", "looks"),
    [
        pytest.param("image", "other", id="image"),
        pytest.param("image", "again other", id="image, in full", marks=pytest.mark.nightly),
        pytest.param("directory", "again other", id="directory", marks=pytest.mark.nightly),
        pytest.param("kernel", "again other", id="kernel", marks=pytest.mark.nightly),
    ],
)
def test_quick(kind: str, looks: str, tmp_path: Path, ext3: Path) -> None:
    """Same results, same trees, same meaning of the upper, readable by each other."""
    cases = {name: case for name, case in load().items() if fnmatch.fnmatch(name, PATTERN)}
    lowers = [tmp_path / f"lower{number}" for number in range(LAYERS)]
    for number, lower in enumerate(lowers):
        lower.mkdir()
        for name, case in cases.items():
            if number < len(case.lowers):
                tree.build(lower / name, case.lowers[number])
        os.utime(lower, ns=(tree.EPOCH_NS, tree.EPOCH_NS))
    untouched = [tree.snapshot(lower, private=True) for lower in lowers]
    scratch = ext3 / tmp_path.name
    scratch.mkdir()
    try:
        place = Place(tmp_path / "one", lowers, scratch / "one", "directory")
        kernel = run_all(cases, "kernel", SUBJECT, place, looks=looks if "again" in looks else "")
        store = scratch / "two" if kind == "directory" else tmp_path / "two.store"
        subject = run_all(cases, SUBJECT, "kernel", Place(tmp_path / "two", lowers, store, kind), looks=looks)
    finally:
        shutil.rmtree(scratch)
    wrong = [line for case in cases.values() for line in _compare(case, kernel, subject)]
    wrong += [f"left in the store: {what}" for what in subject.leftovers]
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)
    assert [tree.snapshot(lower, private=True) for lower in lowers] == untouched, "a lower was changed"


def _compare(case: Quick, kernel: Seen, subject: Seen) -> Iterator[str]:
    """Yield in words what is wrong with one case."""
    name, names = case.name, ("kernel", SUBJECT)
    for system, seen in zip(names, (kernel, subject), strict=True):
        if name in seen.crashed:
            yield f"{name}: on {system}: {seen.crashed[name]}"
            return
    for number, (one, two) in enumerate(zip(kernel.steps[name], subject.steps[name], strict=False), 1):
        if one.expected is not None:
            for system, step in zip(names, (one, two), strict=True):
                if step.result != one.expected[system]:
                    wanted = f"{one.expected[system]!r} ({one.reason})"
                    yield f"{name}: step {number}, {one.said}: {system} gave {step.result!r}, not {wanted}"
        elif one.result != two.result:
            yield f"{name}: step {number}, {one.said}: kernel {one.result!r}, {SUBJECT} {two.result!r}"
    for system, seen in zip(names, (kernel, subject), strict=True):
        if seen.again:
            moved = tree.moved_inodes(seen.final[name], seen.again[name])
            if moved:
                yield f"{name}: {system}: a remount changed the inode numbers of {moved}"
            yield from _unlike(name, seen.final, seen.again, f"{system} before remount", "after")
        if seen.by_other:
            yield from _unlike(
                name, seen.final, seen.by_other, f"{system}'s store seen by itself", "by the other"
            )
    if not case.merged_differs:
        yield from _unlike(name, kernel.final, subject.final, *names)
    if not case.upper_differs:
        one_upper, other_upper = (seen.upper.get(name, {}) for seen in (kernel, subject))
        yield from (f"{name}: upper: {line}" for line in tree.differences(one_upper, other_upper, names))


def _unlike(
    name: str, one: dict[str, tree.Snapshot], two: dict[str, tree.Snapshot], first: str, second: str
) -> Iterator[str]:
    found = tree.differences(tree.stable(one[name]), tree.stable(two[name]), (first, second))
    yield from (f"{name}: {line}" for line in found)
