"""The fixtures that cowfs has for the tests of others, run by a pytest of their own, as an ordinary user."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.system import as_nobody_prefix, run

DEV_FUSE_AT_NIGHT = True
TESTS = """
import pytest
from pathlib import Path

@pytest.mark.cowfs("lower", size="64M")
def test_marked(cowfs_tree, assert_changes):
    (cowfs_tree.path / "new").write_text("x")
    name = cowfs_tree.snapshot()
    (cowfs_tree.path / "keep").write_text("else")
    (cowfs_tree.path / "old").unlink()
    (cowfs_tree.path / "dir").rename(cowfs_tree.path / "moved")
    assert_changes(
        cowfs_tree, added=["new"], modified=["keep"], deleted=[Path("old")], renamed={"dir": "moved"}
    )
    cowfs_tree.rollback(name)
    assert_changes(cowfs_tree, added=["/new"])

def test_stored(cowfs_tree, cowfs_store):
    lower = Path(__file__).parent / "lower"
    tree = cowfs_tree(lower, store=cowfs_store)
    assert cowfs_store.is_dir()
    (tree.path / "old").unlink()
    assert False, "on purpose"

@pytest.mark.cowfs("lower")
def test_wrong(cowfs_tree, assert_changes):
    (cowfs_tree.path / "keep").write_text("else")
    (cowfs_tree.path / "odd\\nname").touch()
    assert_changes(cowfs_tree, deleted=["old"])

@pytest.mark.cowfs
def test_bare(cowfs_tree):
    pass
"""


def test_trees_for_the_tests_of_others(nobody_path: Path) -> None:
    lower = nobody_path / "lower"
    (lower / "dir").mkdir(parents=True)
    for name in ("old", "keep", "dir/in"):
        (lower / name).write_text(name)
    (nobody_path / "test_others.py").write_text(TESTS)
    if os.geteuid() == 0:
        run("chown", "-R", "65534:65534", nobody_path)
    temporary = nobody_path / "tmp"
    done = subprocess.run(
        [
            *as_nobody_prefix(),
            *(
                "env",
                f"TMPDIR={temporary}",
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1",
                "sh",
                "-c",
                'mkdir "$TMPDIR" && exec "$0" "$@"',
            ),
            *(sys.executable, "-m", "pytest", "-p", "xdist", "-p", "cowfs", "-n", "1", "-q", "-W", "error"),
            *(
                "--strict-markers",
                "-p",
                "no:cacheprovider",
                "--basetemp",
                nobody_path / "base",
                nobody_path / "test_others.py",
            ),
        ],
        capture_output=True,
        text=True,
        cwd=nobody_path,
        timeout=60,
    )
    assert "2 failed, 1 passed, 1 error" in done.stdout, done.stdout + done.stderr
    assert "the marker cowfs names no lower (@pytest.mark.cowfs" in done.stdout, done.stdout
    assert "AssertionError: on purpose" in done.stdout
    assert (
        "AssertionError: the tree has other changes than expected:\n"
        "E         not expected: added odd\\nname\n"
        "E         not expected: modified keep (content, times)\n"
        "E         did not happen: deleted old\n"
    ) in done.stdout, done.stdout
    assert [path for path in temporary.iterdir() if path.name.startswith("cowfs-")] == []
    assert sorted(path.name for path in lower.iterdir()) == ["dir", "keep", "old"]


def test_the_plugin_loads_nothing_before_a_test_asks() -> None:
    program = (
        "import pytest, sys, cowfs.pytest_plugin; print([m for m in sys.modules if m.startswith('cowfs')])"
    )
    said = subprocess.check_output([sys.executable, "-c", program], text=True).strip()
    assert said == "['cowfs', 'cowfs.pytest_plugin']"
