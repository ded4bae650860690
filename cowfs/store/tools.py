"""Run the programs of e2fsprogs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence

from cowfs.errors import StoreError, SystemFailure

Progress = Callable[[str], None]
"""Is told, in one line, of what takes a while or is worth knowing."""

FSCK_CORRECTED = 1
FSCK_UNCORRECTED = 4
FSCK_OPERATIONAL = 8


def quiet(message: str) -> None:
    """Be a Progress that tells nobody."""


def program(name: str) -> str:
    """Return the path of a program of e2fsprogs. Raises SystemFailure, saying what installs it."""
    # Users other than root often have no sbin in their PATH.
    places = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    found = shutil.which(name, path=places)
    if found is None:
        raise SystemFailure(f"{name} is not installed", "apt install e2fsprogs")
    return found


def run(
    command: Sequence[str], *, pass_fds: Sequence[int] = (), merge: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end and return its output; *merge* adds its errors to it. Blocks.

    It gets a session of its own, so that a ^C on the terminal never stops it in the middle of a write.
    """
    return subprocess.run(
        [program(command[0]), *command[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if merge else subprocess.PIPE,
        env={**os.environ, "LC_ALL": "C"},
        encoding="utf-8",
        errors="replace",
        pass_fds=pass_fds,
        start_new_session=True,
    )


def last_line(text: str) -> str:
    """Return the last line of a program's output that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def fsck(path: str, *options: str) -> tuple[int, str]:
    """Run ``e2fsck OPTIONS path``; return its exit code (e2fsck(8)) and all that it said. Blocks."""
    done = run(["e2fsck", *options, path], merge=True)
    return (done.returncode if done.returncode >= 0 else FSCK_OPERATIONAL), done.stdout


def recover(path: str, progress: Progress) -> None:
    """Repair an image as far as that is safe without questions (``e2fsck -p``). Blocks.

    Raises StoreError where it is not; e2fsck may have replayed the journal by then, nothing more.
    """
    code, said = fsck(path, "-p")
    if code & ~(FSCK_CORRECTED | 2):
        raise StoreError(
            f"{path}: the store is damaged and cannot be repaired automatically: {reason(said)}",
            f"make a copy, then try: e2fsck -f {path}",
        )
    progress(f"{path}: was not cleanly unmounted, recovered")


def reason(said: str) -> str:
    """Pick the line of e2fsck's that says what is wrong, not the shout below it."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("(i.e.", "e2fsck ")) and "RUN fsck" not in line]
    return lines[-1] if lines else "e2fsck gave no reason"
