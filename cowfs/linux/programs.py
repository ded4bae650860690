"""Find the programs that cowfs starts, and make their environment."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import sys
from contextlib import suppress

SAFE_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_E2FSPROGS = ("E2FSCK_", "E2FSPROGS_", "E2IMAGE_", "EXT2FS_", "MKE2FS_", "RESIZE2FS_", "TEST_IO_", "BLKID_")
"""Prefixes of variables that change what e2fsprogs does: its configuration, its clock, its checks."""
_OURS = frozenset(
    {"LANG", "LC_ALL", "LC_CTYPE", "TERM", "COLUMNS", "NO_COLOR", "COWFS_DEBUG"}
    | {"NOTIFY_SOCKET", "XDG_RUNTIME_DIR", "COVERAGE_PROCESS_CONFIG", "SOURCE_DATE_EPOCH"}
)
"""Variables that cowfs reads, and those that measure the coverage of the tests in forked processes."""


def how_to_add(packages: str) -> str:
    """Return the command that installs Python packages beside cowfs, which may have a Python of its own."""
    return f"pip --python {shlex.quote(sys.executable)} install {packages}"


_ENV_START, _ENV_END = 50, 51
"""Fields of proc_pid_stat(5), from 1 on."""


def find(name: str) -> str | None:
    """Return the path of a program; None if it is not installed.

    For root this searches only the system's directories, since another user may have set PATH. For users it
    searches the absolute directories of PATH, and then the system's, because PATH often lacks sbin.
    """
    if os.geteuid() == 0:
        return shutil.which(name, path=SAFE_PATH)
    places = [place for place in os.environ.get("PATH", "").split(":") if place.startswith("/")]
    return shutil.which(name, path=":".join([*places, SAFE_PATH]))


def dying_with_us(command: list[str]) -> list[str]:
    """Return the command with which *command* is killed if the thread that starts it ends (setpriv(1)).

    Without setpriv, *command* itself.
    """
    setpriv = find("setpriv")
    return command if setpriv is None else [setpriv, "--pdeathsig", "KILL", *command]


def environment() -> dict[str, str]:
    """Return the environment for a program: for users their own, for root none of the caller's variables.

    It lacks variables that change what e2fsprogs does. Messages are in English, because cowfs reads them.
    """
    if os.geteuid() == 0:
        return {"PATH": SAFE_PATH, "LC_ALL": "C"}
    own = {name: value for name, value in os.environ.items() if not name.startswith(_E2FSPROGS)}
    return {**own, "LC_ALL": "C"}


_given: dict[bytes, bytes] = {}


def given_environment() -> dict[bytes, bytes]:
    """Return the environment of the caller, for programs that run on behalf of the user."""
    return _given or dict(os.environb)


def clean_own_environment() -> None:
    """As root, remove the caller's environment variables that change what cowfs or its libraries do.

    Nor does ``/proc/PID/environ`` show them, of this process or of those that it forks.
    """
    if os.geteuid() != 0:
        return
    _given.update(os.environb)
    for name in [name for name in os.environ if name not in _OURS]:
        del os.environ[name]
    os.environ["PATH"] = SAFE_PATH
    with suppress(OSError):  # no /proc
        _overwrite_given()


def _overwrite_given() -> None:
    """Overwrite the memory in which the kernel passed the environment: proc_pid_environ(5) shows that.

    What is kept is set again first, so that the C library has it elsewhere.
    """
    with open("/proc/self/stat", "rb") as said:
        fields = said.read().rpartition(b")")[2].split()
    start, end = (int(fields[number - 3]) for number in (_ENV_START, _ENV_END))
    shown = f"PATH={SAFE_PATH}".encode()
    kept = dict(os.environb)
    ctypes.CDLL(None).clearenv()
    os.environb.update(kept)
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, shown, min(len(shown), max(end - start - 1, 0)))
