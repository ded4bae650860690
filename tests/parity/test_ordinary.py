"""Run the cases as an ordinary user: the kernel's overlayfs in a user namespace, cowfs without one."""

from __future__ import annotations

import fnmatch
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parity import ordinary
from tests.parity.ordinary import ROOTS, P, Work, run_as_nobody
from tests.parity.places import Place
from tests.parity.quick import Quick, load
from tests.parity.runs import compare, in_upper
from tests.support import tree, upper
from tests.support.system import NOBODY, makes_user_namespaces, needs_fuse, needs_root, run

DEV_FUSE_AT_NIGHT = True
PATTERN = os.environ.get("COWFS_PARITY_CASES", "*")
LAYERS = 3
NAMES = ("kernel", "cowfs")
AS_EXT3 = {"posix_acls: step 10, removexattr 'acl' system.posix_acl_access"}
"""Cases in which cowfs behaves like ext3, but the kernel does not: removing a missing ACL succeeds."""
pytestmark = [needs_root, needs_fuse, pytest.mark.timeout(1800)]


@pytest.fixture
def here(nobody_path: Path) -> Iterator[Path]:
    """An ext3 in which nobody may create files: the kernel's overlayfs does not support every filesystem."""
    image, at = nobody_path / "ext3", nobody_path / "at"
    at.mkdir()
    with image.open("wb") as out:
        out.truncate(256 << 20)
    run("mke2fs", "-q", "-t", "ext3", "-b", "4096", "-I", "256", "-m", "0", "-i", "8192", image)
    run("mount", "-o", "loop", image, at)
    try:
        os.chown(at, NOBODY, NOBODY)
        at.chmod(0o777)
        yield at
    finally:
        run("umount", at)


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        pytest.param("image", 12, id="image"),
        pytest.param("directory", 12, id="directory"),
        pytest.param("image", 1, id="image, in full", marks=pytest.mark.nightly),
        pytest.param("directory", 1, id="directory, in full", marks=pytest.mark.nightly),
    ],
)
def test_ordinary(kind: str, part: int, here: Path) -> None:
    """Compare with the kernel's overlayfs for users, or with root's if that lacks redirects and index."""
    if not makes_user_namespaces():
        pytest.skip("needs user namespaces")
    cases = dict(itertools.islice(_cases().items(), 0, None, part))
    names = list(cases)
    lowers, roots_lowers = _build(here, "lower", P, cases), _build(here, "roots", upper.P, cases)
    store = here / "two" if kind == "directory" else here / "two.store"
    subject = run_as_nobody(Work("cowfs", here / "m2", lowers, store, kind, names))
    kernel = run_as_nobody(Work("kernel", here / "m1", lowers, here / "one", "directory", names))
    by_root = run_as_nobody(Work(ROOTS, here / "m3", roots_lowers, here / "three", "directory", names))
    kernel.upper = _readable(in_upper(here / "one", lowers, P))
    by_root.upper = _readable(in_upper(here / "three", roots_lowers))
    if kind == "image":
        with Place(here / "m4", lowers, store, kind, made=True).seen() as opened:
            subject.upper = _readable(in_upper(opened, lowers))
            subject.leftovers = upper.leftovers(str(opened))
            # The overlayfs that root mounts ignores user.overlay attributes.
            plain = [name for name in names if not _has_marks(cases[name])]
            subject.by_other = run_as_nobody(
                Work(ROOTS, here / "m5", lowers, opened, "directory", plain, runs=False)
            )
    else:
        subject.upper = _readable(in_upper(store, lowers, P))
        subject.leftovers = upper.leftovers(str(store), P)
        kernel.by_other = run_as_nobody(
            Work("cowfs", here / "m5", lowers, here / "one", "directory", names, runs=False)
        )
    print(f"{len(cases)} cases, {subject.count()} steps")
    wrong = [f"left in the store: {what}" for what in subject.leftovers]
    for case in cases.values():
        unlike = list(compare(case, by_root, subject, NAMES))
        if unlike:
            also = {_place(line) for line in compare(case, kernel, subject, NAMES)}
            wrong += [line for line in unlike if _place(line) in also - AS_EXT3]
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


def _place(line: str) -> str:
    """Return the names of the cases that differ."""
    return line.partition(": kernel ")[0].partition(": only in ")[0]


def _cases() -> dict[str, Quick]:
    """Return all cases but those that need something in the upper that no user can create."""
    every = load().items()
    return {
        name: case
        for name, case in every
        if fnmatch.fnmatch(name, PATTERN) and (case.long is None or case.long.upper is None)
    }


def _has_marks(case: Quick) -> bool:
    nodes = itertools.chain.from_iterable(lower.values() for lower in case.lowers)
    return any(name.startswith(upper.P) for node in nodes for name in getattr(node, "xattrs", ()))


def _readable(seen: dict[str, tree.Snapshot]) -> dict[str, tree.Snapshot]:
    """Return the meaning of an upper whose modes allow its owner to read it, as cowfs needs."""
    for facts in itertools.chain.from_iterable(case.values() for case in seen.values()):
        if "mode" in facts:
            facts["mode"] = oct(int(facts["mode"], 8) | (0o700 if facts["type"] == "dir" else 0o400))
    return seen


def _build(here: Path, name: str, prefix: str, cases: dict[str, Quick]) -> list[Path]:
    """Build the lowers on another filesystem than the stores."""
    lowers = [here.parent / f"{name}{number}" for number in range(LAYERS)]
    for number, lower in enumerate(lowers):
        lower.mkdir()
        for case in cases.values():
            if number < len(case.lowers):
                ordinary.build(lower / case.name, case.lowers[number], prefix)
        os.chown(lower, NOBODY, NOBODY)
        os.utime(lower, ns=(tree.EPOCH_NS, tree.EPOCH_NS))
    return lowers
