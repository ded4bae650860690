"""This version mounts, reads and writes stores of earlier versions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.release.make_stores import STORES
from tests.support.mounts import cowfs
from tests.support.system import needs_fuse, needs_root, run
from tests.support.tree import differences, snapshot, stable

pytestmark = [needs_root, needs_fuse]

KEPT = sorted(path.relative_to(STORES) for path in STORES.glob("*/*.tar.xz"))


def test_some_are_kept() -> None:
    assert {path.name for path in KEPT} == {"image.tar.xz", "directory.tar.xz"}


@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_an_old_store_is_read_and_written(kept: Path, tmp_path: Path) -> None:
    run("tar", "-C", tmp_path, "--xattrs", "--xattrs-include=*", "-xpf", STORES / kept)
    kind = kept.name.partition(".")[0]
    lower, store, merged = STORES / kept.parent / "lower.sqsh", tmp_path / kind, tmp_path / "merged"
    merged.mkdir()
    expected = json.loads((STORES / kept.parent / f"{kind}.json").read_text())
    for turn in range(2):
        cowfs("mount", lower, merged, "--store", store, check=True)
        try:
            assert (
                differences(expected, json.loads(json.dumps(stable(snapshot(merged)))), ("then", "now")) == []
            )
            if turn == 0:
                (merged / "text").write_text("changed by a later version\n")
                expected["text"] = json.loads(json.dumps(stable(snapshot(merged))))["text"]
        finally:
            cowfs("umount", merged, check=True)
    cowfs("check", "-n", store, check=True)
    listed = cowfs("diff", store, "--lower", lower, check=False).stdout
    assert "R  moved/ -> moved-away/" in listed and "D  gone\n" in listed
