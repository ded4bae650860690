"""What the terminal shows of a command that takes long: how much is done, how fast, and the time left."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from cowfs.cli.output import is_quiet
from cowfs.errors import CowfsError

Show = Callable[[str], None]
_CLEAR_LINE = "\r\x1b[K"
_PAUSE = 0.2
_SURE = 1.0
"""Seconds that a step has to take before it tells how long it will."""
_LONG = 99
"""Seconds, or minutes; more are minutes, or hours."""


def is_watched() -> bool:
    """Whether somebody is at the terminal, and wants to see it."""
    return sys.stderr.isatty() and not is_quiet()


@contextmanager
def progress_line() -> Iterator[Show]:
    """Give a function that shows a text on one line of the terminal; the line is removed in the end.

    It may be called often: it shows a text every 0.2 seconds, and none if standard error is no terminal.
    An empty text removes the line, for something else to be printed.
    """
    is_seen = is_watched()
    last = time.monotonic()
    is_shown = False

    def show(text: str) -> None:
        nonlocal last, is_shown
        now = time.monotonic()
        if is_seen and now - last > _PAUSE and text:
            last, is_shown = now, True
            print(_CLEAR_LINE + text, end="", file=sys.stderr, flush=True)
        elif not text and is_shown:
            is_shown = False
            print(_CLEAR_LINE, end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        show("")


def bytes_done(show: Show, whole: int = 0) -> Callable[[int], None]:
    """Return what adds up bytes and shows them, how fast they come, and how long the *whole* takes yet."""
    total, begun = 0, time.monotonic()

    def tick(size: int) -> None:
        nonlocal total
        total += size
        show(_rate(total, begun) + _left(total, whole, begun))

    return tick


def paths_done(show: Show, whole: int = 0) -> Callable[[bytes, int], None]:
    """Do the same for what is told a path, and then how many bytes of it; *whole* are bytes."""
    paths = size = 0
    begun = time.monotonic()

    def tick(_: bytes, length: int) -> None:
        nonlocal paths, size
        paths += not length
        size += length
        show(f"{paths} paths, {_rate(size, begun)}{_left(size, whole, begun)}")

    return tick


def names_done(show: Show, what: str, whole: int = 0) -> Callable[[object], None]:
    """Return what counts how often it is called: so many *what* are done, of the *whole* if that is known."""
    count, begun = 0, time.monotonic()

    def tick(_: object = None) -> None:
        nonlocal count
        count += 1
        passed = time.monotonic() - begun
        pace = f", {count / passed:.0f}/s" if passed > _PAUSE else ""
        show(f"{count} {what}{pace}{_left(count, whole, begun)}")

    return tick


def share_done(show: Show) -> Callable[[str, float], None]:
    """Return what is told a step, and how much of it is done, of 1: it shows that, and the time left."""
    step, begun = "", 0.0

    def tick(what: str, share: float) -> None:
        nonlocal step, begun
        if what != step:
            step, begun = what, time.monotonic()
        show(f"{what}: {share:.0%}{_left(share, 1, begun)}")

    return tick


def size_of(path: str) -> int:
    """Return how many bytes there are to copy of an image; 0 if that is not known."""
    try:
        info = os.stat(path)
    except OSError:
        return 0
    return min(info.st_size, info.st_blocks * 512) if os.path.isfile(path) else 0


def changes_of(what: str) -> int:
    """Return how many bytes of the store the changes of a mount or an image take; 0 if not known at once."""
    from cowfs.client import find_mount
    from cowfs.store.format.superblock import read_superblock
    from cowfs.store.served.image import open_file

    with suppress(CowfsError, OSError):
        if not is_watched():
            return 0
        if find_mount(what) is not None:
            room = os.statvfs(what)
            return (room.f_blocks - room.f_bfree) * room.f_frsize
        if os.path.isfile(what):
            with open(open_file(what, read_only=True)) as image:
                superblock = read_superblock(image.fileno(), what, smallest=0)
                return (superblock.blocks - superblock.free_blocks) * superblock.block_size
    return 0


def _rate(size: int, since: float) -> str:
    """Say how many bytes are done, and how fast: ``120 MiB, 60 MiB/s``. *since* is a time.monotonic()."""
    passed = time.monotonic() - since
    return f"{size >> 20} MiB" + (f", {size / passed / (1 << 20):.0f} MiB/s" if passed > _PAUSE else "")


def _left(done: float, whole: float, since: float) -> str:
    """Say how long the rest takes: ``, 12 s left``; nothing as long as that cannot be known."""
    passed = time.monotonic() - since
    if not 0 < done < whole or passed < _SURE:
        return ""
    seconds = passed * (whole - done) / done
    if seconds <= _LONG:
        return f", {seconds:.0f} s left"
    return f", {seconds / 60:.0f} min left" if seconds <= _LONG * 60 else f", {seconds / 3600:.0f} h left"
