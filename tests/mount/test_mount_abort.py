"""A connection that the administrator aborts (fuse.rst of the kernel): nothing dead is left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.mounts import cowfs, eventually, is_mounted
from tests.support.system import needs_fuse, needs_root

pytestmark = [needs_fuse, needs_root]

_CONNECTIONS = Path("/sys/fs/fuse/connections")


def test_an_aborted_connection_is_detached_and_the_store_released(tmp_path: Path) -> None:
    """The mountpoint is an ordinary directory again, the log says why, and the changes are there."""
    lower, mountpoint, store, log = (tmp_path / name for name in ("lower", "mnt", "store", "log"))
    lower.mkdir()
    mountpoint.mkdir()
    arguments = ("mount", str(lower), str(mountpoint), "--store", str(store), "-o", f"log={log}")
    assert cowfs(*arguments).returncode == 0
    (mountpoint / "kept").write_text("kept")
    connection = _CONNECTIONS / str(os.minor(mountpoint.stat().st_dev))
    if not connection.exists():
        assert cowfs("umount", str(mountpoint)).returncode == 0
        pytest.skip("the control filesystem of FUSE is not mounted at /sys/fs/fuse/connections")
    (connection / "abort").write_text("1")
    eventually(lambda: not is_mounted(mountpoint), "the dead mount is detached")
    eventually(lambda: "was aborted" in log.read_text(), "the log says so")
    eventually(lambda: cowfs(*arguments).returncode == 0, "the store is released")
    try:
        assert (mountpoint / "kept").read_text() == "kept"
    finally:
        assert cowfs("umount", str(mountpoint)).returncode == 0
