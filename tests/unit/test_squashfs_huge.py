"""The cost of a huge image: its tables are read as needed, and dropped again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.mounts import project_root
from tests.support.squashforge import DIRECTORY, Entry, Forge
from tests.support.system import run

WALK = """
import json, stat, sys, time
from cowfs.layers.squashfs import SquashfsLayer

def used():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))

before, start = used(), time.process_time()
layer = SquashfsLayer(sys.argv[1])
opened, count, pending = time.process_time() - start, 0, [layer.root]
while pending:
    directory = pending.pop()
    for name, _ in layer.readdir(directory):
        key, attr = layer.lookup(directory, name)
        count += 1
        if stat.S_ISDIR(attr.st_mode):
            pending.append(key)
print(json.dumps({"opened": opened, "count": count, "mib": used() - before}))
"""


def many_files(path: Path, directories: int, files: int) -> None:
    """Make an image with this number of directories and small files."""
    forge = Forge(count=directories * (files + 1) + 1)
    above = []
    for directory in range(directories):
        first = directory * (files + 1) + 2
        entries = [
            Entry(
                b"file-number-%07d" % (first + n), forge.file(0, 96, [], number=first + n), number=first + n
            )
            for n in range(files)
        ]
        block, offset, size = forge.listing(entries)
        ref = forge.large_directory(block, offset, size, number=first + files)
        above.append(Entry(b"directory-%05d" % directory, ref, DIRECTORY, number=first + files))
    block, offset, size = forge.listing(above)
    path.write_bytes(forge.finish(forge.large_directory(block, offset, size)))


@pytest.mark.parametrize(
    ("directories", "most"),
    [
        (100, 40),
        pytest.param(1000, 100, marks=[pytest.mark.nightly, pytest.mark.timeout(600)]),
    ],
)
def test_memory_is_bounded_by_what_is_looked_at(tmp_path: Path, directories: int, most: int) -> None:
    many_files(tmp_path / "image.sqfs", directories, 1000)
    shown = run(sys.executable, "-c", WALK, tmp_path / "image.sqfs", cwd=project_root(), timeout=300).stdout
    told = json.loads(shown)
    assert told["count"] == directories * 1001
    assert told["opened"] < 1
    assert told["mib"] < most, shown
    assert told["mib"] > 1, "measured nothing"
