"""A user who only calls statx(2), and measures the times: other users must not slow that down."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

VICTIM = 65533
"""The user ID, neither root's nor nobody's."""

_SCRIPT = """
import ctypes, json, os, select, sys, time
statx = ctypes.CDLL(None, use_errno=True).statx
AT_FDCWD, FORCE_SYNC, BASIC = -100, 0x2000, 0x7FF
buffer = ctypes.create_string_buffer(256)
path, seconds = os.fsencode(sys.argv[1]), []
number, ended = 0, False
statx(AT_FDCWD, path, FORCE_SYNC, BASIC, buffer)  # to have the directories in the kernel's cache
print("started", flush=True)
while not ended:
    number += 1
    for name, expected in ((path, 0), (os.path.dirname(path) + b"/absent-%d" % number, -1)):
        begun = time.monotonic()
        if statx(AT_FDCWD, name, FORCE_SYNC, BASIC, buffer) != expected:
            sys.exit(f"{name}: {os.strerror(ctypes.get_errno())}")
        seconds.append(time.monotonic() - begun)
    ended = bool(select.select([0], [], [], 0.002)[0])
seconds.sort()
print(json.dumps([len(seconds), seconds[len(seconds) * 99 // 100], seconds[-1]]), flush=True)
"""


@dataclass
class Looks:
    """The number of calls, and their times in seconds."""

    count: int = 0
    p99: float = 0.0
    longest: float = 0.0

    def __str__(self) -> str:
        return f"{self.count} looks, p99 {self.p99 * 1000:.1f} ms, longest {self.longest * 1000:.1f} ms"


@contextmanager
def looking(file: Path) -> Iterator[Looks]:
    """Let another user stat *file* past the kernel's caches, and look up new names, during the block.

    The yielded figures are filled in at the end.
    """
    prefix = ["setpriv", f"--reuid={VICTIM}", f"--regid={VICTIM}", "--clear-groups", "--"]
    looks = Looks()
    with subprocess.Popen(
        [*prefix, sys.executable, "-c", _SCRIPT, str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        try:
            yield looks
        except BaseException:
            process.kill()
            raise
        output = process.communicate("end\n", timeout=60)[0]
    looks.count, looks.p99, looks.longest = json.loads(output)
