"""Measure which lines of the engine inputs reach: ``python -m tests.fuzz.ext3.coverage INPUT...``."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

from cowfs.formats.ext3.build_engine import HERE as ENGINE
from cowfs.formats.ext3.build_engine import SOURCES
from tests.fuzz.ext3 import build
from tests.support.mounts import project_root
from tests.support.system import run


def measure(inputs: list[str], place: Path) -> dict[str, tuple[int, int]]:
    """Run the inputs; return (lines reached, lines) for each source of the engine."""
    program = build.build(place / "program", libfuzzer=False, compiler="gcc", flags=["--coverage"])
    images = build.make_images(place / "images")
    run(program, *inputs, timeout=3600, env={**os.environ, "COWFS_FUZZ_IMAGES": str(images)})
    result = {}
    for name in SOURCES:
        said = run("gcov", "-n", next(place.glob(f"*-{name}.gcda")), cwd=place).stdout
        found = re.search(rf"File '[^']*{ENGINE}/{name}\.c'\nLines executed:([\d.]+)% of (\d+)", said)
        assert found, said
        lines = int(found[2])
        result[name] = (round(float(found[1]) * lines / 100), lines)
    return result


def main() -> None:
    """Print the share of lines reached of each source, and of all."""
    inputs = [os.path.abspath(path) for path in sys.argv[1:]]
    os.chdir(project_root())
    with tempfile.TemporaryDirectory() as place:
        reached = measure(inputs, Path(place))
    reached["all"] = (sum(part[0] for part in reached.values()), sum(part[1] for part in reached.values()))
    for name, (lines, of) in reached.items():
        print(f"{name:<10} {lines:5} of {of:5} lines {100 * lines / of:5.1f} %")


if __name__ == "__main__":
    main()
