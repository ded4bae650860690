"""All cases on the kernel's overlayfs and on cowfs, and each system on what the other has written.

COWFS_PARITY_CASES limits them to the names that match; with COWFS_PARITY_SUBJECT=kernel the kernel is held
against itself: a case that fails then is wrong.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
from pathlib import Path

import pytest

from tests.parity.places import Place
from tests.parity.quick import load
from tests.parity.runs import compare, run_all
from tests.support import tree
from tests.support.system import needs_fuse, needs_root

DEV_FUSE_AT_NIGHT = True
SUBJECT = os.environ.get("COWFS_PARITY_SUBJECT", "cowfs")
PATTERN = os.environ.get("COWFS_PARITY_CASES", "*")
pytestmark = [needs_root, needs_fuse, pytest.mark.timeout(1800)]
NAMES = ("kernel", SUBJECT)
LAYERS = 3


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
        once = looks if "again" in looks else ""
        kernel = run_all(cases, "kernel", SUBJECT, place, looks=once, pattern=PATTERN)
        store = scratch / "two" if kind == "directory" else tmp_path / "two.store"
        place = Place(tmp_path / "two", lowers, store, kind)
        subject = run_all(cases, SUBJECT, "kernel", place, looks=looks, pattern=PATTERN)
    finally:
        shutil.rmtree(scratch)
    wrong = [line for case in cases.values() for line in compare(case, kernel, subject, NAMES)]
    wrong += [f"left in the store: {what}" for what in subject.leftovers]
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)
    assert [tree.snapshot(lower, private=True) for lower in lowers] == untouched, "a lower was changed"
