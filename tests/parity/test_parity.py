"""The cases that need a mount for themselves, on the kernel's overlayfs and on cowfs. All others: test_quick.

Set COWFS_PARITY_SUBJECT=kernel to hold the kernel against itself: a case that fails then is wrong.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.parity.harness import SYSTEMS, compare_steps, run_case
from tests.parity.script import Case, load_cases
from tests.support import tree
from tests.support.system import needs_fuse, needs_root

DEV_FUSE_AT_NIGHT = True
SUBJECT = os.environ.get("COWFS_PARITY_SUBJECT", "cowfs")
pytestmark = [needs_root, needs_fuse, pytest.mark.timeout(120)]


@pytest.mark.parametrize("name", [name for name, case in load_cases().items() if case.alone])
def test_parity(name: str, tmp_path: Path, ext3: Path) -> None:
    """Results, trees after every step, and the meaning of the uppers are equal; both read each other's."""
    case = load_cases()[name]
    lowers = [tmp_path / f"lower{number}" for number in range(len(case.lowers))]
    for place, contents in zip(lowers, case.lowers, strict=True):
        tree.build(place, contents)
    untouched = [tree.snapshot(lower, private=True) for lower in lowers]
    scratch = ext3 / tmp_path.name
    scratch.mkdir()
    try:
        wrong = _compare(case, lowers, scratch, tmp_path)
    finally:
        shutil.rmtree(scratch)
    if wrong:
        pytest.fail("\n".join([f"{name}: {case.doc}", *wrong]), pytrace=False)
    assert [tree.snapshot(lower, private=True) for lower in lowers] == untouched, "a lower was changed"


def _compare(case: Case, lowers: list[Path], scratch: Path, place: Path) -> list[str]:
    """Return descriptions of the errors."""
    names = ("kernel", SUBJECT)
    stores = [scratch / "one", scratch / "two"]
    mounts = [place / "one", place / "two"]
    seen = []
    for system, store, at in zip(names, stores, mounts, strict=True):
        at.mkdir()
        if case.upper is not None:
            tree.build(store / "upper", case.upper)
            (store / "work").mkdir()
        seen.append(run_case(case, system, lowers, store, at, place))
    kernel, subject = seen
    assert not kernel.crashed, f"the case itself is wrong: {kernel.crashed}"
    assert not subject.crashed, subject.crashed
    wrong = compare_steps(kernel, subject, names)
    if wrong:
        return wrong
    for name, one in zip(names, seen, strict=True):
        moved = tree.moved_inodes(one.final, one.again)
        wrong += [f"{name}: a remount changed the inode numbers of {moved}"] if moved else []
        wrong += _unlike(one.final, one.again, f"{name} before remount", "after")
    if not case.upper_differs:
        wrong += [f"upper: {line}" for line in tree.differences(kernel.upper, subject.upper, names)]
    wrong += [f"left in the store: {what}" for what in subject.leftovers]
    # Each system reads what the other has written.
    with SYSTEMS["kernel"](lowers, stores[1], mounts[1]):
        by_kernel = tree.snapshot(mounts[1])
    wrong += _unlike(subject.again, by_kernel, f"{SUBJECT}'s upper seen by {SUBJECT}", "by the kernel")
    with SYSTEMS[SUBJECT](lowers, stores[0], mounts[0]):
        by_subject = tree.snapshot(mounts[0])
    wrong += _unlike(kernel.again, by_subject, "kernel's upper seen by the kernel", f"by {SUBJECT}")
    return wrong


def _unlike(one: tree.Snapshot, two: tree.Snapshot, first: str, second: str) -> list[str]:
    return tree.differences(tree.stable(one), tree.stable(two), (first, second))
