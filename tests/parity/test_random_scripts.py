"""Run random scripts on the kernel's overlayfs and on cowfs: results and trees must be equal."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.parity.places import Place
from tests.parity.random_more import MoreRandomScript
from tests.parity.random_script import BOTTOM, TOP, RandomScript
from tests.support import tree
from tests.support.system import needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True
SUBJECT = os.environ.get("COWFS_PARITY_SUBJECT", "cowfs")
NAMES = ("kernel", SUBJECT)
pytestmark = [needs_root, needs_fuse]
at_night = pytest.mark.nightly
DAY = 2
"""The number of rounds by day, with a fixed seed."""
_KERNELS_NUMBERS = ("ino", "d_ino")
"""The kernel does not always list a renamed directory with its inode number."""


@pytest.mark.parametrize(
    ("kind", "rounds", "steps", "of"),
    [
        pytest.param("image", DAY, 5000, RandomScript, id="image"),
        pytest.param("image", 20, 5000, RandomScript, id="image, long", marks=at_night),
        pytest.param("directory", 20, 5000, RandomScript, id="directory, long", marks=at_night),
        pytest.param("kernel", 20, 5000, RandomScript, id="kernel, long", marks=at_night),
        pytest.param("image", 4, 5000, MoreRandomScript, id="image, more", marks=at_night),
        pytest.param("directory", 4, 5000, MoreRandomScript, id="directory, more", marks=at_night),
        pytest.param("kernel", 4, 5000, MoreRandomScript, id="kernel, more", marks=at_night),
    ],
)
@pytest.mark.timeout(1800)
def test_random_scripts(
    kind: str, rounds: int, steps: int, of: type[RandomScript], tmp_path: Path, ext3: Path
) -> None:
    """Each round continues with the tree of the previous one."""
    lowers = [tmp_path / "top", tmp_path / "bottom"]
    for lower, content in zip(lowers, (TOP, BOTTOM), strict=True):
        tree.build(lower, content)
    untouched = [tree.snapshot(lower, private=True) for lower in lowers]
    scratch = ext3 / tmp_path.name
    scratch.mkdir()
    try:
        stores = scratch / "one", scratch / "two" if kind == "directory" else tmp_path / "two.store"
        kernel = Place(tmp_path / "one", lowers, stores[0], "directory")
        subject = Place(tmp_path / "two", lowers, stores[1], kind)
        seed = int(os.environ.get("COWFS_SEED") or (1 if rounds == DAY else int.from_bytes(os.urandom(4))))
        print(f"COWFS_SEED={seed}")
        for number in range(rounds):
            wrong = _round(kernel, subject, of, seed + number, steps)
            print(f"round {number + 1}: {'wrong' if wrong else 'right'}", flush=True)
            if wrong:
                pytest.fail("\n".join(wrong), pytrace=False)
    finally:
        shutil.rmtree(scratch)
    print(f"{rounds} rounds, {rounds * steps} steps")
    assert [tree.snapshot(lower, private=True) for lower in lowers] == untouched, "a lower was changed"
    if kind != "directory":
        run("e2fsck", "-fn", stores[1])


def _round(kernel: Place, subject: Place, of: type[RandomScript], seed: int, steps: int) -> list[str]:
    """Do *steps* operations on both systems; return descriptions of the differences."""
    with kernel.kernel(), subject.by(SUBJECT):
        scripts = [of(str(place.at), seed) for place in (kernel, subject)]
        try:
            for done in range(0, steps, 500):
                for script in scripts:
                    script.go_on(500)
                wrong = _unlike(scripts, done) or _trees(kernel.at, subject.at)
                if wrong:
                    last = [said for said, _ in scripts[0].results[-8:]]
                    return [f"seed {seed}, before step {done + 500}, after {last}:", *wrong]
        finally:
            for script in scripts:
                script.close()
        before = [tree.snapshot(place.at) for place in (kernel, subject)]
    with subject.kernel():
        after = tree.snapshot(subject.at)
    own, by_kernel = (tree.stable(one, ignore=_KERNELS_NUMBERS) for one in (before[1], after))
    return tree.differences(own, by_kernel, (SUBJECT, "the kernel, of its store"))


def _unlike(scripts: list[RandomScript], start: int) -> list[str]:
    both = zip(scripts[0].results[start:], scripts[1].results[start:], strict=True)
    for number, ((said, one), (_, two)) in enumerate(both, start + 1):
        if one != two:
            before = [said for said, _ in scripts[0].results[max(number - 12, 0) : number - 1]]
            return [
                f"step {number}, {said}: {NAMES[0]} {one!r:.200}, {NAMES[1]} {two!r:.200}; before: {before}"
            ]
    return []


def _trees(kernel: Path, subject: Path) -> list[str]:
    """Return the differences, except for errors of the kernel.

    The kernel sets a new mtime for a metacopy that is opened for writing, and for directories above a file
    that it copies up for a rename that fails.
    """
    wanted, found = (tree.stable(tree.snapshot(at), ignore=_KERNELS_NUMBERS) for at in (kernel, subject))
    for path in wanted.keys() & found.keys():
        if wanted[path]["mtime"] == "now":
            wanted[path]["mtime"] = found[path]["mtime"]
    return tree.differences(wanted, found, NAMES)
