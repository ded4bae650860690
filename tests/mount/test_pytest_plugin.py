"""The fixtures that cowfs has for the tests of others, run by a pytest of their own, as an ordinary user."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support.mounts import eventually, is_mounted
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


KILLED = """
import os, pytest, signal

@pytest.mark.cowfs("lower", store="store")
def test_killed(cowfs_tree):
    (cowfs_tree.path / "new").write_text("x")
    print(cowfs_tree.path, flush=True)
    os.killpg(0, signal.SIGKILL)
"""


def run_pytest(where: Path, *options: str, own_group: bool = False) -> subprocess.CompletedProcess[str]:
    """Run test_others.py there, as an ordinary user, with a TMPDIR of its own."""
    if os.geteuid() == 0:
        run("chown", "-R", "65534:65534", where)
    own = ("env", f"TMPDIR={where}/tmp", "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1", f"HOME={where}")
    return subprocess.run(
        [
            *(*as_nobody_prefix(), *own, "sh", "-c", 'mkdir "$TMPDIR" && exec "$0" "$@"'),
            *(sys.executable, "-m", "pytest", "-p", "cowfs", "-q", "-W", "error", "--strict-markers"),
            *("-p", "no:cacheprovider", f"--basetemp={where}/base", *options, str(where / "test_others.py")),
        ],
        capture_output=True,
        text=True,
        cwd=where,
        timeout=60,
        start_new_session=own_group,
    )


def no_trees(where: Path) -> bool:
    """Whether no directory is left in its TMPDIR that a tree was mounted on."""
    return not any(path.name.startswith("cowfs-") for path in (where / "tmp").iterdir())


def test_trees_for_the_tests_of_others(nobody_path: Path) -> None:
    lower = nobody_path / "lower"
    (lower / "dir").mkdir(parents=True)
    for name in ("old", "keep", "dir/in"):
        (lower / name).write_text(name)
    (nobody_path / "test_others.py").write_text(TESTS)
    done = run_pytest(nobody_path, "-p", "xdist", "-n", "1")
    assert "2 failed, 1 passed, 1 error" in done.stdout, done.stdout + done.stderr
    assert "the marker cowfs names no lower (@pytest.mark.cowfs" in done.stdout, done.stdout
    assert "AssertionError: on purpose" in done.stdout
    assert (
        "AssertionError: the tree has other changes than expected:\n"
        "E         not expected: added odd\\nname\n"
        "E         not expected: modified keep (content, times)\n"
        "E         did not happen: deleted old\n"
    ) in done.stdout, done.stdout
    assert no_trees(nobody_path)
    assert sorted(path.name for path in lower.iterdir()) == ["dir", "keep", "old"]


def test_who_is_killed_leaves_no_tree(nobody_path: Path) -> None:
    """With all of its process group, as timeout(1) and CI do it."""
    (nobody_path / "lower").mkdir()
    (nobody_path / "test_others.py").write_text(KILLED)
    done = run_pytest(nobody_path, "-s", own_group=True)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    where = next(line for line in done.stdout.splitlines() if "/tmp/cowfs-" in line)
    eventually(lambda: not is_mounted(where) and no_trees(nobody_path), "the tree is gone", 30)
    eventually((nobody_path / "store/upper/new").exists, "what was written is kept")


def test_the_plugin_loads_nothing_before_a_test_asks() -> None:
    program = (
        "import pytest, sys, cowfs.pytest_plugin; print([m for m in sys.modules if m.startswith('cowfs')])"
    )
    said = subprocess.check_output([sys.executable, "-c", program], text=True).strip()
    assert said == "['cowfs', 'cowfs.pytest_plugin']"
