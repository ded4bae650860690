"""Print messages, notes and progress on the terminal."""

from __future__ import annotations

import errno
import io
import math
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from cowfs.errors import SystemFailure, printable

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def say_fields(*fields: bytes | str | int) -> None:
    """Print fields unchanged, each followed by a NUL, for ``-z``."""
    _clear_progress()
    whole = (field if isinstance(field, bytes) else str(field).encode() for field in fields)
    sys.stdout.buffer.write(b"".join(field + b"\0" for field in whole))


def say(text: str) -> None:
    """Print *text* as one line, with control characters escaped. Flushes."""
    _clear_progress()
    print(printable(text), flush=True)


_asked: set[str] = set()
"""Contains ``quiet`` if --quiet is given."""


def be_quiet() -> None:
    """From now on, print no notes (--quiet)."""
    _asked.add("quiet")


def note(text: str) -> None:
    """Print one line about what was done, unless --quiet is given."""
    if not _asked:
        say(text)


def printable_lines(data: bytes) -> bytes:
    """Return untrusted lines for a terminal, without control characters except tabs."""
    lines = data.decode(errors="surrogateescape").split("\n")
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in lines).encode()


def warn(text: str) -> None:
    """Print one line to standard error. If nobody can read it (its disk is full), the exit code remains."""
    text = re.sub(r"\\udc([89a-f][0-9a-f])", r"\\x\1", text)  # repr() of a byte that is not UTF-8
    try:
        _clear_progress()
        print(f"cowfs: {printable(text)}", file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what Python still holds goes there, at exit


_CLEAR_LINE = "\r\x1b[K"
_PAUSE = 0.2
_LONG = 99
"""In seconds. Longer times are shown in minutes."""
_SOON = 1.0
"""After so many seconds, the time left can be estimated."""


def _shows_progress() -> bool:
    return sys.stderr.isatty() and not _asked


_shown: set[str] = set()
"""Contains ``progress`` while a line of progress is shown, which must be cleared before other output."""


def _clear_progress() -> None:
    if _shown:
        _shown.clear()
        print(_CLEAR_LINE, end="", file=sys.stderr, flush=True)


@contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows a text on one line of the terminal. The line is removed at the end.

    It can be called often: it shows a text every 0.2 seconds. It shows none if standard error is not a
    terminal.
    """
    is_seen = _shows_progress()
    last = time.monotonic()

    def show(text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if is_seen and now - last > _PAUSE:
            last = now
            _shown.add("progress")
            print(_CLEAR_LINE + printable(text), end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        _clear_progress()


def rate(size: int, since: float) -> str:
    """Return size and rate, as in ``120 MiB, 60 MiB/s``. *since* is a time.monotonic()."""
    passed = time.monotonic() - since
    return f"{size >> 20} MiB" + (f", {size / passed / (1 << 20):.0f} MiB/s" if passed > _PAUSE else "")


def counted(progress: Callable[[str], None], whole: int = 0) -> Callable[[int], None]:
    """Return a function that adds up bytes, and shows the sum, the rate and the time left for *whole*."""
    total, begun = 0, time.monotonic()

    def tick(size: int) -> None:
        nonlocal total
        total += size
        progress(rate(total, begun) + _time_left(total, whole, begun))

    return tick


def bytes_of(path: str) -> int:
    """Return how many bytes a regular file takes on its disk; 0 if it is not one, or not accessible."""
    with suppress(OSError):
        if stat.S_ISREG((about := os.stat(path)).st_mode):
            return about.st_blocks * 512
    return 0


def shares(progress: Callable[[str], None]) -> Callable[[str, float], None]:
    """Return a function that shows a text, and the time left of a step; it gets the share done, at most 1.

    A smaller share than before begins another step.
    """
    last, begun = math.inf, 0.0

    def show(text: str, share: float) -> None:
        nonlocal last, begun
        if share < last:
            begun = time.monotonic()
        last = share
        progress(text + _time_left(share, 1, begun))

    return show


def _time_left(done: float, whole: float, since: float) -> str:
    passed = time.monotonic() - since
    if not 0 < done < whole or passed < _SOON:
        return ""
    seconds = math.ceil((whole - done) * passed / done)
    return f", {seconds / 60:.0f} min left" if seconds > _LONG else f", {seconds} s left"


class Tally:
    """Counts what is done, and shows the count, the rate, and the time left."""

    def __init__(self, progress: Callable[[str], None], what: str) -> None:
        """*what* is a plural, such as ``paths``. *progress* comes from :func:`progress_line`."""
        self._progress = progress
        self._what = what
        self._whole = self._done = self._size = 0
        self._begun = time.monotonic()

    def expect(self, count: Callable[[], int]) -> None:
        """Start again; *count* returns approximately how many to expect, 0 if unknown.

        It is called only if the progress is shown.
        """
        self._whole = count() if _shows_progress() else 0
        self._done = self._size = 0
        self._begun = time.monotonic()

    def begin(self, what: str, whole: int = 0) -> None:
        """Start again with something else; *whole* is how many to expect, 0 if unknown."""
        self._what = what
        self.expect(lambda: whole)

    def add(self, count: int = 1, size: int = 0) -> None:
        """Count *count* more, and *size* more bytes. The time until the first of them is not in the rate."""
        if not self._done:
            self._begun = time.monotonic()
        self._done += count
        self._size += size
        passed = time.monotonic() - self._begun
        shown = f"{self._done} {self._what}" + (f", {self._done / passed:.0f}/s" if passed > _PAUSE else "")
        if self._size >> 20:
            shown += f", {rate(self._size, self._begun)}"
        self._progress(shown + _time_left(self._done, self._whole, self._begun))


def open_streams() -> None:
    """Open the closed ones of the standard streams, and report failed writes to standard output.

    The next file to be opened, such as a store, would otherwise get the number of a closed stream.
    """
    for fd, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)  # the lowest free number is *fd*; standard output is not writable then
    if sys.stderr is None:
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), errors="backslashreplace")
    raw = _StandardOutput(1, "w", closefd=False)
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(sys.stdout, "encoding", None),
        errors="backslashreplace",  # a terminal without UTF-8
        line_buffering=raw.isatty(),
    )


class _StandardOutput(io.FileIO):
    """Standard output. A failed write raises SystemFailure once; later output is lost."""

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
