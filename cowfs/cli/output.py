"""What the command line says to people."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TYPE_CHECKING

from cowfs.errors import SystemFailure, printable

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def say(text: str) -> None:
    """Print one line, whatever is in *text*, at once."""
    print(printable(text), flush=True)


_asked: set[str] = set()
"""Holds ``quiet`` if that is asked for."""


def be_quiet() -> None:
    """Print no notes from now on (--quiet)."""
    _asked.add("quiet")


def is_quiet() -> bool:
    """Whether nobody wants notes."""
    return bool(_asked)


def note(text: str) -> None:
    """Print one line about what was done, if anybody wants to know: --quiet says no."""
    if not _asked:
        say(text)


def printable_lines(data: bytes) -> bytes:
    """Return lines of others' making for a terminal: with nothing in them that drives it, but tabs."""
    lines = data.decode(errors="surrogateescape").split("\n")
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in lines).encode()


def warn(text: str) -> None:
    """Print one line to standard error."""
    print(f"cowfs: {printable(text)}", file=sys.stderr, flush=True)


def open_streams() -> None:
    """Open the standard streams that are closed, and let a failure to write to standard output say so.

    A descriptor below 3 that is closed would be given to the next file that is opened, such as a store.
    """
    for fd, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)  # the lowest free number: *fd*; standard output cannot be written then
    if sys.stderr is None:
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), errors="backslashreplace")
    raw = _StandardOutput(1, "w", closefd=False)
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(sys.stdout, "encoding", None),
        errors="backslashreplace",  # a terminal that is not UTF-8
        line_buffering=raw.isatty(),
    )


class _StandardOutput(io.FileIO):
    """Standard output. A failed write raises SystemFailure, once: what is written later is lost."""

    def write(self, data: ReadableBuffer, /) -> int:
        """See :class:`io.RawIOBase`."""
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            why = "it is closed" if error.errno == errno.EBADF else error.strerror
            raise SystemFailure(f"cannot write to standard output: {why}") from None
