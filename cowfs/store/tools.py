"""Run the programs of e2fsprogs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence

from cowfs.errors import StoreError, SystemFailure
from cowfs.store.signals import deferred

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
    command: Sequence[str],
    *,
    data: bytes = b"",
    pass_fds: Sequence[int] = (),
    merge: bool = False,
    show: bool = False,
) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end on *data* and return its output; *merge* adds its errors to it,
    *show* lets the user see it instead. Blocks.

    It gets a session of its own, so that a ^C on the terminal does not stop it in the middle of a write:
    whether it is to be stopped is for the caller to say (see cowfs.store.signals). When an exception
    comes, it does not outlive this call.
    """
    process = None
    try:
        with deferred():  # or it might be running already, and we not know yet
            process = subprocess.Popen(
                [program(command[0]), *command[1:]],
                stdin=subprocess.PIPE,
                stdout=None if show else subprocess.PIPE,
                stderr=subprocess.STDOUT if merge else subprocess.PIPE,
                env={**os.environ, "LC_ALL": "C", "DEBUGFS_PAGER": "cat"},
                pass_fds=pass_fds,
                start_new_session=True,
            )
        output, errors = process.communicate(data)
    except BaseException:
        if process is not None:
            with process:
                process.kill()
        raise
    return subprocess.CompletedProcess(command, process.returncode, output or b"", errors or b"")


def last_line(output: bytes) -> str:
    """Return the last line of a program's output that says something."""
    lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def fsck(path: str, *options: str) -> tuple[int, str]:
    """Run ``e2fsck OPTIONS path``; return its exit code (e2fsck(8)) and all that it said. Blocks.

    e2fsck begins lines with the label of the filesystem. Stores have the label *cowfs*, so that these
    would look like complaints of ours: it is taken off.
    """
    label = _label(path)
    done = run(["e2fsck", *options, path], merge=True)
    code = done.returncode if done.returncode >= 0 else FSCK_OPERATIONAL
    said = done.stdout.decode(errors="replace").splitlines(keepends=True)
    return code, "".join(line.removeprefix(f"{label}: ") for line in said)


def _label(path: str) -> str:
    """Return the label of an ext3 image (s_volume_name), as e2fsck writes it."""
    with open(path, "rb") as image:
        image.seek(1024 + 120)
        label = image.read(16).partition(b"\0")[0].decode(errors="replace")
    return "".join("_" if character.isspace() or character == ":" else character for character in label)


def recover(path: str, progress: Progress) -> None:
    """Repair an image as far as that is safe without questions (``e2fsck -p``). Blocks.

    Raises StoreError where it is not; e2fsck may have replayed the journal by then, nothing more.
    """
    with deferred():
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
