"""Writes and changes of owner or ACL clear set-ID bits at once for everybody, as on ext4."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import setid
from tests.support.mounts import cowfs, mounted, project_root
from tests.support.system import needs_fuse, needs_root, run

pytestmark = [needs_fuse, needs_root, pytest.mark.slow]

Seen = dict[str, dict[str, str]]

DIFFER = {
    ("an ACL", "DONT_SYNC"),  # an answer without attributes: what the kernel knows is old
    ("mmap", "capability"),  # is taken here, too
    ("no ACL", "said"),  # there was none: ENODATA, as overlayfs says
}
"""The documented differences to ext4 (docs/semantics.md)."""


def do(*arguments: str | Path) -> str:
    env = {**os.environ, "PYTHONPATH": project_root()}
    return run(sys.executable, "-m", "tests.support.setid", *arguments, env=env).stdout


@pytest.fixture(scope="module")
def ext4() -> Iterator[Seen]:
    """The results on a filesystem of the kernel, in a place that everybody can reach."""
    place = Path(tempfile.mkdtemp(prefix="cowfs-ext4-"))
    place.chmod(0o755)
    at = place / "at"
    at.mkdir()
    run("truncate", "-s", "96M", place / "image")
    run("mkfs.ext4", "-q", "-I", "256", place / "image")
    run("mount", "-o", "loop", place / "image", at)
    try:
        do("make", at)
        yield json.loads(do("do", at, "upper"))
    finally:
        run("umount", at)
        shutil.rmtree(place)


def may_differ(case: str, field: str) -> bool:
    if re.search(r"^\d+ (foreign )?chown of nobody by root $", case):
        return True  # of a file with capabilities: is not told from what comes before root's write
    return any(f" {what} " in case and field == which for what, which in DIFFER)


@pytest.mark.parametrize("store", ["process", pytest.param("kernel", marks=pytest.mark.nightly), "directory"])
def test_as_on_ext4(nobody_path: Path, ext4: Seen, store: str) -> None:
    """Files in the lower, in the store, and metacopies behave as on ext4."""
    lower, place = nobody_path / "lower", nobody_path / "store"
    lower.mkdir()
    do("make", lower)
    engine = None if store == "directory" else store
    for where in ("lower", "upper", "metacopy"):
        if engine:
            assert cowfs("create", place, "64").returncode == 0
        with mounted(lower, nobody_path / "mnt", place, engine=engine, options=["allow_other"]) as here:
            seen: Seen = json.loads(do("do", here.path, where))
        run("rm", "-r", place)
        assert len(seen) > 100
        wrong = {
            f"{case}: {field}": f"{seen[case][field]}, on ext4 {value}"
            for case, fields in ext4.items()
            for field, value in fields.items()
            if seen[case][field] != value and not may_differ(case, field)
        }
        assert not wrong, where


def of_a_directory(tree: Path, gid: int) -> int:
    """The mode of a set-group-ID directory after its owner, who is not in its group, has given it an ACL."""
    place = tree / "shared"
    place.mkdir()
    os.chown(place, setid.OWNER, gid)
    place.chmod(0o2775)
    owner = ["setpriv", f"--reuid={setid.OWNER}", f"--regid={setid.OWNER}", "--clear-groups"]
    give = "import os, sys; os.setxattr(sys.argv[1], 'system.posix_acl_access', bytes.fromhex(sys.argv[2]))"
    run(*owner, sys.executable, "-c", give, place, setid.AN_ACL.hex())
    return place.stat().st_mode & 0o7777


@pytest.mark.parametrize("gid", [setid.OWNER, setid.FOREIGN])
@pytest.mark.parametrize("store", ["image", "directory"])
def test_an_acl_of_a_directory(nobody_path: Path, store: str, gid: int) -> None:
    """Takes set-group-ID from it as from a file."""
    lower, plain = nobody_path / "lower", nobody_path / "plain"
    lower.mkdir()
    plain.mkdir()
    if store == "image":
        assert cowfs("create", nobody_path / "store", "64").returncode == 0
    with mounted(lower, nobody_path / "mnt", nobody_path / "store", options=["allow_other"]) as here:
        assert of_a_directory(here.path, gid) == of_a_directory(plain, gid)
