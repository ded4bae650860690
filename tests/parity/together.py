"""Run the long cases together with the small ones: on the same mounts, each in its own process.

A long case changes its user and its directory, and may take a snapshot after each step. When it asks for a
remount, its process waits until all other cases have reached a remount or their end. Standard library only,
like everything that the child process imports.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import traceback
from collections.abc import Generator
from typing import BinaryIO

from tests.parity.script import Case, Script, Step

_PR_SET_PDEATHSIG = 1
_ASKED, _ENDED = b"r", b"e"


def run(case: Case, script: Script) -> Generator[None, None, list[Step]]:
    """Run a case; yield at each remount, and return its steps at the end."""
    to_us, from_it = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(to_us[1])
            os.close(from_it[0])
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            _act(case, script, to_us[0], from_it[1])
        finally:
            os._exit(0)
    os.close(to_us[0])
    os.close(from_it[1])
    with os.fdopen(to_us[1], "wb", 0) as says, os.fdopen(from_it[0], "rb") as hears:
        while (what := hears.read(1)) == _ASKED:
            yield
            says.write(b"\n")
        steps = _answer(what, hears)
    os.waitpid(pid, 0)
    return steps


def _answer(what: bytes, hears: BinaryIO) -> list[Step]:
    assert what == _ENDED, "the process of the case died"
    steps, crashed = pickle.loads(hears.read())
    assert not crashed, crashed
    return list(steps)


def _act(case: Case, script: Script, hears: int, says: int) -> None:
    def remount() -> None:
        os.write(says, _ASKED)
        os.read(hears, 1)

    script.remount, crashed = remount, ""
    try:
        case.act(script)
    except BaseException:
        crashed = traceback.format_exc()
    os.chdir("/")
    with os.fdopen(says, "wb") as out:
        out.write(_ENDED)
        pickle.dump((script.steps, crashed), out)
