"""Making room for stores on all kinds of hosts: no byte of a store that is there is touched by that."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cowfs.linux import files
from cowfs.store.offline.grow import grow_open_store
from cowfs.store.served.open import open_store
from tests.support.hosts import MIB, fill, host, sparse_copy
from tests.support.mounts import cowfs
from tests.support.system import needs_root, run

DEV_FUSE_AT_NIGHT = True

pytestmark = needs_root


def writes_of(step: Callable[[], None]) -> int:
    """Return how many writes a step makes, run in a thread of its own."""
    seen: list[int] = []

    def measured() -> None:
        def writes() -> int:
            text = Path("/proc/thread-self/io").read_text()
            return int(text.split("syscw:")[1].split()[0])

        before = writes()
        step()
        seen.append(writes() - before)

    thread = threading.Thread(target=measured)
    thread.start()
    thread.join()
    return seen[0]


def test_growing_under_users_writes_to_nothing_that_they_may_write_to(tmp_path: Path) -> None:
    """On a filesystem without fallocate(2) too, where the C library's posix_fallocate(3) reads a byte of each
    block and writes it back, whatever was written to the block in between."""
    cowfs("create", tmp_path / "whole", "32", check=True)
    with host("ext3", tmp_path / "host", 300) as at:
        with (at / "probe").open("wb") as probe, pytest.raises(OSError):
            files.fallocate(probe.fileno(), 0, 4096)
        path = sparse_copy(tmp_path / "whole", at / "store")
        store = open_store(str(path))
        try:
            steps = [writes_of(step) for step in grow_open_store(store, 64 * MIB) if callable(step)]
            assert steps[0] > 0, "zeros for what is new, while it is no part of the store yet"
            assert steps[1:] == [0], "it is now"
            assert store.size > 48 * MIB
        finally:
            store.close()
        assert run("e2fsck", "-fn", path).returncode == 0


@pytest.mark.parametrize("kind", ["ext3", "ext4", "tmpfs"])
def test_what_grow_adds_has_its_blocks(tmp_path: Path, kind: str) -> None:
    with host(kind, tmp_path / "host", 128) as at:
        path = at / "store"
        cowfs("create", path, "24", check=True)
        assert path.stat().st_blocks * 512 >= 24 * MIB
        cowfs("grow", path, "48", check=True)
        assert path.stat().st_blocks * 512 >= 48 * MIB
        fill(at, 8 * MIB)
        refused = cowfs("grow", path, "96")
        assert refused.returncode == 32 and "needs 48 MiB more" in refused.stderr
        assert path.stat().st_size == 48 * MIB
        assert run("e2fsck", "-fn", path).returncode == 0


def test_a_file_of_unwritten_length_is_completed_without_changing_what_it_has(tmp_path: Path) -> None:
    """truncate(1) made the file long; what stands there already stays."""
    with host("ext3", tmp_path / "host", 128) as at:
        path = at / "store"
        cowfs("create", path, "24", check=True)
        os.truncate(path, 48 * MIB)
        cowfs("grow", path, check=True)
        assert path.stat().st_blocks * 512 >= 48 * MIB
        assert run("e2fsck", "-fn", path).returncode == 0
