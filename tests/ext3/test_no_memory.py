"""A temporary lack of memory costs only time: operations are kept and written later."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support import sanitized
from tests.support.ext3 import make, opened
from tests.support.mounts import project_root
from tests.support.system import run

_SCRIPT = """
import errno, logging, os, resource, sys
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
from cowfs.formats.ext3.image import Image
fd = os.open(sys.argv[1], os.O_RDWR)
image = Image(fd, "the store", commit_seconds=0)
# Directories are metadata, which the next commit writes to the journal at once, from one piece of memory.
for number in range(600):
    image.create(2, b"d%d" % number, 0o40755, 0, 0)
def short():
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (256 << 10), resource.RLIM_INFINITY))
def enough():
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
short()
failures = []
for step in (image.commit, image.checkpoint, lambda: image.create(2, b"refused", 0o40755, 0, 0)):
    try:
        step()
    except OSError as error:
        failures.append(error.errno)
    else:
        failures.append(0)
enough()
print(failures, image.facts().aborted)
image.commit()
image.create(2, b"after", 0o40755, 0, 0)
image.checkpoint()
image.close()
"""


@pytest.mark.skipif(sanitized.ENGINE is not None, reason="AddressSanitizer maps terabytes")
def test_a_commit_for_which_memory_is_lacking_is_done_later(tmp_path: Path) -> None:
    image = make(tmp_path / "image")
    done = run(sys.executable, "-c", _SCRIPT, image, env={"PYTHONPATH": project_root()}, check=False)
    assert done.returncode == 0 and "12, 12] 0" in done.stdout, done
    assert "until there is memory" in done.stdout
    with opened(image) as layer:
        names = {entry.name for entry in layer.readdir(layer.root)}
        assert {b"after", *(b"d%d" % number for number in range(600))} <= names
        assert b"refused" not in names
