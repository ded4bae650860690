"""Run all cases on the kernel's overlayfs and on cowfs, and let each system read the other's store.

COWFS_PARITY_CASES is a pattern for the names of cases. COWFS_PARITY_SUBJECT=kernel compares the kernel with
itself; a case that fails then is wrong.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.parity.places import Place
from tests.parity.quick import Quick, load
from tests.parity.runs import compare, run_all
from tests.support import tree
from tests.support.squashfs import mksquashfs
from tests.support.system import needs_fuse, needs_root

DEV_FUSE_AT_NIGHT = True
SUBJECT = os.environ.get("COWFS_PARITY_SUBJECT", "cowfs")
PATTERN = os.environ.get("COWFS_PARITY_CASES", "*")
pytestmark = [needs_root, needs_fuse, pytest.mark.timeout(1800)]
NAMES = ("kernel", SUBJECT)
LAYERS = 3
UNLIKE_OVER_SQUASHFS = {
    **dict.fromkeys(
        ("statfs_and_pathconf", "names_too_long"), "overlayfs takes names of 256 bytes, as squashfs"
    ),
    **dict.fromkeys(
        (
            "acl_gives_and_takes",
            "acl_that_is_a_mode",
            "acl_that_is_wrong",
            "acl_default_is_inherited",
            "acl_default_and_what_comes_in",
            "posix_acls",
        ),
        "overlayfs sets no ACL on a file of a squashfs, which has none: ovl_set_or_remove_acl()",
    ),
}
"""Cases that differ between cowfs and the kernel's overlayfs if the lower is a squashfs."""


@pytest.mark.parametrize(
    ("kind", "looks"),
    [
        pytest.param("image", "other", id="image"),
        pytest.param("image", "again other", id="image, in full", marks=pytest.mark.nightly),
        pytest.param("directory", "again other", id="directory", marks=pytest.mark.nightly),
        pytest.param("kernel", "again other", id="kernel", marks=pytest.mark.nightly),
        pytest.param("image", "squashfs again other", id="image, squashfs", marks=pytest.mark.nightly),
    ],
)
def test_quick(kind: str, looks: str, tmp_path: Path, ext3: Path) -> None:
    """Results, trees, and the meaning of the uppers are equal, and each system reads the other's store.

    Only one lower is a squashfs: the UUIDs of squashfs are null, so the kernel's overlayfs has no index over
    several.
    """
    cases = {name: case for name, case in load().items() if fnmatch.fnmatch(name, PATTERN)}
    of_squashfs = "squashfs" in looks
    if of_squashfs:
        cases = _of_one_lower(cases)
    pattern = ",".join(cases) if of_squashfs else PATTERN
    lowers = [tmp_path / f"lower{number}" for number in range(1 if of_squashfs else LAYERS)]
    for number, lower in enumerate(lowers):
        lower.mkdir()
        for name, case in cases.items():
            if number < len(case.lowers):
                tree.build(lower / name, case.lowers[number])
        os.utime(lower, ns=(tree.EPOCH_NS, tree.EPOCH_NS))
    untouched = [tree.snapshot(lower, private=True) for lower in lowers]
    options = ("-b", "4096")  # so that squashfs stores the holes
    images = [mksquashfs(Path(f"{place}.sfs"), place, options=options) for place in lowers if of_squashfs]
    scratch = ext3 / tmp_path.name
    scratch.mkdir()
    try:
        place = Place(tmp_path / "one", lowers, scratch / "one", "directory", images=images)
        once = looks if "again" in looks else ""
        kernel = run_all(cases, "kernel", SUBJECT, place, looks=once, pattern=pattern)
        store = scratch / "two" if kind == "directory" else tmp_path / "two.store"
        place = Place(tmp_path / "two", lowers, store, kind, images=images)
        subject = run_all(cases, SUBJECT, "kernel", place, looks=looks, pattern=pattern)
    finally:
        shutil.rmtree(scratch)
    print(f"{len(cases)} cases, {subject.count()} steps")
    wrong = [line for case in cases.values() for line in compare(case, kernel, subject, NAMES)]
    wrong += [f"left in the store: {name}" for name in subject.leftovers]
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)
    assert [tree.snapshot(lower, private=True) for lower in lowers] == untouched, "a lower was changed"


def _of_one_lower(cases: dict[str, Quick]) -> dict[str, Quick]:
    """Return the cases that need only one lower.

    With images, cowfs copies a file up at the first write; overlayfs does when the file is opened for
    writing.
    """
    return {
        name: replace(case, upper_differs=case.upper_differs or "copied up by the first write")
        for name, case in cases.items()
        if len(case.lowers) == 1 and name not in UNLIKE_OVER_SQUASHFS
    }
