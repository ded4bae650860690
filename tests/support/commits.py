"""Serialise tests of ``cowfs run``: the next run of the same user completes any interrupted commit."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def one_run_at_a_time() -> Iterator[None]:
    """Keep tests in other worker processes from completing this test's interrupted commits."""
    lock = Path(tempfile.gettempdir()) / f"cowfs-tests-commits-{os.geteuid()}.lock"
    fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
