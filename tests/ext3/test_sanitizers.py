"""Run the other tests of the engine with AddressSanitizer and UBSan, as `make sanitize` does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import sanitized

HERE = Path(__file__).parent


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.skipif(sanitized.ENGINE is not None, reason="this is the run under sanitizers")
def test_all_of_this_under_sanitizers(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-m", "not nightly", "-p", "no:cacheprovider"),
            *("--timeout=1200", f"--basetemp={tmp_path / 'inner'}", str(HERE)),
        ],
        env=sanitized.environment(tmp_path),
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=3500,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
