"""Run the programs of e2fsprogs."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from cowfs.errors import StoreError, SystemFailure
from cowfs.formats.ext3 import features
from cowfs.linux import helper_process, mounts, programs
from cowfs.store.e2fsprogs.signals import deferred
from cowfs.store.format.superblock import flag_recovery, needs_recovery

Progress = Callable[[str], None]
"""Called with a line of text about something that takes a while or is worth knowing."""
Share = Callable[[str, float], object]
"""Called often, with a text about how far a program is, and the share of its work that is done, at most 1."""

FSCK_CORRECTED = 1
FSCK_UNCORRECTED = 4
FSCK_OPERATIONAL = 8


def quiet(message: str) -> None:
    """Ignore the message: a Progress for callers that report nothing."""


_hidden = ""
"""This process's own mountpoint. Programs must not access the mount, because this process waits for them."""
_found: dict[str, str] = {}
"""Program name to path, looked up before the mount could hide them."""


def hide(mountpoint: str) -> None:
    """Hide the mount that this process is about to make at *mountpoint* from the programs that it runs.

    The programs are looked up now, and never again. Only root can hide the mount; for other users, programs
    below the mountpoint are refused.
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
    """Return the path of a program of e2fsprogs. SystemFailure, with the package, if it is missing."""
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
    """Return a path at which a program that inherits *fd* (*pass_fds* of run) finds the file behind it.

    The real path could be mistaken for an option or for ``LABEL=``, and libext2fs cuts it at a ``?``.
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
    """Run a program with *data* as its input and return its output. Blocks until it ends.

    *merge* adds its errors to the output; *show* gets the output in pieces as it comes. After *work* seconds
    of processor time the program is killed. It gets its own session, so that ^C on the terminal does not
    interrupt a write; the caller decides about signals (cowfs.store.e2fsprogs.signals). If an exception is
    raised, the program is killed first.
    """
    elsewhere = helper_process.current() if _hidden else None
    if elsewhere is not None:
        return _run_elsewhere(elsewhere, command, pass_fds)
    process = None
    try:
        with deferred():  # a signal must not arrive between the start and the assignment
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
"""The programs, and their options, that a confined daemon may have run on an image."""
_IMAGE = "image"


def _run_elsewhere(
    elsewhere: helper_process.Outside, command: Sequence[str], fds: Sequence[int]
) -> subprocess.CompletedProcess[bytes]:
    """Let the helper process run a program on one image. Errors are merged into its output."""
    (fd,) = fds
    words = [_IMAGE if word == place(fd) else word for word in command]
    done = elsewhere.ask("run", [fd], command=words)
    output = done["output"].encode("latin-1").replace(_IN_PLACE_OF_IT, place(fd).encode())
    return subprocess.CompletedProcess(command, done["code"], output, output)


_IN_PLACE_OF_IT = b"\0image\0"


def run_errand(request: dict[str, Any], fds: Sequence[int]) -> dict[str, Any]:
    """Run a program for a confined daemon, in the helper process. Blocks.

    PermissionError for any program or option that is not allowed.
    """
    (fd,) = fds
    name, *words = request["command"]
    if words.pop() != _IMAGE or not set(words) <= _WORDS.get(name, set()) or name not in _WORDS:
        raise PermissionError(errno.EPERM, "the daemon may not run it")
    done = run([name, *words, place(fd)], pass_fds=[fd], merge=True)
    output = done.stdout.replace(place(fd).encode(), _IN_PLACE_OF_IT)
    return {"code": done.returncode, "output": output.decode("latin-1")}


def _begin(work: int) -> None:
    """Detach this process's own mount and hide all others, in the child before it runs a program.

    libext2fs examines the source of each mount, to see whether it is the image, and hangs if one of them
    hangs. The store's lock already shows whether the image is mounted. Without permission, nothing is hidden.
    """
    if work:
        resource.setrlimit(resource.RLIMIT_CPU, (work, work))
    if _hidden:
        with suppress(OSError):
            mounts.leave(_hidden)
    with suppress(OSError):
        mounts.hide_table()


def last_line(output: bytes) -> str:
    """Return the last nonempty line of a program's output."""
    lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


_PASSES = (0.0, 0.7, 0.9, 0.92, 0.95, 1.0)
"""The share of a check that is done before each pass of e2fsck, and after all, as in its own bar."""


@contextmanager
def _passes(show: Share) -> Iterator[int]:
    """Yield a descriptor to which e2fsck writes how far it is; *show* gets that, in a thread."""
    reading, writing = os.pipe()

    def read() -> None:
        with open(reading, errors="replace") as lines:
            for line in lines:
                number, done, whole, *_ = (*line.split(), "", "", "")  # and the device
                if number in set("12345") and done.isdecimal() and whole.isdecimal() and int(whole):
                    share = min(int(done) / int(whole), 1)
                    before, after = _PASSES[int(number) - 1 : int(number) + 1]
                    text = f"e2fsck: pass {number} of 5, {int(100 * share)} %"
                    show(text, before + (after - before) * share)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield writing
    finally:
        os.close(writing)
        thread.join()


def fsck(fd: int, path: str, *options: str, show: Share | None = None) -> tuple[int, str]:
    """Run ``e2fsck OPTIONS`` on the image behind *fd*; return its exit code (e2fsck(8)) and its output, in
    which the image is called *path*.

    Blocks. *show* is called by another thread. e2fsck begins lines with the label of the
    filesystem. The label of stores is *cowfs*, so the lines would look like our messages: it is removed.
    """
    label = _label(fd)
    if "-n" not in options and not replay(fd):
        flag_recovery(fd)
    if show is None:
        done = run(["e2fsck", *options, place(fd)], pass_fds=[fd], merge=True)
    else:
        with _passes(show) as out:
            command = ["e2fsck", *options, "-C", str(out), place(fd)]
            done = run(command, pass_fds=[fd, out], merge=True)
    code = done.returncode if done.returncode >= 0 else FSCK_OPERATIONAL
    said = done.stdout.decode(errors="replace").splitlines(keepends=True)
    return code, "".join(line.removeprefix(f"{label}: ").replace(place(fd), path) for line in said)


def fsck_recovered(fd: int, path: str, *, sound: bool, show: Share | None = None) -> tuple[int, str]:
    """Return the result of ``e2fsck -f -n`` for an image as it would be after a replay of its journal.

    Blocks. Nothing is written to the image: its metadata and the journal are copied to memory, and the copy
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
            fsck(copy, path, "-p")  # frees the inodes without names, and checks nothing
        return fsck(copy, path, "-f", "-n", show=show)
    finally:
        os.close(copy)


def _label(fd: int) -> str:
    """Return the label of an ext3 image (s_volume_name), as e2fsck writes it."""
    label = os.pread(fd, 16, 1024 + 120).partition(b"\0")[0].decode(errors="replace")
    return "".join("_" if character.isspace() or character == ":" else character for character in label)


def _is_left_wrong(fd: int) -> bool:
    """Whether resize2fs 1.47 may leave used blocks marked as free: the copies of the group descriptors."""
    found = features.read(os.pread(fd, features.SUPERBLOCK_SIZE, features.SUPERBLOCK))
    return found is not None and bool(found.compatible & features.SPARSE_SUPER2)


_DRIVES_A_TERMINAL = bytes({*range(32), 127} - {*b"\b\t\n\r"})


def _harmless(output: bytes) -> bytes:
    """Remove terminal control characters. Progress bars contain backspaces."""
    return output.translate(None, _DRIVES_A_TERMINAL)


_BAR = 40
"""The length of resize2fs's bars."""


def shrink(fd: int, path: str, size: str, share: Share | None = None) -> None:
    """Run resize2fs on the image behind *fd*, which has just been checked, so that it has *size*. Blocks.

    StoreError if it fails; *path* is for messages.
    """
    said = b""

    def show(piece: bytes) -> None:
        nonlocal said
        said += piece
        _, begun, bar = said.rpartition(b"Begin pass ")
        if share is not None and begun and b"\b" in bar:  # the bar is drawn, and then drawn over
            done = min(bar.rpartition(b"\b")[2].count(b"X") / _BAR, 1)
            share(f"resize2fs: pass {bar[:1].decode()}, {int(100 * done)} %", done)

    if share is not None:
        share("resize2fs", 0)
    with deferred():
        done = run(["resize2fs", "-f", "-p", place(fd), size], pass_fds=[fd], merge=True, show=show)
    if done.returncode:
        why = last_line(said.rpartition(b"\b")[2].lstrip(b"X")).replace(place(fd), path)
        raise StoreError(f"{path}: resize2fs failed: {why}")
    if _is_left_wrong(fd):
        recover(fd, path, quiet, "-f")


def resize(fd: int, path: str, *options: str, show: bool = False, hint: str = "") -> None:
    """Run ``resize2fs OPTIONS`` on the image behind *fd*, so that it fills its file. Blocks.

    *show* shows its output to the user. StoreError with *hint* if it fails; *path* is for messages.
    """

    def write(piece: bytes) -> None:
        sys.stdout.buffer.write(_harmless(piece.replace(os.fsencode(place(fd)), os.fsencode(path))))
        sys.stdout.buffer.flush()

    with deferred():
        command = ["resize2fs", *options, place(fd)]
        done = run(command, pass_fds=[fd], merge=not show, show=write if show else None)
    if done.returncode:
        why = last_line(done.stderr if show else done.stdout).replace(place(fd), path)
        raise StoreError(f"{path}: resize2fs failed: {why}", hint)
    if _is_left_wrong(fd):
        recover(fd, path, quiet, "-f")


def replay(fd: int) -> bool:
    """Replay the journal of an image, and the redo log behind it, after a crash; return whether that worked.

    Blocks. The engine does it, because e2fsck's own recovery would lose the redo log.
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
    """Recover an image, and make the repairs that are safe without questions (``e2fsck -p``). Blocks.

    If *sound*, the superblock records no errors, and only the journal is replayed. StoreError if a repair is
    not safe; by then the journal may have been replayed, but nothing else has changed.
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
    """Return the line of e2fsck's output that says what is wrong, not the general warning below it."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("(i.e.", "e2fsck ")) and "RUN fsck" not in line]
    return lines[-1] if lines else "e2fsck gave no reason"
