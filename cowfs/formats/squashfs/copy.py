"""Copy a whole file out of an image, without its holes, decompressing it in worker threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from itertools import takewhile

from cowfs.formats.squashfs.data import FileData, Run

Write = Callable[[list[bytes], int], None]
"""Writes the pieces one after the other, from the offset on. Several threads call it."""


def copy(data: FileData, size: int, write: Write) -> None:
    """Call *write* for all data in the first *size* bytes of the file; the rest of them are holes.

    Blocks until everything is written. The calling thread copies a file of one run. For a larger file,
    workers decompress and write a run of about 1 MiB each, at most two runs per worker at a time, which
    bounds the memory. The first error ends the copy and is raised: EIO for a damaged block, or an error of
    *write*.
    """
    runs = takewhile(lambda run: run.offset < size, data.runs())
    first = next(runs, None)
    if first is None:
        return
    second = next(runs, None)
    if second is None:
        _copy_run(data, size, first, write)
        return
    most = 2 * data.workers.count
    pending: deque[Future[None]] = deque()

    def start(run: Run) -> None:
        pending.append(data.workers.submit(_copy_run, data, size, run, write))

    try:
        start(first)
        start(second)
        for run in runs:
            if len(pending) >= most:
                pending.popleft().result()
            start(run)
        while pending:
            pending.popleft().result()
    finally:
        # After an error, no thread may write any more when this returns.
        for future in pending:
            future.cancel()
        for future in pending:
            if not future.cancelled():
                future.exception()


def _copy_run(data: FileData, size: int, run: Run, write: Write) -> None:
    parts = data.run(run)
    over = run.offset + run.size - size
    while over > 0:
        part = parts.pop()
        if len(part) > over:
            parts.append(part[:-over])
        over -= len(part)
    write(parts, run.offset)
