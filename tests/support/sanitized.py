"""Run tests with an ext3 engine that is compiled with AddressSanitizer and UBSan.

    python -m tests.support.sanitized PYTEST_ARGUMENT...

Every process that imports `tests.ext3` or calls `load` then uses that engine instead of the installed one.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ENGINE = os.environ.get("COWFS_TEST_ENGINE")
"""The path of the module that replaces the installed engine, if any."""
_NAME = "cowfs.formats.ext3._engine"
_FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")


def load() -> Any:
    """Return the engine, sanitized if there is one. Later imports get the same module."""
    if ENGINE is not None and _NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(_NAME, ENGINE)
        assert spec is not None and spec.loader is not None
        assert b"__asan_init" in Path(ENGINE).read_bytes()
        sys.modules[_NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[_NAME])
    return importlib.import_module(_NAME)


def environment(place: Path) -> dict[str, str]:
    """Compile the engine in *place*; return the environment for tests that use it."""
    from cowfs.formats.ext3.build_engine import HERE, builder

    compiled = builder(HERE.resolve(), _FLAGS).compile(tmpdir=str(place))
    preload = [
        subprocess.run(
            ["gcc", f"-print-file-name={name}.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan", "libubsan")
    ]
    without = {name: value for name, value in os.environ.items() if name != "COVERAGE_PROCESS_CONFIG"}
    return {
        **without,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks memory at exit
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "COWFS_TEST_ENGINE": compiled,
    }


def main() -> int:
    """Run pytest with the command-line arguments; return its exit status."""
    with tempfile.TemporaryDirectory(prefix="cowfs-sanitized-") as place:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *sys.argv[1:]]
        return subprocess.run(command, env=environment(Path(place)), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
