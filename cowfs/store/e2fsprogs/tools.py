"""Run the programs of e2fsprogs."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from cowfs.errors import StoreError, SystemFailure
from cowfs.formats.ext3 import features
from cowfs.linux import helper_process, mounts, programs
from cowfs.store.e2fsprogs.signals import deferred
from cowfs.store.format.superblock import flag_recovery, needs_recovery

Progress = Callable[[str], None]
"""Is told, in one line, of what takes a while or is worth knowing."""

FSCK_CORRECTED = 1
FSCK_UNCORRECTED = 4
FSCK_OPERATIONAL = 8


def quiet(message: str) -> None:
    """Be a Progress that tells nobody."""


_hidden = ""
"""The mountpoint of a mount that programs must not see: it is ours, and we wait for them."""
_found: dict[str, str] = {}
"""The programs by their paths, once they cannot be looked for any more."""


def hide(mountpoint: str) -> None:
    """Let programs see what is below the mount that this process is about to make at *mountpoint*.

    They are looked up now, and never again. Where the mount cannot be hidden from them (only root can do
    that), programs that are below the mountpoint themselves are refused.
    """
    global _hidden  # noqa: PLW0603 - a process mounts once
    for name in ("e2fsck", "resize2fs", "mke2fs", "e2image"):
        with suppress(SystemFailure):
            path = program(name)
            inside = os.path.realpath(path).startswith(mountpoint.rstrip("/") + "/")
            if os.geteuid() == 0 or not inside:
                _found[name] = path
    _hidden = mountpoint


def program(name: str) -> str:
    """Return the path of a program of e2fsprogs. Raises SystemFailure, saying what installs it."""
    if _hidden:
        if name in _found:
            return _found[name]
        raise SystemFailure(
            f"{name} was not installed when this was mounted, or is inside the mount", "unmount it first"
        )
    found = programs.find(name)
    if found is None:
        raise SystemFailure(f"{name} is not installed", "apt install e2fsprogs")
    return found


def place(fd: int) -> str:
    """Return the name under which a program that gets *fd* (*pass_fds* of run) finds the file behind it.

    A path may be taken for something else: for an option, for ``LABEL=``, and libext2fs ends it at a ``?``.
    """
    return f"/proc/self/fd/{fd}"


def run(
    command: Sequence[str],
    *,
    data: bytes = b"",
    pass_fds: Sequence[int] = (),
    merge: bool = False,
    show: Callable[[bytes], object] | None = None,
    work: int = 0,
) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end on *data* and return its output; *merge* adds its errors to it, and
    *show* gets it piece by piece as it comes. After *work* seconds of processor time it is killed. Blocks.

    It gets a session of its own, so that a ^C on the terminal does not stop it in the middle of a write:
    whether it is to be stopped is for the caller to say (see cowfs.store.e2fsprogs.signals).
    When an exception comes, it does not outlive this call.
    """
    elsewhere = helper_process.current() if _hidden else None
    if elsewhere is not None:
        return _run_elsewhere(elsewhere, command, pass_fds)
    process = None
    try:
        with deferred():  # or it might be running already, and we not know yet
            process = subprocess.Popen(
                [program(command[0]), *command[1:]],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT if merge else subprocess.PIPE,
                env=programs.environment(),
                pass_fds=pass_fds,
                start_new_session=True,
                preexec_fn=partial(_begin, work),  # noqa: PLW1509 - it takes no lock
            )
        while show and process.stdout and (piece := os.read(process.stdout.fileno(), 1 << 16)):
            show(piece)
        output, errors = process.communicate(data)
    except BaseException:
        if process is not None:
            with process:
                process.kill()
        raise
    return subprocess.CompletedProcess(command, process.returncode, output or b"", errors or b"")


_WORDS = {"e2fsck": {"-f", "-p", "-n", "-E", "discard"}, "resize2fs": {"-f", "-p"}}
"""What a daemon that is shut in may have run on an image, and how."""
_IMAGE = "image"


def _run_elsewhere(
    elsewhere: helper_process.Outside, command: Sequence[str], fds: Sequence[int]
) -> subprocess.CompletedProcess[bytes]:
    """Have a program run, on one image, by the process that does our errands; errors are in its output."""
    (fd,) = fds
    words = [_IMAGE if word == place(fd) else word for word in command]
    done = elsewhere.ask("run", [fd], command=words)
    output = done["output"].encode("latin-1").replace(_IN_PLACE_OF_IT, place(fd).encode())
    return subprocess.CompletedProcess(command, done["code"], output, output)


_IN_PLACE_OF_IT = b"\0image\0"


def run_errand(request: dict[str, Any], fds: Sequence[int]) -> dict[str, Any]:
    """Run what :func:`run` is asked for in a daemon that is shut in. PermissionError for anything else."""
    (fd,) = fds
    name, *words = request["command"]
    if words.pop() != _IMAGE or not set(words) <= _WORDS.get(name, set()) or name not in _WORDS:
        raise PermissionError(errno.EPERM, "the daemon may not run it")
    done = run([name, *words, place(fd)], pass_fds=[fd], merge=True)
    output = done.stdout.replace(place(fd).encode(), _IN_PLACE_OF_IT)
    return {"code": done.returncode, "output": output.decode("latin-1")}


def _begin(work: int) -> None:
    """In the process that is to be a program: leave our mount behind, and hide what others have mounted.

    libext2fs looks at the source of each mount, to see whether it is the image, and waits for ever for that
    of one that hangs. Whether the image is mounted is known from elsewhere (the store's lock).
    Where it may not be hidden it is there.
    """
    if work:
        resource.setrlimit(resource.RLIMIT_CPU, (work, work))
    if _hidden:
        with suppress(OSError):
            mounts.leave(_hidden)
    with suppress(OSError):
        mounts.hide_table()


def last_line(output: bytes) -> str:
    """Return the last line of a program's output that is not empty."""
    lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def fsck(fd: int, path: str, *options: str) -> tuple[int, str]:
    """Run ``e2fsck OPTIONS`` on the image behind *fd*; return its exit code (e2fsck(8)) and its output, in
    which the image is called *path*.

    Blocks. e2fsck begins lines with the label of the filesystem. The label of stores is *cowfs*, so the lines
    would look like our messages: the label is removed.
    """
    label = _label(fd)
    if "-n" not in options and not replay(fd):
        flag_recovery(fd)
    done = run(["e2fsck", *options, place(fd)], pass_fds=[fd], merge=True)
    code = done.returncode if done.returncode >= 0 else FSCK_OPERATIONAL
    said = done.stdout.decode(errors="replace").splitlines(keepends=True)
    return code, "".join(line.removeprefix(f"{label}: ").replace(place(fd), path) for line in said)


def fsck_recovered(fd: int, path: str, *, sound: bool) -> tuple[int, str]:
    """Return what ``fsck -f -n`` would report for an image if its journal had been replayed.

    Blocks. Nothing is written to the image: its metadata, with the journal, is copied to memory, and the copy
    is recovered. *sound* says that its superblock records no errors; e2fsck then does nothing more to the
    copy.
    """
    copy = os.memfd_create("metadata", os.MFD_CLOEXEC)
    try:
        done = run(["e2image", "-r", place(fd), place(copy)], pass_fds=[fd, copy], merge=True)
        if done.returncode:
            return FSCK_OPERATIONAL, last_line(done.stdout).replace(place(fd), path)
        recovery = fsck(copy, path, "-p", "-E", "journal_only")
        if recovery[0] & ~FSCK_CORRECTED:
            return recovery
        if sound:
            fsck(copy, path, "-p")  # lets go of what had no name any more, and looks at nothing
        return fsck(copy, path, "-f", "-n")
    finally:
        os.close(copy)


def _label(fd: int) -> str:
    """Return the label of an ext3 image (s_volume_name), as e2fsck writes it."""
    label = os.pread(fd, 16, 1024 + 120).partition(b"\0")[0].decode(errors="replace")
    return "".join("_" if character.isspace() or character == ":" else character for character in label)


def _is_left_wrong(fd: int) -> bool:
    """Whether resize2fs (of 1.47) may leave blocks marked as free that are not: copies of the descriptors."""
    found = features.read(os.pread(fd, features.SUPERBLOCK_SIZE, features.SUPERBLOCK))
    return found is not None and bool(found.compatible & features.SPARSE_SUPER2)


_DRIVES_A_TERMINAL = bytes({*range(32), 127} - {*b"\b\t\n\r"})


def _harmless(output: bytes) -> bytes:
    """Leave out what would drive a terminal; progress bars go back with backspaces."""
    return output.translate(None, _DRIVES_A_TERMINAL)


def resize(fd: int, path: str, *options: str, size: str = "", show: bool = False, hint: str = "") -> None:
    """Run ``resize2fs OPTIONS`` on the image behind *fd*, which is to fill its file, or have *size*;
    *show* lets the user see what it says. Blocks. Raises StoreError with that *hint*; *path* is for messages.
    """

    def write(piece: bytes) -> None:
        sys.stdout.buffer.write(_harmless(piece.replace(os.fsencode(place(fd)), os.fsencode(path))))
        sys.stdout.buffer.flush()

    with deferred():
        command = ["resize2fs", *options, place(fd), *([size] if size else [])]
        done = run(command, pass_fds=[fd], merge=not show, show=write if show else None)
    if done.returncode:
        why = last_line(done.stderr if show else done.stdout).replace(place(fd), path)
        raise StoreError(f"{path}: resize2fs failed: {why}", hint)
    if _is_left_wrong(fd):
        recover(fd, path, quiet, "-f")


def replay(fd: int) -> bool:
    """Write home what a crash left in the journal of an image and in the redo log behind it; return whether
    that is done. Blocks.

    It is for the engine, which e2fsck's own recovery would take the redo log from.
    """
    if not needs_recovery(fd):
        return True
    try:
        from cowfs.formats.ext3.image import Image

        Image(fd, "", commit_seconds=0).close()
    except (ImportError, OSError):
        return False
    return True


def recover(fd: int, path: str, progress: Progress, *options: str, sound: bool = False) -> None:
    """Recover an image, and repair it as far as that is safe without questions (``e2fsck -p``). Blocks.

    *sound* says that its superblock records no errors: then only the journal is replayed. Raises StoreError
    if a repair is not safe; by then the journal may have been replayed, but nothing else was changed.
    """
    with deferred():
        code, said = (0, "") if sound and replay(fd) else fsck(fd, path, "-p", *options)
    if code & ~(FSCK_CORRECTED | 2):
        raise StoreError(
            f"{path}: the store is damaged and needs manual repair: {reason(said)}",
            f"copy the file, then run on the copy: e2fsck -f {path}",
        )
    progress(f"{path}: was not cleanly unmounted; recovered")


def reason(said: str) -> str:
    """Pick the line of e2fsck's output that says what is wrong, not the general warning below it."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("(i.e.", "e2fsck ")) and "RUN fsck" not in line]
    return lines[-1] if lines else "e2fsck gave no reason"
