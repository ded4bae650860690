"""A command of `cowfs run` reaches nothing of the system beside the merged tree."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.mounts import cowfs
from tests.support.system import makes_user_namespaces, needs_fuse, needs_root

pytestmark = [needs_fuse, needs_root]
_ATTEMPTS = """
for process in $(grep -la cowfs /proc/[0-9]*/cmdline 2>/dev/null); do
    process=${process%/cmdline}
    echo evil 2>/dev/null >>$process/root$0
    nsenter --mount=$process/ns/mnt sh -c "echo evil >>$0" 2>/dev/null
    test $process = /proc/$$ || cat $process/environ $process/maps 2>/dev/null
done
echo evil >>$0; cat $0
"""


def test_a_users_command_does_not_find_the_system(nobody_path: Path) -> None:
    """The processes that serve it see the system, and are the same user's."""
    if not makes_user_namespaces():
        pytest.skip("needs user namespaces")
    victim = nobody_path / "victim"
    victim.write_text("good\n")
    victim.chmod(0o666)
    done = cowfs("run", "--root", "/", "--discard", "--", "sh", "-c", _ATTEMPTS, victim, nobody=True)
    assert (done.returncode, set(done.stdout.split())) == (0, {"good", "evil"}), done
    assert victim.read_text() == "good\n"
