"""What users see: no names that they may not read, and modes as they are after a write."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from tests.support.mounts import cowfs, mounted
from tests.support.system import as_nobody_prefix, needs_fuse, needs_root, run

pytestmark = [needs_fuse, needs_root]

WRITES = {
    "write": "os.write(os.open(path, os.O_WRONLY), b'x')",
    "append": "os.write(os.open(path, os.O_WRONLY | os.O_APPEND), b'x')",
    "open to truncate": "os.open(path, os.O_WRONLY | os.O_TRUNC)",
    "truncate": "os.truncate(path, 1)",
}
_SCRIPT = """
import os, sys
path = sys.argv[1]
before = os.stat(path).st_mode
{0}
print(oct(before & 0o7777), oct(os.stat(path).st_mode & 0o7777))
"""


@pytest.mark.parametrize("store", ["process", "kernel", "directory"])
def test_set_id_bits_are_gone_at_once(nobody_path: Path, store: str) -> None:
    """After each kind of write by a user, of a lower file and of one in the store; for all who look."""
    lower, place = nobody_path / "lower", nobody_path / "store"
    lower.mkdir()
    modes = {0o6777: 0o777, 0o2767: 0o2767, 0o4766: 0o766}
    for kind in WRITES:
        for mode in modes:
            file = lower / f"{kind}-{mode:o}"
            file.write_bytes(b"content")
            file.chmod(mode)
    engine = None
    if store != "directory":
        engine = store
        assert cowfs("create", place, "16").returncode == 0
    with mounted(lower, nobody_path / "mnt", place, engine=engine, options=["allow_other"]) as here:
        for kind, call in WRITES.items():
            for mode, kept in modes.items():
                file = here.path / f"{kind}-{mode:o}"
                for where in ("lower", "upper"):
                    if where == "upper":
                        file.chmod(mode)
                    script = _SCRIPT.format(call)
                    said = run(*as_nobody_prefix(), sys.executable, "-c", script, file).stdout.split()
                    assert said == [oct(mode), oct(kept)], (kind, where)
                    assert stat.S_IMODE(file.stat().st_mode) == kept, (kind, where)


def test_trusted_names_are_for_root(nobody_path: Path) -> None:
    """In the lower and in the store; other names are seen by all."""
    lower = nobody_path / "lower"
    lower.mkdir()
    for path in (lower / "below", lower / "above"):
        path.write_bytes(b"content")
        os.setxattr(path, "trusted.secret", b"x")
        os.setxattr(path, "user.plain", b"y")
    with mounted(lower, nobody_path / "mnt", nobody_path / "store", options=["allow_other"]) as here:
        (here.path / "above").chmod(0o600)
        (here.path / "above").chmod(0o644)
        script = "import os, sys; print(os.listxattr(sys.argv[1]))"
        for name in ("below", "above"):
            path = here.path / name
            assert set(os.listxattr(path)) >= {"trusted.secret", "user.plain"}
            assert run(*as_nobody_prefix(), sys.executable, "-c", script, path).stdout == "['user.plain']\n"
