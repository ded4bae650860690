"""The programs that we start: where they are found, and the environment that they get."""

from __future__ import annotations

import os
import shutil

SAFE_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_E2FSPROGS = ("E2FSCK_", "E2FSPROGS_", "E2IMAGE_", "EXT2FS_", "MKE2FS_", "RESIZE2FS_", "TEST_IO_", "BLKID_")
"""What variables begin with that change what e2fsprogs does: its configuration, its clock, its checks."""
_OURS = frozenset(
    {"LANG", "LC_ALL", "LC_CTYPE", "TERM", "COLUMNS", "NO_COLOR", "COWFS_DEBUG"}
    | {"NOTIFY_SOCKET", "XDG_RUNTIME_DIR", "COVERAGE_PROCESS_CONFIG", "SOURCE_DATE_EPOCH"}
)
"""What means something to us, or to what measures the tests of us in the processes that we fork."""


def find(name: str) -> str | None:
    """Return the path of a program; None if there is none.

    For root it searches only the system's directories, since another user may have set PATH. For users it
    also searches the PATH, as far as that does not depend on the current directory, and sbin, which the PATH
    often lacks.
    """
    if os.geteuid() == 0:
        return shutil.which(name, path=SAFE_PATH)
    places = [place for place in os.environ.get("PATH", "").split(":") if place.startswith("/")]
    return shutil.which(name, path=":".join([*places, SAFE_PATH]))


def environment() -> dict[str, str]:
    """Return the environment for a program: for root nothing of the caller's, for others theirs.

    What would change what e2fsprogs does is left out, and messages are in English: we read them.
    """
    if os.geteuid() == 0:
        return {"PATH": SAFE_PATH, "LC_ALL": "C"}
    own = {name: value for name, value in os.environ.items() if not name.startswith(_E2FSPROGS)}
    return {**own, "LC_ALL": "C"}


_given: dict[bytes, bytes] = {}


def given_environment() -> dict[bytes, bytes]:
    """Return the environment that our caller gave us: for the programs that are not ours."""
    return _given or dict(os.environb)


def clean_own_environment() -> None:
    """As root, remove environment variables of the caller that change what we or our libraries do."""
    if os.geteuid() != 0:
        return
    _given.update(os.environb)
    for name in [name for name in os.environ if name not in _OURS]:
        del os.environ[name]
    os.environ["PATH"] = SAFE_PATH
