"""Mount and unmount by the cowfs command, in another process: for programs that do other work meanwhile."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO

from cowfs.errors import (
    EXIT_INTERNAL,
    EXIT_SYSTEM,
    EXIT_USAGE,
    CowfsError,
    InternalError,
    MountFailure,
    SystemFailure,
    UsageError,
)
from cowfs.linux.files import absolute
from cowfs.url.names import authority, place

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Value = Path | int | float
Option = Value | bool | Sequence[Value] | None
_FAILURES: dict[int, type[CowfsError]] = {
    EXIT_USAGE: UsageError,
    EXIT_SYSTEM: SystemFailure,
    EXIT_INTERNAL: InternalError,
}
LONGEST_REQUEST = 1 << 20
GOODBYE = b"{}"
"""The last message to a warm process. Without it whoever has sent the others was killed."""


def mount_arguments(
    lowers: Sequence[Path], mountpoint: str, store: Path | None, options: Iterable[tuple[str, Option]]
) -> list[str]:
    """Return the arguments of ``cowfs mount`` for these layers, topmost first. UsageError as `text_of`."""
    arguments = ["mount", join_lowers([place(text_of("lower", lower)) for lower in lowers]), mountpoint]
    if store is not None:
        where = text_of("store", store)
        arguments.append(f"--store={where if where == 'memory' else absolute(where)}")
    for name, value in options:
        if value is True:
            arguments += ["-o", name]
        elif value is not None and value is not False:
            several = isinstance(value, Iterable) and not isinstance(value, str | bytes)
            values: Iterable[object] = value if several else [value]  # type: ignore[assignment]
            for each in values:
                text = str(each) if isinstance(each, int | float) else text_of(f"option {name}", each)
                arguments += ["-o", f"{name}={_escaped(text, ',')}"]
    return arguments


def text_of(what: str, given: object) -> str:
    """Return a path or value as text. UsageError, which names *what* it is for, if it cannot be one."""
    if not isinstance(given, str | bytes | os.PathLike):
        raise UsageError(f"{what}: {given!r} is neither a path nor text", "give a str or a pathlib.Path")
    text = os.fsdecode(given)
    if not text or "\0" in text:
        wrong = "has a null byte" if text else "is empty"
        raise UsageError(f"{what}: {text!r} {wrong}", "give a name that a file can have")
    return text


def join_lowers(lowers: Sequence[str], data_only: int = 0) -> str:
    """Write LOWER[:LOWER...][::DATA...] as ``cowfs mount`` takes it, of absolute paths and URLs (another path
    and one that begins with // could read as a URL); the last *data_only* lowers are data-only.
    """
    names = [_of_several(lower) for lower in lowers]
    merged = len(names) - data_only
    return "::".join((":".join(names[:merged]), *names[merged:]))


def _of_several(lower: str) -> str:
    """Return a lower's name as it is written in a list. A colon in the host of a URL does not end a name."""
    start = authority(lower)
    if start == lower:  # nothing could end it
        start = ""
    return start + _escaped(lower[len(start) :], ":")


def _escaped(text: str, separator: str) -> str:
    return text.replace("\\", "\\\\").replace(separator, f"\\{separator}")


def run_command(arguments: Sequence[str], temporary: str | None = None) -> None:
    """Run ``cowfs ARGUMENTS`` to its end. Blocks; raises its message as the CowfsError of its exit code.

    If this is interrupted, it asks the command to end, and returns when it has. A warm process removes the
    directory *temporary* with the mount on it, if the program is killed.
    """
    with tempfile.TemporaryFile() as said:  # a daemon may hold it for longer than the command runs
        warm = _warm[-1] if _warm else None
        code = _start(arguments, said) if warm is None else warm.run(arguments, said, temporary)
        if code == 0:
            return
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines()
    if code < 0:
        raise MountFailure(f"cowfs {arguments[0]} was killed", "memory may have run out: see dmesg")
    why = lines[-1].removeprefix("cowfs: ") if lines else f"cowfs {arguments[0]} failed ({code})"
    raise _FAILURES.get(code, MountFailure)(why)


def _start(arguments: Sequence[str], said: IO[bytes]) -> int:
    """Run the command in a new Python; return the exit code, a negative one if it was killed."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "cowfs", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=said,
        stderr=said,
    )
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


# --- a process that has loaded everything

_warm: list[_Warm] = []


@contextmanager
def warm() -> Iterator[None]:
    """Within this block keep a process with all modules loaded: a mount then takes a tenth of the time.

    The process takes some 30 MiB of memory and ends with the block; mounts stay. If the program is killed
    (SIGKILL), the process unmounts what it has mounted, and ends.
    """
    ready = _Warm()
    _warm.append(ready)
    try:
        yield
    finally:
        _warm.remove(ready)
        ready.close()


class _Warm:
    """See :mod:`cowfs.cli.zygote`."""

    def __init__(self) -> None:
        self._owner = _whose()
        self._socket, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Root's Python runs isolated: it imports nothing from the caller's directories.
        isolated = "-I" if os.geteuid() == 0 else "-P"
        with there:
            self._process = subprocess.Popen(
                [sys.executable, isolated, "-m", "cowfs.cli.zygote", str(there.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[there.fileno()],
                start_new_session=True,  # it survives the kill of the caller's process group
            )

    def run(self, arguments: Sequence[str], said: IO[bytes], temporary: str | None) -> int:
        """Run a command; return the exit code, a negative one if it was killed."""
        if _whose() != self._owner:  # this is a fork, or the user has changed
            return _start(arguments, said)
        try:
            directory = os.getcwd()
        except OSError:  # it was removed, and the command itself reports that
            return _start(arguments, said)
        asked = {
            "arguments": list(arguments),
            "environment": dict(os.environ),
            "directory": directory,
            "temporary": temporary,
        }
        answer, there = socket.socketpair()
        with answer, answer.makefile("r") as answers:
            with there:
                try:
                    fds = [said.fileno(), there.fileno()]
                    socket.send_fds(self._socket, [json.dumps(asked).encode()], fds)
                except OSError:  # the process has ended, or the message is too long
                    return _start(arguments, said)
            first = ""
            try:
                first = answers.readline()
                code = answers.readline()
            except BaseException:
                with suppress(OSError, ValueError):
                    os.kill(int(first or answers.readline()), signal.SIGTERM)
                answers.read()
                raise
        return int(code) if code.strip() else -signal.SIGKILL

    def close(self) -> None:
        """End the process. Running commands continue."""
        is_ours = os.getpid() == self._owner[0]
        with self._socket, suppress(OSError):  # it is gone
            if is_ours:
                self._socket.send(GOODBYE)
        if is_ours:
            self._process.wait()


def _whose() -> tuple[int, int, int, str]:
    """Return the process ID, its rights and its mount namespace: commands run with these."""
    return os.getpid(), os.geteuid(), os.getegid(), os.readlink("/proc/self/ns/mnt")
