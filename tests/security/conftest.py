"""Fixtures that several tests of attacks share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.system import run


@pytest.fixture
def roots() -> Iterator[Path]:
    """A directory that only root can change, and others can enter, with ACLs."""
    run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/mnt")  # in the run's own mount namespace
    yield Path("/mnt")
    run("umount", "/mnt")
