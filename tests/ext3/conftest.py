"""A fixture with a directory in memory for images."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ext3.images import scratch


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty directory, in memory if possible."""
    made = Path(tempfile.mkdtemp(prefix="cowfs-ext3-", dir=scratch()))
    yield made
    shutil.rmtree(made)
